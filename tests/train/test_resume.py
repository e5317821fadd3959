"""What a run that goes on promises: to the bit what it would have been, from what is whole alone, and as the same run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.errors import CheckpointError, ConfigError
from longspan.exchange import TOPOLOGIES
from longspan.launch import EXIT_DONE, Place
from longspan.layout import SequenceLayout
from longspan.plan import gpu_cluster
from longspan.train.checkpoint import newest_checkpoint
from longspan.train.config import Config, from_mapping
from longspan.train.config_checks import check
from longspan.train.exchange import take_saved_figures
from longspan.train.loading import SavedCheckpoint
from longspan.train.ranks import Ranks
from tests.ranks import raised, run_on_ranks
from tests.train.checkpoints import load_checkpoint
from tests.train.tiny import COMPUTED, interrupted, metrics, newest_tensors, tiny_config, train_here, write_corpus

CPU = torch.device("cpu")


def test_a_resumed_run_is_bit_equal_to_one_that_was_never_interrupted(
    corpus: Path, finished: Path, tmp_path: Path
) -> None:
    run = interrupted(finished, tmp_path / "run", after=3)
    run_on_ranks(2, train_here, tiny_config(corpus, run), True)
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)
    expected = newest_tensors(finished)
    found = newest_tensors(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (run / "weights.safetensors").read_bytes() == (finished / "weights.safetensors").read_bytes()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]


def test_a_job_that_is_started_again_goes_on_where_it_stands(corpus: Path, finished: Path, tmp_path: Path) -> None:
    """From nothing, from a folder without a checkpoint, and from a checkpoint, by one and the same command."""
    new, cut_off = tmp_path / "new", tmp_path / "cut-off"
    shutil.copytree(finished / "data", cut_off / "data")
    begun = interrupted(finished, tmp_path / "begun", after=3)
    for run in (new, cut_off, begun):
        assert run_on_ranks(2, train_here, tiny_config(corpus, run, run__go_on=True)) == [EXIT_DONE] * 2
        assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)
    assert len(metrics(begun)) == len(metrics(finished))


def test_a_job_that_is_started_again_takes_no_other_folder(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, other, run__go_on=True)):
        assert kind == "ConfigError"
        assert "holds no run to go on with" in text and "thesis.tex" in text
    with pytest.raises(ConfigError, match=r"run.go_on is True, but run.dir is not given"):
        check(from_mapping({"run": {"go_on": True}}))


def _go_on_without_measuring(config: Config) -> int:
    with (
        mock.patch("longspan.exchange.auto.calibration._measure", side_effect=AssertionError("measured again")),
        mock.patch("longspan.exchange.auto.choice.try_out", side_effect=AssertionError("tried again")),
    ):
        return train_here(config, resume=True)


def test_a_resumed_run_takes_the_exchange_that_was_measured_before(
    corpus: Path, finished: Path, tmp_path: Path
) -> None:
    run = interrupted(finished, tmp_path / "run", after=3)
    before = load_checkpoint(newest_checkpoint(run / "checkpoints")).state["exchange"]
    assert (before["sp"], before["device"]) == (2, "cpu")
    # Another run of this process may have tried states of others over the same group, or sent them in a codec.
    trials = [trial for trial in before["groups"][0]["trials"] if trial["taken"] is not None]
    plain = [trial for trial in trials if not trial["on_wire"]]
    assert plain and all(trial["taken"] in TOPOLOGIES for trial in plain)
    assert all(trial["taken"].split()[0] in TOPOLOGIES for trial in trials)
    assert any(trial["problem"]["transition"] == "ScalarDecay" for trial in plain)
    assert run_on_ranks(2, _go_on_without_measuring, tiny_config(corpus, run)) == [EXIT_DONE] * 2
    assert load_checkpoint(newest_checkpoint(run / "checkpoints")).state["exchange"] == before


def test_figures_of_other_nodes_are_not_taken() -> None:
    cluster = dataclasses.asdict(gpu_cluster(2, 1))
    record = {"sp": 2, "device": "cpu", "groups": [{"cluster": cluster, "trials": []}]}
    on_one_node = SequenceLayout.for_rank(8, 2, 0, ranks_per_node=2)
    assert not take_saved_figures(
        SavedCheckpoint(Path(), 3, {"exchange": record}, {}, {}), on_one_node, Ranks(Place(0, 2), CPU)
    )


@pytest.mark.parametrize("record", [3, {}, {"sp": 2, "device": "cpu", "groups": [{"cluster": {"num_ranks": "two"}}]}])
def test_figures_of_an_exchange_of_another_form_are_refused(record: Any) -> None:
    ranks = Ranks(Place(0, 2), CPU)
    saved = SavedCheckpoint(Path(), 3, {"exchange": record}, {}, {})
    with pytest.raises(CheckpointError, match="step 3 has no figures of an exchange that this version knows"):
        take_saved_figures(saved, SequenceLayout.for_rank(8, 2, 0), ranks)


def test_a_run_may_go_on_with_other_ranks(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = interrupted(finished, tmp_path / "run", after=3)
    run_on_ranks(1, train_here, tiny_config(corpus, run, parallel__sp=1), True)
    for ours, theirs in zip(metrics(run, *COMPUTED), metrics(finished, *COMPUTED), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_finished_run_can_be_made_longer(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    run_on_ranks(2, train_here, tiny_config(corpus, run, train__steps=8), True)
    assert [record["step"] for record in metrics(run)] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


@pytest.mark.slow
def test_what_a_resumed_run_says_of_its_speed_needs_no_file_that_may_be_gone(
    corpus: Path, finished: Path, tmp_path: Path
) -> None:
    summaries = []
    for name, metrics_of in (("whole", None), ("gone", ""), ("damaged", "xx\n")):
        run = interrupted(finished, tmp_path / name, after=3)
        if metrics_of is not None:
            (run / "metrics.jsonl").write_text(metrics_of)
        if name == "gone":
            (run / "metrics.jsonl").unlink()
        if name == "damaged":
            for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, run), True):
                assert kind == "CheckpointError"
                assert "metrics.jsonl, line 1, is not JSON" in text
            continue
        assert run_on_ranks(2, train_here, tiny_config(corpus, run), True) == [EXIT_DONE] * 2
        summaries.append(json.loads((run / "summary.json").read_text()))
        assert [record["step"] for record in metrics(run)] == ([1, 2, 3, 3] if name == "whole" else []) + [4, 5, 6, 6]
    saved = load_checkpoint(newest_checkpoint(tmp_path / "gone" / "checkpoints")).state["totals"]
    assert saved["tokens"] == 6 * 366
    for summary in summaries:
        rate = summary["tokens"] / summary["seconds_in_steps"]
        assert summary["tokens_per_second"] == pytest.approx(rate)
        assert summary["memory_bytes"] > 50e6 and 0 <= summary["wait_share"] <= 1
    assert summaries[0]["training_loss"] == summaries[1]["training_loss"] == metrics(finished)[-2]["loss"]


def test_a_finished_run_without_its_metrics_may_be_finished_again(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.jsonl").unlink()
    assert run_on_ranks(2, train_here, tiny_config(corpus, run), True) == [EXIT_DONE] * 2
    again, before = (json.loads((path / "summary.json").read_text()) for path in (run, finished))
    different = {key for key in before if again[key] != before[key]}
    assert different <= {"seconds_of_this_process"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model__dim": 32, "train__seed": 1}, ["model.dim: 16 -> 32", "train.seed: 0 -> 1", "Leave these keys out"]),
        ({"data__tokenizer": "bpe"}, ["data.tokenizer: 'bytes' -> 'bpe'"]),
    ],
)
def test_a_resume_with_another_model_lists_the_differences(
    corpus: Path, finished: Path, values: dict[str, Any], message: list[str]
) -> None:
    before = (finished / "config.toml").read_bytes()
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, finished, **values), True):
        assert kind == "CheckpointError"
        assert all(part in text for part in message)
    assert (finished / "config.toml").read_bytes() == before


def test_a_resume_from_a_damaged_checkpoint_names_the_file(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "step-00000006" / "optimizer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, run), True):
        assert kind == "CheckpointError"
        assert "step-00000006/optimizer-00001.safetensors has changed since it was written" in text


def test_a_resume_takes_an_older_checkpoint_only_if_asked(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "step-00000006" / "model-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, run), True):
        assert kind == "CheckpointError" and "give --checkpoint.allow_older True" in text
    config = tiny_config(corpus, run, checkpoint__allow_older=True)
    assert run_on_ranks(2, train_here, config, True) == [EXIT_DONE] * 2
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["damaged-step-00000006", "step-00000003", "step-00000006"]
    assert "allow_older = false" in (run / "config.toml").read_text()
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)
    expected, found = newest_tensors(finished), newest_tensors(run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for path in (run / "checkpoints").glob("step-*/state.json"):
        path.write_text("x")
    for kind, text in run_on_ranks(2, raised, train_here, config, True):
        assert kind == "CheckpointError" and "step-00000006/state.json has 1 bytes" in text


def test_a_resume_on_changed_data_is_refused(corpus: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "data" / "train-00-00000.tokens"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(corpus, run), True):
        assert kind == "DataError"
        assert "train-00-00000.tokens is not what was prepared" in text
    shutil.rmtree(run / "data")
    write_corpus(tmp_path / "other")
    (tmp_path / "other" / "0.txt").write_text("something else " * 50)
    config = tiny_config(corpus, run)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, source=(str(tmp_path / "other"),)))
    for kind, text in run_on_ranks(2, raised, train_here, other, True):
        assert kind == "CheckpointError"
        assert "data.source" in text
