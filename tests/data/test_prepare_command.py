"""The prepare command as a user meets it, training on what it wrote, and every bad folder and source by its message."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from longspan.cli import main
from longspan.data import workers
from longspan.data.files import with_checksum
from longspan.data.prepared import open_prepared
from longspan.launch import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED
from longspan.train.config import Config, DataConfig
from longspan.train.data import describe_data
from tests.ranks import raised, run_on_ranks
from tests.shared import made_once
from tests.train.tiny import metrics, tiny_config, train_here


def write_text(folder: Path) -> None:
    """Two sources of short documents: letters of the one never occur in the other."""
    numbers = random.Random(0)
    (folder / "files").mkdir()
    for number in range(20):
        (folder / "files" / f"{number}.txt").write_text("".join(numbers.choices("abcd ", k=200)))
    texts = ["".join(numbers.choices("wxyz ", k=50)) for _ in range(200)]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def prepare(folder: Path, *arguments: str) -> int:
    options = ("--tokenizer", "bytes", "--validation-fraction", "0.2")
    return main(["prepare", str(folder / "data"), *options, *arguments])


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sources, and what was prepared of them."""

    def make(folder: Path) -> str:
        write_text(folder)
        assert prepare(folder, "--source", str(folder / "files"), str(folder / "lines.jsonl")) == EXIT_DONE
        return str(folder)

    return Path(made_once(tmp_path_factory, "prepare-command", make))


def test_it_says_what_it_wrote_and_verifies_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    (tmp_path / "files" / "empty.txt").write_text("")
    arguments = ("--source", str(tmp_path / "files"), str(tmp_path / "lines.jsonl"))
    assert prepare(tmp_path, *arguments) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "tokenizing" in shown and "1 documents without text" in shown
    assert f"longspan train --data.prepared {tmp_path / 'data'}" in shown
    assert f"{tmp_path / 'lines.jsonl'}" in shown
    assert prepare(tmp_path, *arguments) == EXIT_DONE
    assert "was prepared before; every byte verified" in capsys.readouterr().out
    path = tmp_path / "data" / "train-01-00000.tokens"
    path.write_bytes(b"\x01\x02" + path.read_bytes()[2:])
    assert prepare(tmp_path, *arguments) == EXIT_REFUSED
    assert "train-01-00000.tokens: token 513 at offset 0 (byte 0) is outside the vocabulary" in capsys.readouterr().err


def test_a_terminal_shows_a_bar_of_the_text_that_is_tokenized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path)
    # What stands for a terminal to rich.
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert prepare(tmp_path, "--source", str(tmp_path / "files")) == EXIT_DONE
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    # 20 files of 200 letters.
    assert re.search(r"tokenizing +━{20} 4\.0/4\.0 kB .*00:00", shown), shown


def test_it_speaks_of_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    lines = str(tmp_path / "lines.jsonl")
    for arguments, message in (
        (("--source",), "--source is empty; it must name at least one source"),
        (("--source", "nowhere"), "--source 'nowhere' does not exist"),
        (("--source", lines, "--text-key", "body"), "it has 'text'. Set --text-key"),
        (("--source", lines, "--workers", "0"), "--workers is 0; it must be at least 1"),
        (
            ("--source", lines, "--validation-fraction", "1"),
            "--validation-fraction is 1.0; it must lie between 0 and 1",
        ),
        (("--source", lines, "--tokenizer", "nowhere.json"), "Give the tokenizer.json of a model"),
        (("--source", lines, "--tokenizer", "bpe", "--vocab-size", "3"), "--vocab-size 3 has no room for 256 bytes"),
    ):
        assert prepare(tmp_path, *arguments) == EXIT_REFUSED
        assert message in capsys.readouterr().err


def test_a_stop_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    with mock.patch.object(workers, "make_shard", side_effect=KeyboardInterrupt):
        assert prepare(tmp_path, "--source", str(tmp_path / "files")) == EXIT_STOPPED
    assert "The same command goes on" in capsys.readouterr().out
    assert prepare(tmp_path, "--source", str(tmp_path / "files")) == EXIT_DONE


def config_of(prepared: Path, run: Path, weights: tuple[float, ...] = (), **values: Any) -> Config:
    """A tiny run on a prepared folder."""
    config = tiny_config(prepared, run, train__steps=2, checkpoint__every=2, validation__sequences=2, **values)
    data = DataConfig(prepared=str(prepared / "data"), weights=weights)
    return dataclasses.replace(config, data=data)


def test_a_run_trains_on_a_prepared_mixture_on_any_ranks(prepared: Path, tmp_path: Path) -> None:
    found = []
    for num_ranks in (1, 2):
        run = tmp_path / str(num_ranks)
        config = config_of(prepared, run, (1.0, 4.0), parallel__sp=num_ranks)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_tokens=61 * 20))
        assert run_on_ranks(num_ranks, train_here, config) == [EXIT_DONE] * num_ranks
        found.append(metrics(run, "step", "loss", "valid_tokens", "validation_loss"))
        seen = json.loads((run / "summary.json").read_text())["tokens_by_document_length"]
        # Documents of 51 tokens, and of 201.
        assert seen.keys() == {"32-63", "64-127", "128-255"} and sum(seen.values()) == 2 * 1220
        assert 2 * 1220 * 0.6 < seen["32-63"] < 2 * 1220 * 0.95
    assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in zip(*found, strict=True))


def test_a_run_says_how_many_documents_are_longer_than_a_sequence(prepared: Path, tmp_path: Path) -> None:
    data = open_prepared(prepared / "data")
    # Files of 200 letters and an end; lines of 50.
    num_files = data.train_by_source[0].num_documents
    assert 10 < num_files < 20
    said = describe_data(config_of(prepared, tmp_path / "run"), data)
    assert said.endswith(f"and where the {num_files} that are longer than 61 tokens are cut")
    config = config_of(prepared, tmp_path / "run", train__seq_len=201, train__batch_tokens=201)
    assert describe_data(config, data).endswith("memory starts anew with each document")


def damaged_tokens(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "data" / "train-00-00000.tokens"
        path.write_bytes(change(path.read_bytes()))

    return damage


def another_tokenizer(folder: Path) -> None:
    (folder / "data" / "tokenizer.json").write_text('{"kind": "other"}')


def another_version(folder: Path) -> None:
    path = folder / "data" / "data.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    path.write_bytes(with_checksum(body | {"format": "longspan-tokens-9"}))


def another_dtype(folder: Path) -> None:
    tokens = np.fromfile(folder / "data" / "train-00-00000.tokens", "<u2")
    tokens.astype("<u4").tofile(folder / "data" / "train-00-00000.tokens")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged_tokens(lambda content: content[:-1]), "is no whole number of uint16 tokens of 2 bytes"),
        (damaged_tokens(lambda content: content[:-2]), "were written: the file was cut off, or its dtype is another"),
        (damaged_tokens(lambda content: content[:8] + b"\x09\x09" + content[10:]), "token 2313 at offset 4 (byte 8)"),
        (damaged_tokens(lambda content: content[:8] + b"zz"[:1] + content[9:]), "the SHA-256 of its bytes 0 to"),
        (another_dtype, "were written: the file was cut off, or its dtype is another"),
        (another_tokenizer, "tokenizer.json is not"),
        (another_version, "another version of longspan (format 'longspan-tokens-9')"),
        (lambda folder: (folder / "data" / "data.json").unlink(), "holds no prepared data: it has no data.json"),
        (lambda folder: (folder / "data" / "train-00-00000.index").unlink(), "train-00-00000.index cannot be read"),
    ],
    ids=["odd", "cut", "token", "changed", "dtype", "tokenizer", "version", "unfinished", "index"],
)
def test_prepared_data_that_does_not_fit_is_refused_on_every_rank(
    prepared: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(prepared / "data", tmp_path / "data")
    damage(tmp_path)
    for kind, text in run_on_ranks(2, raised, train_here, config_of(tmp_path, tmp_path / "run")):
        assert kind == "DataError" and message in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def write_latin(folder: Path) -> None:
    (folder / "0.txt").write_bytes(b"caf\xe9")


def write_parquet_without_text(folder: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"]}), folder / "0.parquet")


def write_little(folder: Path) -> None:
    for name in range(4):
        (folder / f"{name}.txt").write_text("little")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_latin, "0.txt is not UTF-8: byte 0xe9 at offset 3"),
        (write_parquet_without_text, "0.parquet has no column 'text' for the text; it has 'body'. Set data.text_key"),
        (write_little, "fewer than one global batch of 6 sequences of 61 tokens and the one that follows (367)"),
        (lambda folder: (folder / "0.txt").write_text(""), "holds no text: its documents are empty"),
        (lambda folder: None, "has no file that ends in"),
    ],
    ids=["latin", "parquet", "little", "empty", "nothing"],
)
def test_text_that_cannot_be_trained_on_is_refused_on_every_rank(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    (tmp_path / "text").mkdir()
    write(tmp_path / "text")
    for kind, text in run_on_ranks(2, raised, train_here, tiny_config(tmp_path / "text", tmp_path / "run")):
        assert kind == "DataError" and message in text


def test_data_that_changed_since_the_checkpoint_is_refused_on_every_rank(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "data", tmp_path / "data")
    assert run_on_ranks(2, train_here, config_of(tmp_path, tmp_path / "run")) == [EXIT_DONE] * 2
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(prepared / "files", tmp_path / "files")
    (tmp_path / "files" / "3.txt").write_text("abcd " * 40)
    assert prepare(tmp_path, "--source", str(tmp_path / "files"), str(prepared / "lines.jsonl")) == EXIT_DONE
    config = config_of(tmp_path, tmp_path / "run")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3))
    for kind, text in run_on_ranks(2, raised, train_here, longer, True):
        assert kind == "DataError"
        assert "is not what the checkpoint of step 2 was trained on: train changed" in text
