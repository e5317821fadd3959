"""``longspan eval`` gives out what evaluations find, on any number of ranks, and refuses what does not fit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.cli import main
from longspan.commands.evaluation import _finite
from longspan.data.prepare import prepare_corpus
from longspan.launch import Place, StopRequest
from longspan.train.config import Config
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from tests import copied
from tests.data.shards import recipe
from tests.shared import made_once
from tests.train.test_recall import recall_config
from tests.train.tiny import metrics, tiny_config, write_corpus

TIMEOUT = 600.0


def _trained(factory: pytest.TempPathFactory, name: str, config_in: Any) -> Path:
    def make(folder: Path) -> str:
        config: Config = config_in(folder)
        assert train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest()) == 0
        return str(folder / "run")

    return Path(made_once(factory, name, make))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text."""
    values: dict[str, Any] = {"train__steps": 6, "train__seq_len": 200, "train__batch_tokens": 800}
    return _trained(
        tmp_path_factory,
        "eval-run",
        lambda folder: tiny_config(
            write_corpus(folder / "text"), folder / "run", **values, parallel__sp=1, sample__tokens=0
        ),
    )


@pytest.fixture(scope="module")
def recall_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _trained(tmp_path_factory, "eval-recall", lambda folder: recall_config(folder / "run", parallel__sp=1))


@pytest.fixture(autouse=True)
def threads() -> Any:
    """The command sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def evaluate(name: str, run: Path, *options: str, code: int = 0) -> None:
    """The command in this process, which must end with this exit code."""
    assert main(["eval", name, "--run", str(run), "--parallel.threads", "1", *options]) == code


def found(name: str, run: Path, *options: str, folder: Path) -> dict[str, Any]:
    evaluate(name, run, *options, "--json", str(folder / "found.json"))
    values: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return values


def on_ranks(folder: Path, name: str, run: Path, *options: str, num_ranks: int = 2, torchrun: bool = False) -> Any:
    """What several ranks find, as JSON."""
    file = folder / f"{name}-{num_ranks}.json"
    arguments = ["eval", name, "--run", str(run), "--parallel.sp", str(num_ranks), "--json", str(file), *options]
    if torchrun:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone"]
        command = [sys.executable, *launcher, "-m", "longspan", "--", *arguments]
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    else:
        done = copied.run(arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def check_alike(ours: Any, theirs: Any) -> None:
    """Equal but for the number of ranks, and for rounding."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"ranks", "order"}:
            check_alike(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            check_alike(one, other)
    else:
        assert ours == (pytest.approx(theirs, rel=2e-5) if isinstance(theirs, float) else theirs)


def test_the_loss_is_the_validation_loss_of_the_run_taken_apart(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = found("loss", run, folder=tmp_path)
    last = metrics(run)[-1]
    assert values["whole"]["nats_per_token"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert values["whole"]["bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-5)
    for table in ("by_context", "by_document_length"):
        assert sum(row["tokens"] for row in values[table]) == values["whole"]["tokens"]
        assert sum(row["bytes"] for row in values[table]) == values["whole"]["bytes"]
        assert all(row["to"] == 2 * row["from"] - 1 for row in values[table])
    assert (values["evaluation"], values["ranks"], values["order"], values["dtype"]) == ("loss", 1, "zigzag", "float32")
    shown = capsys.readouterr()
    assert shown.out.startswith("the held-out text, 3 sequences of 200 tokens\n\ntokens seen ")
    assert "\ntokens of the document " in shown.out and "\n128-255 " in shown.out
    assert shown.err == f"longspan: the checkpoint of step 6 in {run}, float32\n"


def test_text_files_are_documents(run: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, count in zip(files, (5, 20), strict=True):
        file.write_text("alpha " * count)
    options = ["--text", *map(str, files), "--seq_len", "150", "--sequences", "9"]
    values = found("loss", run, *options, folder=tmp_path)
    # Documents of 31 and 121 tokens, the ends of both not predicted from; what is behind the 151st token is left out.
    assert values["text"] == f"{files[0]}, {files[1]}" and (values["seq_len"], values["sequences"]) == (150, 1)
    rows = {row["from"]: row["tokens"] for row in values["by_document_length"]}
    assert rows == {16: 30, 64: 119}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss", ["--seq_len", "300"]),
        pytest.param(
            "recall", ["--pairs", "2", "4", "--lengths", "40", "300", "--sequences", "5"], marks=pytest.mark.slow
        ),
        pytest.param("needle", ["--lengths", "200", "300", "--samples", "2"], marks=pytest.mark.slow),
        pytest.param(
            "passkey",
            ["--lengths", "250", "--samples", "2", "--depths", "0", "0.5", "--order", "contiguous"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks_find_the_same(run: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    there = on_ranks(tmp_path, name, run, *options)
    assert there["ranks"] == 2
    check_alike(there, found(name, run, *options, folder=tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_four_ranks_of_torchrun_find_the_same(run: Path, tmp_path: Path, order: str) -> None:
    options = ["--seq_len", "300", "--order", order]
    there = on_ranks(tmp_path, "loss", run, *options, num_ranks=4, torchrun=True)
    assert (there["ranks"], there["order"]) == (4, order)
    check_alike(there, found("loss", run, *options, folder=tmp_path))


def test_recall_of_a_run_that_was_trained_for_it_is_its_validation(
    recall_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = found("recall", recall_run, "--sequences", "3", folder=tmp_path)
    last = metrics(recall_run)[-1]
    (row,) = values["results"]
    assert row["accuracy"] == pytest.approx(last["validation_accuracy"])
    assert row["nats"] == pytest.approx(last["validation_loss"], rel=1e-5)
    assert (row["seq_len"], row["num_pairs"], row["num_queries"], values["vocab_size"]) == (21, 3, 9, 24)
    assert row["chance"] == pytest.approx(1 / 3)
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["tokens", "pairs", "accuracy", "by", "chance", "nats/answer", "queries"]
    assert line.split()[:2] == ["21", "3"] and line.split()[3] == "33.3%"


def test_recall_of_a_run_on_text_takes_its_tokens(run: Path, tmp_path: Path) -> None:
    values = found("recall", run, "--pairs", "2", "5", "--lengths", "60", "40", "--sequences", "2", folder=tmp_path)
    assert values["vocab_size"] == 256
    assert [(row["seq_len"], row["num_pairs"], row["num_queries"]) for row in values["results"]] == [
        *((60, 2, 4), (60, 5, 10)),
        *((40, 2, 4), (40, 5, 10)),
    ]


def test_needles_are_given_out_by_length_and_depth(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lengths", "120", "200", "--depths", "0", "1", "--samples", "1"]
    values = found("needle", run, *options, folder=tmp_path)
    assert [(row["num_tokens"], row["depth"]) for row in values["results"]] == [
        *((120, 0.0), (120, 1.0)),
        *((200, 0.0), (200, 1.0)),
    ]
    assert all(row["log_probability"] < 0 and row["num_samples"] == 1 for row in values["results"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "found" and out[1].split() == ["tokens", "depth", "0", "depth", "1"]
    assert [line.split()[0] for line in out[2:4]] == ["120", "200"] and out[5].startswith("log probability")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("loss", []),
        ("recall", ["--pairs", "2", "4", "--lengths", "40", "--sequences", "2"]),
        ("needle", ["--lengths", "120", "--depths", "0", "1", "--samples", "1"]),
    ],
)
def test_results_are_drawn(run: Path, tmp_path: Path, name: str, options: list[str]) -> None:
    evaluate(name, run, *options, "--plot", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    values = {"a": [math.nan, 1.5], "b": {"c": -math.inf, "d": "nan"}, "e": 3}
    assert _finite(values) == {"a": [None, 1.5], "b": {"c": None, "d": "nan"}, "e": 3}


def test_a_context_beyond_that_of_training_is_warned_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length, warns in (("200", False), ("201", True)):
        evaluate("recall", run, "--lengths", length, "--pairs", "2", "--sequences", "1")
        warning = (
            "longspan: warning: 201 tokens are more than the 200 of a sequence that softmax layers were trained for"
        )
        assert (warning in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("loss", ["--seq_len", "0"], "seq_len has 0; each must be at least 1"),
        ("loss", ["--sequences", "0"], "sequences has 0; each must be at least 1"),
        ("loss", ["--text", "no-such-file"], "text 'no-such-file' cannot be read"),
        ("loss", ["--data", "nowhere"], "nowhere holds no prepared data"),
        ("loss", ["--plot", "loss.xyz"], "plot is 'loss.xyz'; it must end in .png, .svg, .pdf"),
        ("loss", ["--parallel.sp", "0"], "parallel.sp is 0; it must be at least 1"),
        ("loss", ["--json", "nowhere/a.json"], "json 'nowhere/a.json' could not be written"),
        ("loss", ["--checkpoint", "7"], "has no checkpoint of step 7"),
        ("recall", ["--pairs", "0"], "pairs has 0; each must be at least 1"),
        ("recall", ["--pairs", "60", "--lengths", "100"], "a sequence of 100 tokens has no room for 60 pairs"),
        ("recall", ["--pairs", "60", "--lengths", "300", "--vocab_size", "20"], "a vocabulary of 20 words has 9 keys"),
        ("recall", ["--vocab_size", "257"], "vocab_size is 257, and the model has 256 words"),
        ("recall", ["--seed=-1"], "seed has -1; each must be at least 0"),
        ("recall", ["--power", "nan"], "a power of nan leaves fewer places for queries"),
        ("needle", ["--lengths", "0"], "lengths has 0; each must be at least 1"),
        ("needle", ["--lengths", "50"], "lengths has 50, in which there is no room"),
        ("needle", ["--depths", "0.5", "1.5"], "depths has 1.5; each must be from 0 to 1"),
        ("passkey", ["--samples", "0"], "samples has 0; each must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], name: str, options: list[str], message: str
) -> None:
    evaluate(name, run, *options, code=2)
    shown = capsys.readouterr()
    assert message in shown.err and "longspan: error: " in shown.err


@pytest.mark.slow
def test_fewer_tokens_than_ranks_are_refused_by_all(run: Path, tmp_path: Path) -> None:
    arguments = ["eval", "recall", "--run", str(run), "--parallel.sp", "2", "--lengths", "1"]
    done = copied.run(arguments)
    assert done.returncode == 2
    assert b"lengths has 1, fewer tokens than the 2 ranks" in done.stderr


@pytest.mark.parametrize("name", ["loss", "needle", "passkey"])
def test_a_model_of_no_text_is_asked_for_recall_alone(
    recall_run: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    evaluate(name, recall_run, code=2)
    assert "whose tokens are no text. Give a run that was trained on text" in capsys.readouterr().err


def test_another_tokenizer_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has as many tokens as that of the run."""
    prepare_corpus(recipe(write_corpus(tmp_path / "text"), tokenizer="bpe", vocab_size=257), tmp_path / "data")
    evaluate("loss", run, "--data", str(tmp_path / "data"), code=2)
    assert "was trained with another tokenizer than the one that is there now" in capsys.readouterr().err
