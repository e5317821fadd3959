"""What states of a run travel in: coded, chosen by a bound; the check of the first batch sends them as they are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.errors import ConfigError
from longspan.exchange import Auto, Float8, Int8, Ring, TopK
from longspan.exchange.auto.figures import known_figures
from longspan.launch import EXIT_DONE
from longspan.layout import SequenceLayout
from longspan.train.config import Config, from_mapping
from longspan.train.config_checks import check
from longspan.train.exchange import sends_exactly
from longspan.train.report import Report
from tests.ranks import run_on_ranks
from tests.train.tiny import metrics, tiny_config, train_here


def built(**values: Any) -> Any:
    return from_mapping({"parallel": values}).parallel.build_exchange()


def test_a_codec_is_an_option() -> None:
    assert built(exchange="ring", exchange_dtype="int8") == Ring(codec=Int8())
    assert built(exchange_dtype="float8") == Auto(measure=True, codec=Float8())
    assert built(exchange_dtype="top_k", exchange_top_k=0.2) == Auto(measure=True, codec=TopK(0.2))
    assert built(exchange_max_relative_error=0.05) == Auto(measure=True, max_relative_error=0.05)
    fed = built(exchange="ring", exchange_dtype="top_k", exchange_error_feedback=True)
    assert fed.remembers_errors and fed.codec.fraction == 0.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"exchange_max_relative_error": 1e-4},
            "parallel.exchange_max_relative_error: max_relative_error is 0.0001, and no codec",
        ),
        (
            {"exchange_max_relative_error": 0.1, "exchange_dtype": "int8"},
            "one of state_dtype, codec and max_relative_error",
        ),
        (
            {"exchange_max_relative_error": 0.1, "exchange": "ring"},
            "parallel.exchange is 'ring'. Leave one of them out",
        ),
        (
            {"exchange_top_k": 0.2},
            "an option of parallel.exchange_dtype 'top_k'; it is 'float32'. Leave parallel.exchange_top_k out",
        ),
        ({"exchange_error_feedback": True, "exchange_dtype": "int8"}, "Leave parallel.exchange_error_feedback out"),
        (
            {"exchange_dtype": "top_k", "exchange_top_k": 2.0},
            "parallel.exchange_top_k: TopK: fraction must be a number above 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_rank_starts(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(from_mapping({"parallel": values}))


def test_feedback_takes_no_second_forward() -> None:
    parallel = {"exchange_dtype": "top_k", "exchange_error_feedback": True}
    with pytest.raises(
        ConfigError, match=r"train.recompute 'layer': a layer that is computed again.*Take train.recompute"
    ):
        check(from_mapping({"parallel": parallel, "train": {"recompute": "layer"}}))
    check(from_mapping({"parallel": parallel, "train": {"recompute": "selective"}}))
    with pytest.raises(
        ConfigError, match=r"computed twice.*without feedback.*exchange_error_feedback, train.segment_tokens 1024"
    ):
        check(from_mapping({"parallel": parallel, "train": {"segment_tokens": 1024}}))


def test_nothing_is_rounded_in_a_comparison_with_one_process() -> None:
    config = from_mapping({"parallel": {"exchange_dtype": "top_k", "exchange_top_k": 0.5, "order": "contiguous"}})
    exact = sends_exactly(config)
    assert exact.parallel == dataclasses.replace(Config().parallel, order="contiguous")
    assert sends_exactly(exact) == exact


def said_by_a_run(config: Config) -> list[tuple[str, str]]:
    """The lines that say what a run consists of, and where its first step is among them."""
    said: list[tuple[str, str]] = []
    # The ranks of tests keep their group, and what was taken in it.
    known = known_figures(SequenceLayout(2), torch.device("cpu"))
    if known is not None:
        known.taken.clear()

    def heading(report: Report, name: str, text: str) -> None:
        said.append((name, text))

    def step(report: Report, record: dict[str, Any]) -> None:
        said.append(("step", str(record["step"])))

    with mock.patch.object(Report, "heading", heading), mock.patch.object(Report, "step", step):
        assert train_here(config) == EXIT_DONE
    return said


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"int8")
@pytest.mark.parametrize(
    ("values", "way", "is_said_before"),
    [
        # The check of the first batch has exchanged what the run does.
        ({}, "", True),
        ({"parallel__exchange_dtype": "int8"}, " int8", False),
        pytest.param({"train__check_tokens": 0}, "", False, marks=pytest.mark.slow),
        pytest.param({"parallel__exchange_dtype": "bfloat16"}, "", False, marks=pytest.mark.slow),
        pytest.param({"model__num_experts": 2}, "", False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_says_once_how_its_own_states_travel(
    corpus: Path, tmp_path: Path, values: dict[str, Any], way: str, is_said_before: bool
) -> None:
    given: dict[str, Any] = {"validation__every": 0, "sample__tokens": 0, "train__batch_tokens": 122, "train__steps": 2}
    said = run_on_ranks(2, said_by_a_run, tiny_config(corpus, tmp_path / "run", **given, **values))[0]
    ((place, text),) = [(place, text) for place, (name, text) in enumerate(said) if name == "exchange"]
    assert re.fullmatch(
        rf"\w+{way} for ScalarDecay states of \d+ x 8 x 8; as measured now, and kept in the checkpoints", text
    )
    assert (place < said.index(("step", "1"))) == is_said_before and place < said.index(("step", "2"))


def test_a_run_sends_codes(corpus: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"validation__every": 0, "sample__tokens": 0, "train__batch_tokens": 122, "train__steps": 2}
    # Its first batch is compared with one process, to four digits: sent as it is.
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    given["parallel__exchange"] = "ring"
    run_on_ranks(2, train_here, tiny_config(corpus, plain, **given))
    config = tiny_config(
        corpus, coded, **given, parallel__exchange_dtype="top_k", parallel__exchange_error_feedback=True
    )
    assert run_on_ranks(2, train_here, config) == [EXIT_DONE] * 2
    for ours, theirs in zip(metrics(coded, "loss"), metrics(plain, "loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)
    sent, whole = (metrics(run, "exchanged_bytes")[0]["exchanged_bytes"] for run in (coded, plain))
    assert sent < whole
