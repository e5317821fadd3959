"""Whatever is in a file that is read, what comes is a value or an error of ours that names the file: never a traceback."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import open_prepared
from longspan.data.recipe import Recipe
from longspan.errors import CheckpointError, ConfigError, DataError, LongspanError
from longspan.train.checkpoint import (
    MANIFEST,
    _manifest,
    newest_checkpoint,
)
from longspan.train.config import Config, from_mapping, read_toml, to_toml
from longspan.train.config_checks import check
from longspan.train.metrics import MetricsFile
from tests.data.corpus import read_corpus
from tests.train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint

JSON_OF_EVERY_TYPE = [
    "null",
    "true",
    "0",
    "-1",
    "1e999",
    "NaN",
    "9" * 30,
    "9" * 5000,
    '""',
    '"\\ud800"',
    '"a\\u0000b"',
    "[]",
    "[null]",
    "[[1]]",
    "{}",
    '{"": {}}',
    "[" * 300 + "]" * 300,
    "[" * 100_000,
]


def damages(content: bytes, seed: int = 0) -> Iterator[bytes]:
    """Contents that a file may have instead of `content`."""
    numbers = random.Random(seed)
    yield b""
    yield from (value.encode() for value in JSON_OF_EVERY_TYPE)
    for length in (1, 7, 64, 4096):
        yield numbers.randbytes(length)
    for _ in range(12):
        yield content[: numbers.randrange(len(content))]
    for _ in range(12):
        damaged = bytearray(content)
        damaged[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        yield bytes(damaged)
    yield content + b"\xff"
    yield b"\xef\xbb\xbf" + content
    yield content.decode("latin-1").encode("utf-16")


def json_damages(value: Any) -> Iterator[str]:
    """JSON in which one value anywhere in `value` is replaced by one of every type, or left out."""
    marker = "\ue000"
    for changed in _marked(value, marker):
        text = json.dumps(changed)
        yield from (text.replace(json.dumps(marker), other) for other in JSON_OF_EVERY_TYPE)


def _marked(value: Any, marker: str) -> Iterator[Any]:
    yield marker
    if isinstance(value, dict):
        for key in value:
            yield {other: entry for other, entry in value.items() if other != key}
            yield from (value | {key: changed} for changed in _marked(value[key], marker))
    elif isinstance(value, list) and value:
        yield from ([changed, *value[1:]] for changed in _marked(value[0], marker))
        yield [*value[:-1], marker]


def is_refused_or_read(
    read: Callable[[], Any], kinds: type[Exception] | tuple[type[Exception], ...], name: str
) -> bool:
    """True if `read` refuses, with an error of one of `kinds` that names the file `name`."""
    try:
        read()
    except LongspanError as error:
        assert isinstance(error, kinds), error
        assert name in str(error)
        # Printed, written into a report, and sent to other ranks.
        json.dumps(str(error)).encode()
        return True
    return False


def count_refused(path: Path, contents: Iterator[bytes | str], read: Callable[[], Any], kinds: Any, name: str) -> int:
    original = path.read_bytes()
    num_refused = 0
    for content in contents:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        num_refused += is_refused_or_read(read, kinds, name)
    path.write_bytes(original)
    read()
    return num_refused


def read_file(path: Path) -> list[str]:
    corpus = read_corpus(str(path), (".txt", ".jsonl"), "text", 10**6, 0.5, 0)
    return [document.text for document in (*corpus.train, *corpus.validation)]


def test_any_text_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("ein Wörtchen, noch ein Wörtchen".encode())
    assert count_refused(path, damages(path.read_bytes()), lambda: read_file(path), DataError, "text.txt") > 5


def test_any_line_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    good = {"text": "first", "n": 1}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"text": "second ä"}) + "\n")
    assert count_refused(path, damages(path.read_bytes()), lambda: read_file(path), DataError, "text.jsonl") > 20
    second = json.dumps({"text": "more"})
    lines = (f"{second}\n{line}\n{second}" for line in json_damages(good))
    assert count_refused(path, lines, lambda: read_file(path), DataError, "text.jsonl, line 2,") > 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "a\ud800b"}', r"line 2, has half a surrogate pair, \ud800, at character 1 of its text"),
        ('{"text": null}', "line 2, has no text under the key 'text', but null; it must be a string. Remove the line"),
        ('{"text": [1]}', "line 2, has no text under the key 'text', but an array; it must be a string"),
        ('{"body": "x"}', "line 2, has no text under the key 'text'; it has 'body'. Set data.text_key"),
        ("{}", "it has no key. Set data.text_key"),
        ("3", "it has int"),
        ("1" * 5000, "line 2, is not JSON"),
    ],
)
def test_a_line_without_a_text_says_what_it_has(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError) as refused:
        read_file(path)
    assert message in str(refused.value)


def test_names_of_files_need_not_be_utf_8(tmp_path: Path) -> None:
    try:
        for number in range(4):
            path = tmp_path.joinpath(f"{number}\udcff.txt")
            path.write_text(f"text {number}")
    except OSError:
        pytest.skip("this file system takes no such names")
    corpus = read_corpus(str(tmp_path), (".txt",), "text", 10**6, 0.5, 0)
    assert len(corpus.train) + len(corpus.validation) == 4


@pytest.mark.parametrize("source", ["x" * 5000, "/proc/self/mem", "/proc/self/mem/x"])
def test_a_source_that_cannot_be_read_is_refused(source: str) -> None:
    with pytest.raises(DataError, match=r"cannot be read|does not exist"):
        read_corpus(source, (".txt",), "text", 10**6, 0.5, 0)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Recipe, Path]:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document number {number}"}) + "\n" for number in range(8)))
    recipe = Recipe((str(text),), (".jsonl",), "text", 10**6, 0.3, "bpe", 270, 0)
    prepare_corpus(recipe, tmp_path / "data")
    return recipe, tmp_path / "data"


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "shard-00-00000.json", "train-00-00000.tokens", "train-00-00000.index", "data.json"]
)
def test_any_prepared_file_is_whole_or_refused(prepared: tuple[Recipe, Path], name: str) -> None:
    recipe, folder = prepared

    def read() -> None:
        prepare_corpus(recipe, folder)
        open_prepared(folder)

    path = folder / name
    content = path.read_bytes()
    assert count_refused(path, damages(content), read, DataError, str(folder)) > 30
    if name in ("shard-00-00000.json", "data.json"):
        assert count_refused(path, json_damages(json.loads(content)), read, DataError, str(folder)) > 100


def test_data_that_cannot_be_written_is_refused(prepared: tuple[Recipe, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (tmp_path / "file", tmp_path / ("x" * 5000)):
        with pytest.raises(DataError, match=r"another data\.folder"):
            prepare_corpus(prepared[0], folder)


def test_any_config_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()), encoding="utf-8")
    lines = [
        f"[{section}]\n{key} = {value}\n"
        for value in [*JSON_OF_EVERY_TYPE, "2020-01-01", "inf", "{}", '"\\ud800"', "9" * 400, "'x'", '["", 1]', "1e999"]
        for section, key in (("train", "steps"), ("optim", "lr"), ("model", "operator"), ("model", "head_dim"))
    ]
    sections = ["data = 3\n", "train = [1]\n", "[train.steps]\nx = 1\n", "[[train]]\nsteps = 1\n", "x = {}\n"]

    def read() -> None:
        check(read_toml(path))

    kinds = (ConfigError,)
    assert count_refused(path, iter([*lines, *sections]), lambda: read_toml(path), kinds, "config.toml") > 60
    assert count_refused(path, damages(path.read_bytes()), read, kinds, "") > 20
    assert count_refused(path, iter(lines), read, kinds, "") > 60


@pytest.mark.parametrize("key", ["data.source", "sample.prompt", "run.dir", "data.suffixes"])
@pytest.mark.parametrize("text", ["caf\udce9", "a\0b"])
def test_text_that_no_file_can_hold_is_refused(key: str, text: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=rf"{key} is "):
        check(from_mapping({section: {name: text}}))


@pytest.mark.parametrize("key", ["train.seed", "train.steps", "parallel.threads", "model.dim", "optim.lr"])
def test_numbers_of_any_size_are_taken_or_refused(key: str) -> None:
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=key):
        check(from_mapping({section: {name: 10**400}}))


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "index-00000.json", "model-00000.safetensors"])
def test_any_checkpoint_is_whole_or_refused(tmp_path: Path, name: str) -> None:
    tensors = {"model": {"w": torch.arange(6.0)}}
    path = save_checkpoint(tmp_path, Checkpoint(3, tensors, {"step": 3}), keep=2)

    def read() -> None:
        load_checkpoint(newest_checkpoint(tmp_path))

    assert count_refused(path / name, damages((path / name).read_bytes()), read, CheckpointError, name) > 40
    if name == "manifest.json":
        values = json.loads((path / name).read_bytes())
        assert count_refused(path / name, json_damages(values), read, CheckpointError, name) > 100


def test_a_checkpoint_that_vouches_for_anything_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(3, {"model": {"w": torch.ones(2)}}, {"step": 3}), keep=2)
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    for text in json_damages(files):
        try:
            damaged: Any = json.loads(text)
            content = _manifest(3, damaged)
        except (ValueError, RecursionError):
            continue
        (path / MANIFEST).write_bytes(content)
        is_refused_or_read(lambda: load_checkpoint(path), CheckpointError, path.name)


@pytest.mark.parametrize("name", ["state.json", "index-00000.json", "model-00000.safetensors"])
def test_what_was_written_under_its_checksum_may_still_be_no_checkpoint(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, Checkpoint(3, {"model": {"w": torch.ones(2)}}, {"step": 3}), keep=2)
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    num_refused = 0
    for content in damages((path / name).read_bytes()):
        (path / name).write_bytes(content)
        entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / MANIFEST).write_bytes(_manifest(3, files | {name: entry}))
        # What an index says wrongly may show in the file that it speaks of.
        named = path.name if name.startswith("index") else name
        num_refused += is_refused_or_read(lambda: load_checkpoint(path), CheckpointError, named)
    assert num_refused > 20


def test_any_metrics_are_read_or_refused(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    good = {"step": 1, "loss": 2.0, "skipped": False}
    for _ in range(3):
        metrics.append(good)

    def read() -> None:
        metrics.cut_after(5)
        plotted = [
            record["step"] + record.get("loss", 0.0) for record in metrics.read() if record.get("loss") is not None
        ]
        assert all(map(math.isfinite, plotted))

    content = metrics.path.read_bytes()
    assert count_refused(metrics.path, damages(content), read, CheckpointError, "metrics.jsonl") > 10
    lines = (f"{line}\n{json.dumps(good)}\n" for line in json_damages(good))
    assert count_refused(metrics.path, lines, read, CheckpointError, "metrics.jsonl, line 1,") > 30
