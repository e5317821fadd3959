"""Associative recall as what is trained on: the same run on any mesh, resumed bit for bit, validated by accuracy."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.cli import main
from longspan.data.recall import RecallTask
from longspan.errors import ConfigError
from longspan.launch import EXIT_DONE, Place, StopRequest
from longspan.models.hf import LinearLlamaForCausalLM
from longspan.train.config import Config, from_mapping
from longspan.train.config_checks import check
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.trained import open_trained
from tests.ranks import run_on_ranks
from tests.shared import made_once
from tests.train.tiny import metrics, newest_tensors, train_here

CPU = torch.device("cpu")
COMPUTED = ("step", "loss", "gradient_norm", "valid_tokens", "validation_loss", "validation_accuracy")


def recall_config(run: Path, **values: Any) -> Config:
    mapping: dict[str, dict[str, Any]] = {
        "data": {"task": "recall", "vocab_size": 24},
        "recall": {"pairs": 3},
        "model": {"dim": 16, "num_layers": 2, "pattern": "LN", "num_heads": 2, "num_kv_heads": 1, "hidden_dim": 24},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 4, "seq_len": 21, "batch_tokens": 84},
        "validation": {"every": 2, "sequences": 3},
        "checkpoint": {"every": 2, "keep": 9},
        "run": {"dir": str(run), "measure_alone": False},
    }
    for key, value in values.items():
        section, name = key.split("__")
        mapping.setdefault(section, {})[name] = value
    config = from_mapping(mapping)
    check(config)
    return config


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process."""

    def make(folder: Path) -> str:
        run_on_ranks(1, train_here, recall_config(folder / "run", parallel__sp=1))
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "recall-finished", make))


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"'parallel__sp': 1, 'train__micro")
@pytest.mark.parametrize(
    ("num_ranks", "values"),
    [
        (2, {"parallel__sp": 2}),
        (2, {"parallel__sp": 1, "train__micro_batch_sequences": 1}),
        pytest.param(1, {"parallel__sp": 1, "train__segment_tokens": 5}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__sp": 2, "parallel__order": "contiguous"}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel__sp": 1, "parallel__dp_shard": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel__sp": 2, "parallel__dp_shard": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"parallel__sp": 4, "parallel__shard_over_sp": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_is_the_same_on_any_mesh(finished: Path, tmp_path: Path, num_ranks: int, values: dict[str, Any]) -> None:
    config = recall_config(tmp_path / "run", **values)
    # Each of them compares itself with one process before its first step.
    assert run_on_ranks(num_ranks, train_here, config) == [EXIT_DONE] * num_ranks
    for ours, theirs in zip(metrics(tmp_path / "run", *COMPUTED), metrics(finished, *COMPUTED), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_validation_is_of_held_out_answers_alone(finished: Path) -> None:
    model = open_trained(finished).model
    held_out = RecallTask(3, 24, 21, seed=0).sequences("validation", range(3))
    with torch.no_grad():
        logits = model(held_out.tokens[:, :-1])
    asked = held_out.labels >= 0
    nats = torch.nn.functional.cross_entropy(logits[asked], held_out.labels[asked])
    right = (logits.argmax(-1) == held_out.labels)[asked].double().mean()
    last = metrics(finished)[-1]
    assert last["validation_loss"] == pytest.approx(float(nats), rel=1e-5)
    assert last["validation_accuracy"] == pytest.approx(float(right))
    assert "validation_bits_per_byte" not in last
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["validation_accuracy"] == last["validation_accuracy"]
    assert summary["chance_accuracy"] == pytest.approx(1 / 3) and summary["chance_loss"] == pytest.approx(math.log(3))
    assert summary["tokens_by_document_length"] == {"16-31": 4 * 84} and summary["sample"] == ""
    assert not (finished / "data").exists()


def test_a_resumed_run_is_the_same_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "weights.safetensors").unlink()
    assert run_on_ranks(1, train_here, recall_config(run, parallel__sp=1), True) == [EXIT_DONE]
    assert metrics(run, *COMPUTED) == metrics(finished, *COMPUTED)
    ours, theirs = newest_tensors(run), newest_tensors(finished)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_task_is_not_gone_on_with(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["train", "--resume", str(run), "--recall.pairs", "2", "--parallel.sp", "1"]) == 2
    assert "recall.pairs: 3 -> 2" in capsys.readouterr().err


def test_text_is_not_generated_by_a_model_of_no_text(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--run", str(finished), "--prompt", "a"]) == 2
    assert "was trained with data.task 'recall', whose tokens are no text" in capsys.readouterr().err
    assert main(["generate", "--run", str(finished), "--prompt", "a", "--data", "somewhere"]) == 2
    assert "which reads no data; got data 'somewhere'" in capsys.readouterr().err


def test_a_model_of_no_text_is_exported_without_a_tokenizer(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And imported again; the same logits in both forms."""
    assert main(["export", "--run", str(finished), "--to", str(tmp_path / "out")]) == EXIT_DONE
    assert "no tokenizer: the run was trained with data.task 'recall'" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors")
    }
    theirs = LinearLlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.eos_token_id is None
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=tokens).logits, open_trained(finished).model(tokens))
    assert main(["import", str(tmp_path / "out"), "--to", str(tmp_path / "again")]) == EXIT_DONE
    again = (tmp_path / "again" / "weights.safetensors").read_bytes()
    assert again == (finished / "weights.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"recall__pairs": 6},
            "recall.pairs 6, data.vocab_size 24 and train.seq_len 21 do not fit each other: a sequence",
        ),
        ({"data__vocab_size": 6}, "a vocabulary of 6 words has 2 keys, and a sequence takes 3"),
        ({"recall__pairs": 0}, "recall.pairs is 0; it must be at least 1"),
        ({"recall__power": math.inf}, "recall.power is inf; it must be a finite number"),
        ({"data__tokenizer": "bytes"}, "takes nothing of what is said of text; got data.tokenizer 'bytes'"),
        ({"data__prepared": "data"}, "takes nothing of what is said of text; got data.prepared 'data'"),
        ({"sample__tokens": 3}, "takes nothing of what is said of text; got sample.tokens 3"),
        (
            {"data__task": "text", "data__vocab_size": 300},
            "takes nothing of what is said of recall; got recall.pairs 3",
        ),
        ({"data__task": "text"}, "data.vocab_size is 24; it must be at least 257"),
        ({"data__task": "sums"}, "data.task is 'sums'; it must be one of 'text', 'recall'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        recall_config(tmp_path, **values)


@pytest.mark.slow
def test_a_small_hybrid_learns_to_recall(tmp_path: Path) -> None:
    config = recall_config(
        tmp_path / "run",
        parallel__sp=1,
        data__vocab_size=64,
        recall__pairs=4,
        model__dim=64,
        model__num_heads=2,
        model__num_kv_heads=2,
        model__hidden_dim=128,
        optim__lr=3e-3,
        optim__warmup_steps=50,
        train__steps=500,
        train__seq_len=32,
        train__batch_tokens=32 * 64,
        train__check_tokens=0,
        validation__every=0,
        validation__sequences=100,
        checkpoint__every=0,
    )
    assert train_on(Ranks(Place(), CPU), config, StopRequest()) == EXIT_DONE
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["chance_accuracy"] == pytest.approx(0.25)
    assert summary["validation_accuracy"] > 0.9
