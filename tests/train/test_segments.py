"""A run in segments of time is the run on whole sequences; it is checked first, says how far a step is, and stops inside of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from longspan.errors import ConfigError
from longspan.launch import EXIT_DONE, EXIT_STOPPED, Place, StopRequest
from longspan.streaming import SegmentDone
from longspan.train.config import Config
from longspan.train.phase import RunPhase
from longspan.train.ranks import Ranks
from longspan.train.report import Report
from longspan.train.run import train_on
from longspan.train.segment_steps import SegmentsOfStep
from longspan.train.segments import Segmentation
from tests.compare import relative_error, worst
from tests.ranks import raised, run_on_ranks
from tests.train.tiny import metrics, newest_tensors, tiny_config, train_here, write_corpus

IN_SEGMENTS: dict[str, Any] = {"train__segment_tokens": 100, "data__documents": "reset"}
"""Of packed rows of 366 tokens, in which documents are cut."""
LINEAR: dict[str, Any] = {"model__pattern": "L", "model__operator": "mamba2"}
HYBRID: dict[str, Any] = {"model__pattern": "LN", "data__documents": "concatenate"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def test_each_option_of_segments_is_handed_on(corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokens": 50, "memory_every": 3, "offload": True, "reduce_each": True}
    given = {f"train__segment_{name}": value for name, value in options.items()}
    config = tiny_config(corpus, tmp_path, **given, parallel__shard_over_sp=True)
    cut = Segmentation.of(config.train)
    assert cut == Segmentation(50, keep_every=3, offload=True, reduce_each=True)
    with mock.patch("longspan.train.segments.Stream") as stream:
        model = torch.nn.Identity()
        cut.stream(model)
        cut.for_check(600, 2).stream(model)
        cut.for_check(60, 2).stream(model)
    assert [call.args for call in stream.call_args_list] == [
        (model, 50, 3, True, True),
        (model, 50, 3, True, True),
        (model, 20, 3, True, True),
    ]


def differences(run: Path, other: Path) -> dict[str, float]:
    """Of the weights, and of the losses of all steps and validations, relative."""
    ours, theirs = newest_tensors(run), newest_tensors(other)
    found = {
        name: relative_error(ours[name], theirs[name], 1e-3)
        for name in theirs
        if "blocks" in name and "optimizer" not in name
    }
    for record, expected in zip(metrics(run), metrics(other), strict=True):
        for key in ("loss", "validation_loss", "gradient_norm"):
            if key in expected:
                found[f"{key} of step {expected['step']}"] = abs(record[key] / expected[key] - 1)
    assert len(found) > 15
    return found


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^1-changes0$")
@pytest.mark.parametrize(
    ("num_ranks", "changes"),
    [
        (1, {**LINEAR, **IN_SEGMENTS, "train__segment_memory_every": 2}),
        (2, {"model__pattern": "LN", **IN_SEGMENTS, "train__segment_offload": True}),
        pytest.param(2, {**LINEAR, **IN_SEGMENTS, "train__micro_batch_sequences": 2}, marks=pytest.mark.slow),
        pytest.param(
            2,
            {**LINEAR, **IN_SEGMENTS, "parallel__dp_shard": 2, "parallel__sp": 1, "train__recompute": "layer"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {**LINEAR, **IN_SEGMENTS, "parallel__shard_over_sp": True, "train__segment_reduce_each": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2,
            {**LINEAR, **IN_SEGMENTS, "model__num_experts": 3, "model__hidden_dim": 8},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_in_segments_is_the_run_on_whole_sequences(
    corpus: Path, tmp_path: Path, num_ranks: int, changes: dict[str, Any]
) -> None:
    if num_ranks == 1:
        changes = {**changes, "parallel__sp": 1}
    whole = {name: value for name, value in changes.items() if "segment" not in name}
    for name, values in (("whole", whole), ("segments", changes)):
        config = tiny_config(corpus, tmp_path / name, train__steps=3, **values)
        assert run_on_ranks(num_ranks, train_here, config) == [EXIT_DONE] * num_ranks
    assert worst(differences(tmp_path / "segments", tmp_path / "whole")) < 2e-3


class StopsInside(StopRequest):
    """A signal that comes while a step is computed: the `calls`-th time that anybody asks."""

    def __init__(self, calls: int) -> None:
        self._left = calls
        super().__init__()

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left <= 0

    @requested.setter
    def requested(self, value: bool) -> None:
        pass


def stopped_inside_a_step(config: Config, calls: int) -> int:
    """One rank alone hears of the signal."""
    stop = StopsInside(calls) if dist.get_rank() == 0 else StopRequest()
    return train_on(Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu")), config, stop)


# Between two steps it runs in make test, in `test_run.py`.
@pytest.mark.slow
def test_a_signal_stops_a_run_between_two_segments_and_it_goes_on_bit_by_bit(corpus: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {**HYBRID, "train__segment_tokens": 20, "train__steps": 4, "train__deterministic": True}
    whole = tiny_config(corpus, tmp_path / "whole", **values)
    assert run_on_ranks(2, train_here, whole) == [EXIT_DONE] * 2
    config = tiny_config(corpus, tmp_path / "run", **values)
    # Asked before the first step, after 2 + 3 passes over its segments and behind it, and then after three of the second step.
    assert run_on_ranks(2, stopped_inside_a_step, config, 1 + 5 + 1 + 3) == [EXIT_STOPPED] * 2
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == [1]
    assert run_on_ranks(2, train_here, config, True) == [EXIT_DONE] * 2
    ours, theirs = newest_tensors(tmp_path / "run"), newest_tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert worst({name: relative_error(ours[name], theirs[name]) for name in theirs}) == 0.0


def sabotaged(config: Config) -> int:
    with mock.patch("longspan.streaming.engine.taken_gradient", torch.zeros_like):
        return train_here(config)


def test_segments_that_are_not_the_whole_are_found_before_the_first_step(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", parallel__sp=1, **LINEAR, **IN_SEGMENTS)
    ((kind, text),) = run_on_ranks(1, raised, sabotaged, config)
    assert kind == "SelfCheckError"
    assert "do not compute what one process computes" in text and "train.segment_tokens" in text


def test_a_check_sees_three_segments_however_long_they_are() -> None:
    assert Segmentation(10**6, 4).for_check(1000, 2) == Segmentation(334, 4)
    assert Segmentation(100, 1).for_check(1000, 2) == Segmentation(100, 1)
    assert Segmentation(100, 1).for_check(3, 2) == Segmentation(2, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train__segment_tokens": 0}, "train.segment_tokens is 0; it must be at least 1"),
        ({"train__segment_tokens": 1}, "train.segment_tokens 1 is less than parallel.sp 2.*The least that works is 2"),
        (
            {"train__segment_tokens": 20, "train__segment_reduce_each": True},
            "train.segment_reduce_each is True, and no weights are divided",
        ),
        ({"train__segment_memory_every": 2}, "train.segment_memory_every is 2, and train.segment_tokens is not given"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(corpus, tmp_path / "run", **values)


def test_a_step_says_how_much_of_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    phase = RunPhase()
    shares: list[tuple[int, float, str]] = []
    report = Report(9, 1, silent=False)
    ranks: Any = mock.Mock(gather_numbers=lambda own: torch.zeros(1, 1))
    phase.step = 3
    with mock.patch.object(report, "within_step", lambda step, share, where: shares.append((step, share, where))):
        memory = mock.Mock()
        between = SegmentsOfStep(3, 2, ranks, StopRequest(), phase, report, memory)
        for _ in range(2):
            for segment in range(3):
                between(SegmentDone("forward", segment, 4))
            for segment in (3, 2, 1, 0):
                between(SegmentDone("again", 0, 4))
                between(SegmentDone("backward", segment, 4))
    found = [share for _, share, _ in shares]
    assert found == sorted(found) and found[-1] == 1.0 and found[6] == 0.5 and len(found) == 14
    assert memory.pass_ended.call_count == 2 * (3 + 4 + 4)
    assert shares[-1] == (3, 1.0, "segment 1 of 4 backward")
    assert phase.where == "step 3, while computing backward, behind segment 1 of 4"
    with mock.patch("longspan.train.report._SECONDS_BETWEEN_LINES", -1.0):
        report.within_step(3, 0.25, "segment 2 of 4 forward")
    assert capsys.readouterr().out.startswith("step 3/9  25%, segment 2 of 4 forward")
    report.within_step(3, 0.25, "segment 2 of 4 forward")
    assert capsys.readouterr().out == ""
