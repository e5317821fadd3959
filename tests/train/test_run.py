"""What a run promises: the same training on any ranks, no step with bad numbers, equal refusals."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longspan.attention.linear import LinearMemory
from longspan.data.batches import validation_sequences
from longspan.data.packing import IGNORED, PackedBatch, Sequences
from longspan.data.prepared import PreparedData
from longspan.errors import DataError
from longspan.launch import EXIT_DONE, EXIT_STOPPED, Place, StopRequest
from longspan.layout import SequenceLayout
from longspan.train.config import Config
from longspan.train.loss import loss_share
from longspan.train.phase import RunPhase
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.step_batch import StepBatch
from longspan.train.trainer import Trainer
from tests.models.tiny import each_linear_mixer
from tests.ranks import raised, run_on_ranks
from tests.train.tiny import COMPUTED, interrupted, metrics, newest_tensors, tiny_config, train_here

CPU = torch.device("cpu")
# A token, and the first of the next document.
ONE = torch.tensor([[256, 97]])


@pytest.mark.slow_rows(r"4-values6")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^2-values5$")
@pytest.mark.parametrize(
    ("num_ranks", "values"),
    [
        (1, {"parallel__sp": 1}),
        (2, {"parallel__sp": 2, "parallel__order": "contiguous"}),
        pytest.param(2, {"parallel__sp": 1}, marks=pytest.mark.slow),
        pytest.param(3, {"parallel__sp": 3, "train__micro_batch_sequences": 3}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel__sp": 2, "train__micro_batch_sequences": 1}, marks=pytest.mark.slow),
        (2, {"parallel__sp": 1, "parallel__dp_shard": 2, "train__micro_batch_sequences": 1}),
        (4, {"parallel__sp": 2, "parallel__shard_over_sp": True}),
    ],
)
def test_the_same_run_on_any_ranks(
    corpus: Path, finished: Path, tmp_path: Path, num_ranks: int, values: dict[str, Any]
) -> None:
    run = tmp_path / "run"
    run_on_ranks(num_ranks, train_here, tiny_config(corpus, run, **values))
    expected = metrics(finished, *COMPUTED)
    found = metrics(run, *COMPUTED)
    assert [record["step"] for record in found] == [1, 2, 3, 3, 4, 5, 6, 6]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("over_sp", [False, True])
def test_two_copies_of_two_shares_of_two_ranks_that_share_sequences_run_and_go_on_as_one_process(
    corpus: Path, tmp_path: Path, over_sp: bool
) -> None:
    """HSDP with sequence parallelism, 2 x 2 x 2; its checkpoint is gone on with by one process, and by eight again."""
    values: dict[str, Any] = {"train__batch_tokens": 488, "train__check_replicas_every": 1}
    mesh = {"parallel__dp_replicate": 2, "parallel__dp_shard": 2, "parallel__sp": 2, "parallel__shard_over_sp": over_sp}
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert run_on_ranks(1, train_here, tiny_config(corpus, alone, parallel__sp=1, **values)) == [EXIT_DONE]
    assert run_on_ranks(8, train_here, tiny_config(corpus, run, **mesh, **values), timeout=300.0) == [EXIT_DONE] * 8
    expected = metrics(alone, *COMPUTED)
    for ours, theirs in zip(metrics(run, *COMPUTED), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for num_ranks, of_ranks in ((1, {"parallel__sp": 1}), (8, mesh)):
        going_on = interrupted(run, tmp_path / f"on-{num_ranks}", after=3)
        config = tiny_config(corpus, going_on, **of_ranks, **values)
        assert run_on_ranks(num_ranks, train_here, config, True, timeout=300.0) == [EXIT_DONE] * num_ranks
        for ours, theirs in zip(metrics(going_on, *COMPUTED), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


# The deterministic mode runs in make test, in `test_deterministic.py`.
@pytest.mark.slow
def test_the_same_run_twice_is_the_same_bit_by_bit(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run_on_ranks(2, train_here, tiny_config(corpus, tmp_path / "run", parallel__exchange="ring"))
    run_on_ranks(2, train_here, tiny_config(corpus, tmp_path / "again", parallel__exchange="ring"))
    assert metrics(tmp_path / "run", *COMPUTED) == metrics(tmp_path / "again", *COMPUTED)
    first, second = newest_tensors(tmp_path / "run"), newest_tensors(tmp_path / "again")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_its_folder(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints",
        "config.toml",
        "data",
        "loss.png",
        "metrics.jsonl",
        "summary.json",
        "summary.md",
        "weights.safetensors",
    }
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells which file a descriptor is of")
def test_metrics_are_on_the_disk_before_the_checkpoint_of_their_steps(corpus: Path, tmp_path: Path) -> None:
    """Where the machine loses what is not, a run that goes on from the checkpoint has no gap in its log."""
    synced: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    # Each is complete before the next step: one that is written meanwhile may be complete behind the metrics of step 6.
    values = {"parallel__sp": 1, "sample__tokens": 0, "checkpoint__asynchronous": False}
    config = tiny_config(corpus, tmp_path / "run", **values)
    with mock.patch("os.fsync", noted):
        assert train_on(Ranks(Place(), CPU), config, StopRequest()) == EXIT_DONE
    # Checkpoints of steps 3 and 6.
    assert [name for name in synced if name in ("metrics.jsonl", "manifest.json")] == [
        "metrics.jsonl",
        "manifest.json",
    ] * 2


def _stop_on_rank_1(config: Config) -> int:
    return train_here(config, stop_at_once=dist.get_rank() == 1)


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run)
    assert run_on_ranks(2, _stop_on_rank_1, config) == [EXIT_STOPPED] * 2
    assert not (run / "summary.json").exists()
    assert run_on_ranks(2, train_here, config, True) == [EXIT_DONE] * 2
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)


def _with_nan_on_rank_1(config: Config, bad_steps: tuple[int, ...]) -> int:
    calls = 0

    def sabotaged(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = loss_share(*arguments)
        return loss * float("nan") if dist.get_rank() == 1 and calls in bad_steps else loss

    with mock.patch("longspan.train.trainer.loss_share", sabotaged):
        return train_here(config)


def test_a_step_with_a_nan_on_one_rank_is_skipped_by_all(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run, train__steps=4, checkpoint__every=1, checkpoint__keep=9)
    assert run_on_ranks(2, _with_nan_on_rank_1, config, (3,)) == [EXIT_DONE] * 2
    records = [record for record in metrics(run) if "loss" in record]
    assert [record["skipped"] for record in records] == [False, False, True, False]
    assert records[2]["loss"] is None
    steps = sorted((run / "checkpoints").iterdir())
    second, third, fourth = (
        [(path / f"model-0000{rank}.safetensors").read_bytes() for rank in range(2)] for path in steps[1:]
    )
    assert second == third
    assert third != fourth


def test_many_bad_steps_in_a_row_stop_the_run_with_its_checkpoint(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run, train__max_skipped_steps=2, checkpoint__every=1)
    for kind, text in run_on_ranks(2, raised, _with_nan_on_rank_1, config, (2, 4, 5)):
        assert kind == "TrainingError"
        assert "2 steps in a row were not finite, the last one step 5" in text
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000003", "step-00000004"]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^kda$")
@pytest.mark.parametrize(
    "operator",
    # Of the decays and of the delta rules one each.
    each_linear_mixer(("simple_gla", "kda")),
)
def test_a_diverging_run_skips_its_steps_whatever_the_operator(corpus: Path, tmp_path: Path, operator: str) -> None:
    run = tmp_path / "run"
    values = {"model__operator": operator, "train__max_skipped_steps": 2, "validation__every": 1}
    # After one step the weights are finite, but nothing that layers make of them is.
    config = tiny_config(corpus, run, optim__lr=1e30, optim__warmup_steps=0, checkpoint__every=0, **values)
    for kind, text in run_on_ranks(2, raised, train_here, config):
        assert kind == "TrainingError"
        assert "2 steps in a row were not finite, the last one step 3" in text
        assert text.endswith("There is no checkpoint yet. Lower optim.lr or optim.clip_norm, and start a new run")
    assert [record["skipped"] for record in metrics(run) if "loss" in record] == [False, True, True]


def test_a_diverged_run_is_not_gone_on_with_as_if_the_ranks_disagreed(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run, optim__lr=1e30, optim__warmup_steps=0, train__steps=3, checkpoint__every=0)
    assert run_on_ranks(2, train_here, config) == [EXIT_DONE] * 2
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, run, train__steps=4), True):
        assert kind == "SelfCheckError"
        assert "the weights have diverged: on the first" in text


def test_a_run_whose_last_step_was_skipped_ends_with_a_summary(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config(corpus, run, train__steps=2, checkpoint__every=0)
    assert run_on_ranks(2, _with_nan_on_rank_1, config, (2,)) == [EXIT_DONE] * 2
    summary = json.loads((run / "summary.json").read_text(), parse_constant=_refuse_constant)
    assert summary["training_loss"] is None and summary["validation_loss"] > 0


def test_a_run_with_nothing_to_validate_on_ends_with_a_summary(tmp_path: Path) -> None:
    """Held-out documents of one token each predict nothing."""
    corpus = tmp_path / "text"
    corpus.mkdir()
    (corpus / "a.jsonl").write_text("".join(json.dumps({"text": letter}) + "\n" for letter in "abcdefgh" * 4))
    values = {"train__seq_len": 1, "train__batch_tokens": 4, "train__steps": 1, "validation__sequences": 1}
    config = tiny_config(corpus, tmp_path / "run", parallel__sp=1, **values)
    with mock.patch("longspan.train.data.validation_sequences", lambda *_: Sequences(ONE, ((1,),))):
        assert train_on(Ranks(Place(), CPU), config, StopRequest()) == EXIT_DONE
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=_refuse_constant)
    assert summary["validation_loss"] is summary["unigram_loss"] is summary["unigram_bits_per_byte"] is None


def _refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def _labels_shifted_after_the_split(batch: PackedBatch, layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = layout.shard(batch.inputs)
    labels = inputs.roll(-1, dims=1)
    labels[:, -1] = IGNORED
    return inputs, labels


def _averaged_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


def _gradients_of_own_tokens(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            # As long as rank 0's, but not the sum.
            dist.broadcast(parameter.grad, src=0)


_SABOTAGES: dict[str, Any] = {
    "labels": lambda: mock.patch("longspan.train.loss.own_tokens", _labels_shifted_after_the_split),
    "averaged gradients": lambda: mock.patch("longspan.train.model.sum_gradients", _averaged_gradients),
    "own gradients": lambda: mock.patch("longspan.train.model.sum_gradients", _gradients_of_own_tokens),
    "no exchange": lambda: mock.patch.object(LinearMemory, "incoming", lambda memory, q=None: None),
}


def _sabotaged(config: Config, sabotage: str) -> int:
    with _SABOTAGES[sabotage]():
        return train_here(config)


@pytest.mark.parametrize("sabotage", list(_SABOTAGES))
def test_a_run_whose_ranks_disagree_with_one_process_is_refused(corpus: Path, tmp_path: Path, sabotage: str) -> None:
    config = tiny_config(corpus, tmp_path / "run")
    for kind, text in run_on_ranks(2, raised, _sabotaged, config, sabotage):
        assert kind == "SelfCheckError"
        assert "the ranks together do not compute what one process computes" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def _counting_on_rank_0_alone(config: Config) -> int:
    count = PreparedData.token_counts

    def counts(data: PreparedData, weights: tuple[float, ...] = ()) -> np.ndarray:
        assert dist.get_rank() == 0, "the counts of all shards are read on every rank"
        return count(data, weights)

    with mock.patch.object(PreparedData, "token_counts", counts):
        return train_here(config)


def test_one_rank_counts_the_tokens_of_all_shards_for_all(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"train__steps": 1, "checkpoint__every": 0, "sample__tokens": 0}
    assert run_on_ranks(2, _counting_on_rank_0_alone, tiny_config(corpus, run, **values)) == [EXIT_DONE] * 2
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, finished))
    assert ours["unigram_loss"] == theirs["unigram_loss"] > 0


def _with_a_bad_byte_for_rank_1(config: Config) -> int:
    read, build = validation_sequences, Trainer.__init__

    def reads(*arguments: Any) -> Sequences:
        if dist.get_rank() == 1:
            raise DataError("byte 17 is bad")
        return read(*arguments)

    def builds(*arguments: Any) -> None:
        # The others would wait in it for rank 1.
        with mock.patch("longspan.parallel.mesh.group_of_ranks", side_effect=AssertionError("a process group is made")):
            build(*arguments)

    with (
        mock.patch("longspan.train.data.validation_sequences", reads),
        mock.patch.object(Trainer, "__init__", builds),
    ):
        return train_here(config)


@pytest.mark.parametrize("values", [{"parallel__dp_replicate": 2}, {"parallel__dp_shard": 2}])
def test_what_one_rank_cannot_read_is_an_error_of_all_at_once(
    corpus: Path, tmp_path: Path, values: dict[str, Any]
) -> None:
    config = tiny_config(corpus, tmp_path / "run", parallel__sp=2, **values)
    assert run_on_ranks(4, raised, _with_a_bad_byte_for_rank_1, config) == [("DataError", "byte 17 is bad")] * 4


def _failing_to_make_the_batch_of_step_3(config: Config) -> str:
    make, phase = Trainer._make_batch, RunPhase()

    def makes(trainer: Trainer, step: int) -> StepBatch:
        if step == 2:
            raise RuntimeError("no memory is left")
        return make(trainer, step)

    with mock.patch.object(Trainer, "_make_batch", makes), pytest.raises(RuntimeError, match="no memory is left"):
        train_on(Ranks(Place(), CPU), config, StopRequest(), phase=phase)
    return phase.where


def test_a_batch_that_cannot_be_made_is_said_to_be_read(corpus: Path, tmp_path: Path) -> None:
    config = tiny_config(corpus, tmp_path / "run", parallel__sp=1)
    assert run_on_ranks(1, _failing_to_make_the_batch_of_step_3, config) == ["step 2, while reading a batch"]


def _different_seeds(config: Config) -> int:
    train = dataclasses.replace(config.train, seed=dist.get_rank())
    return train_here(dataclasses.replace(config, train=train))


def test_ranks_that_were_started_differently_all_say_how(corpus: Path, tmp_path: Path) -> None:
    for kind, text in run_on_ranks(3, raised, _different_seeds, tiny_config(corpus, tmp_path / "run")):
        assert kind == "ConfigError"
        assert "train.seed: rank 0 '0', rank 1 '1', rank 2 '2'" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"parallel__sp": 4},
            "ConfigError",
            "2 ranks are not parallel.dp_replicate 1 x parallel.dp_shard 1 x parallel.sp 4",
        ),
        ({"data__source": "/nowhere"}, "DataError", "data.source '/nowhere' does not exist"),
        ({"train__batch_tokens": 61_000}, "DataError", "fewer than one global batch of 1000 sequences of 61"),
        ({"parallel__device": "cuda"}, "ConfigError", "parallel.device is 'cuda', but there are 0 usable GPUs"),
    ],
)
def test_refusals_are_the_same_on_every_rank(
    corpus: Path, tmp_path: Path, values: dict[str, Any], kind: str, message: str
) -> None:
    if "parallel__device" in values and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = tiny_config(corpus, tmp_path / "run", **values)
    for found in run_on_ranks(2, raised, _train_on_chosen_device, config):
        assert found[0] == kind
        assert message in found[1]


def _train_on_chosen_device(config: Config) -> int:
    from longspan.launch import Place
    from longspan.train.ranks import choose_device

    choose_device(config.parallel.device, Place(dist.get_rank(), 2, dist.get_rank(), 2))
    return train_here(config)


def test_the_folder_of_another_run_is_never_overwritten(corpus: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, finished)):
        assert kind == "ConfigError"
        assert f"run.dir '{finished}' is not empty" in text
        assert f"--resume {finished}" in text
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
