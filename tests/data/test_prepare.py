"""A corpus is prepared once: the same bytes after a kill, by any number of processes, without holding it in memory; or refused."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from longspan.data import files, shards, workers
from longspan.data.files import with_checksum
from longspan.data.hub import find_parts, open_rows
from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import PreparedData, open_prepared
from longspan.data.recipe import Recipe
from longspan.data.tokens import TokenStream
from longspan.errors import DataError
from tests import copied
from tests.data.shards import recipe
from tests.data.test_tokenizer import other_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty files of which one has no text, and one of lines."""
    folder = tmp_path / "text"
    folder.mkdir()
    numbers = random.Random(0)
    for name in range(30):
        words = " ".join(numbers.choices(["alpha", "beta", "gamma", "délta"], k=50))
        (folder / f"{name:02d}.txt").write_text(words if name != 7 else "")
    lines = (json.dumps({"text": f"line {n} " * 9}) for n in range(40))
    (folder / "lines.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def documents(stream: TokenStream, data: PreparedData) -> list[str]:
    """The texts of a stream."""
    bounds = stream.bounds_of_documents(0, stream.num_tokens).tolist()
    tokens = stream.read(0, stream.num_tokens).tolist()
    assert all(tokens[stop - 1] == data.tokenizer.end_of_document for stop in bounds[1:])
    return [data.tokenizer.decode(tokens[a : b - 1]) for a, b in itertools.pairwise(bounds)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def workers_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not load everything anew, which takes each some seconds; `test_new_processes_make_the_same_bytes` has new ones."""
    monkeypatch.setattr(workers, "multiprocessing", copied.Multiprocessing)


def test_every_document_is_there_once_in_the_order_of_names(text: Path, tmp_path: Path) -> None:
    for changes in ({}, {"tokenizer": "bpe"}, {"shard_bytes": 700}):
        folder = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        prepare_corpus(recipe(text, **changes), folder)
        data = open_prepared(folder)
        train, validation = documents(data.train, data), documents(data.validation, data)
        names = sorted(path.name for path in text.glob("*.txt") if path.read_text())
        written = [(text / name).read_text() for name in names]
        written += [json.loads(line)["text"] for line in (text / "lines.jsonl").read_text().splitlines()]
        assert sorted(train + validation) == sorted(written)
        assert [text for text in written if text in train] == train
        assert [text for text in written if text in validation] == validation
        assert data.num_empty == 1 and len(validation) > 5
        num_bytes = sum(len(text.encode()) for text in written)
        assert data.train.num_text_bytes + data.validation.num_text_bytes == num_bytes
        tokens = data.train.read(0, data.train.num_tokens)
        assert data.tokenizer.token_bytes[tokens].sum() == data.train.num_text_bytes
        assert data.token_counts().sum() == data.train.num_tokens


def test_prepared_data_is_not_prepared_twice(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe(text), folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare_corpus(recipe(text), folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


@pytest.mark.usefixtures("workers_are_copies")
def test_processes_make_the_same_bytes_as_one(text: Path, tmp_path: Path) -> None:
    told: list[int] = []

    class Told:
        def begin(self, what: str, total: int | None) -> None:
            if what == "tokenizing":
                assert total is not None and total > 10_000

        def advance(self, num_bytes: int) -> None:
            told.append(num_bytes)

    prepare_corpus(recipe(text, tokenizer="bpe", shard_bytes=2000), tmp_path / "one")
    prepare_corpus(recipe(text, tokenizer="bpe", shard_bytes=2000), tmp_path / "two", 2, Told())
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    data = open_prepared(tmp_path / "one")
    assert len(data.train.shards) > 3
    # Bytes, and not characters, of which some are two.
    assert sum(told) == data.train.num_text_bytes + data.validation.num_text_bytes


@pytest.mark.slow
def test_new_processes_make_the_same_bytes(text: Path, tmp_path: Path) -> None:
    prepare_corpus(recipe(text, shard_bytes=2000), tmp_path / "one")
    prepare_corpus(recipe(text, shard_bytes=2000), tmp_path / "two", 2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.usefixtures("workers_are_copies")
def test_what_a_worker_cannot_read_is_said_in_the_first_process(text: Path, tmp_path: Path) -> None:
    (text / "29.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"29.txt is not UTF-8: byte 0xe9 at offset 3"):
        prepare_corpus(recipe(text, shard_bytes=2000), tmp_path / "data", 2)
    (text / "29.txt").write_bytes(b"good")
    prepare_corpus(recipe(text, shard_bytes=2000), tmp_path / "data")
    prepare_corpus(recipe(text, shard_bytes=2000), tmp_path / "again")
    assert contents(tmp_path / "data") == contents(tmp_path / "again")


def in_a_child(function: Callable[[], None]) -> int:
    """Call a function in a forked process; what it exits with, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def prepare_and_call(instant: Callable[[int], object], recipe: Recipe, folder: Path) -> None:
    """Prepare, and call with its number before each write, sync, rename or removal."""
    count = 0

    def counted(original: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal count
            count += 1
            instant(count)
            return original(*arguments, **keywords)

        return call

    with (
        mock.patch.object(files.os, "fsync", counted(os.fsync)),
        mock.patch.object(files.Path, "replace", counted(Path.replace)),
        mock.patch.object(files.Path, "unlink", counted(Path.unlink)),
        mock.patch.object(shards, "write_whole", counted(shards.write_whole)),
        mock.patch.object(shards.SplitWriter, "append", counted(shards.SplitWriter.append)),
    ):
        prepare_corpus(recipe, folder)


def few_files(text: Path) -> Recipe:
    """Of so few files that each instant of preparing them can be looked at."""
    for path in sorted(text.glob("*.txt"))[4:]:
        path.unlink()
    lines = (text / "lines.jsonl").read_text().splitlines()[:8]
    (text / "lines.jsonl").write_text("\n".join(lines))
    return recipe(text, shard_bytes=700)


def killed_at(instant: int, wanted: Recipe, folder: Path) -> bool:
    """Prepare in a process that is killed before its `instant`-th write, sync, rename or removal; whether it came to that."""

    def kill(count: int) -> None:
        if count == instant:
            os.kill(os.getpid(), signal.SIGKILL)

    code = in_a_child(lambda: prepare_and_call(kill, wanted, folder))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def goes_on_from(folder: Path, wanted: Recipe, expected: dict[str, bytes]) -> int:
    """Prepare what is left in a folder to its end; how many shards were kept, which are not made again."""
    descriptions = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    if not (folder / "data.json").exists():
        with pytest.raises(DataError, match=r"holds no prepared data: it has no data.json"):
            open_prepared(folder)
    prepare_corpus(wanted, folder)
    assert contents(folder) == expected
    assert {path: path.stat().st_mtime_ns for path in descriptions} == descriptions
    return len(descriptions)


@pytest.mark.slow
def test_a_preparation_that_was_killed_at_any_instant_goes_on_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    wanted = few_files(text)
    prepare_corpus(wanted, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    instant, num_kept = 1, 0
    while killed_at(instant, wanted, tmp_path / "data"):
        num_kept += goes_on_from(tmp_path / "data", wanted, expected)
        shutil.rmtree(tmp_path / "data")
        instant += 1
    assert instant > 40 and num_kept > 20
    assert contents(tmp_path / "data") == expected


def test_what_is_left_of_a_preparation_at_any_instant_goes_on_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    """What a process that is killed leaves is what others see of its files, which one process shows for all instants."""
    wanted = few_files(text)
    prepare_corpus(wanted, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    left = tmp_path / "left"
    prepare_and_call(lambda n: shutil.copytree(tmp_path / "data", left / f"{n:03d}"), wanted, tmp_path / "data")
    assert contents(tmp_path / "data") == expected
    assert killed_at(23, wanted, tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(left / "023")
    instants = [tmp_path / "killed", *sorted(left.iterdir())]
    with mock.patch.object(files.os, "fsync"):
        num_kept = sum(goes_on_from(folder, wanted, expected) for folder in instants)
    assert len(instants) > 40 and num_kept > 20


def test_a_shard_that_was_done_and_then_damaged_is_made_again(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe(text, shard_bytes=2000), folder)
    expected = contents(folder)
    for name in ("train-00-00001.tokens", "validation-00-00000.index", "train-00-00002.counts", "shard-00-00000.json"):
        (folder / "data.json").unlink()
        content = bytearray((folder / name).read_bytes())
        content[3] ^= 1
        (folder / name).write_bytes(content)
        (folder / "train-00-00099.tokens").write_bytes(b"of another recipe")
        prepare_corpus(recipe(text, shard_bytes=2000), folder)
        assert contents(folder) == expected


def test_a_file_that_changed_since_is_read_again(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe(text, shard_bytes=2000), folder)
    (folder / "data.json").unlink()
    changed = (text / "03.txt").read_text().replace("a", "o")
    (text / "03.txt").write_text(changed)
    prepare_corpus(recipe(text, shard_bytes=2000), folder)
    data = open_prepared(folder)
    assert changed in documents(data.train, data) + documents(data.validation, data)


def test_several_sources_are_kept_apart(text: Path, tmp_path: Path) -> None:
    for name in ("poems", "letters"):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.txt").write_text(f"{name} {number}")
    prepare_corpus(recipe(tmp_path / "poems", tmp_path / "letters"), tmp_path / "data")
    data = open_prepared(tmp_path / "data")
    assert data.sources == (str(tmp_path / "poems"), str(tmp_path / "letters"))
    for stream, name in zip(data.train_by_source, ("poems", "letters"), strict=True):
        assert {text.split()[0] for text in documents(stream, data)} == {name}
    assert data.train.num_tokens == sum(stream.num_tokens for stream in data.train_by_source)
    assert {text.split()[0] for text in documents(data.validation, data)} == {"poems", "letters"}
    counts = data.token_counts((1.0, 3.0)) / data.train.num_tokens
    # Each of the letters' tokens counts three times as much: an l is in no poem.
    own = data.train_by_source[1].token_counts(257) / data.train_by_source[1].num_tokens
    assert counts[ord("l")] == pytest.approx(0.75 * own[ord("l")]) and counts.sum() == pytest.approx(1.0)


def test_a_tokenizer_that_exists_is_taken(text: Path, tmp_path: Path) -> None:
    path = other_tokenizer(tmp_path / "tokenizer.json")
    prepare_corpus(recipe(text, tokenizer=str(path)), tmp_path / "data")
    data = open_prepared(tmp_path / "data")
    assert len(documents(data.train, data)) + len(documents(data.validation, data)) == 69
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer: .*Give the tokenizer.json of a model"):
        prepare_corpus(recipe(text, tokenizer=str(path)), tmp_path / "other")


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("hub")
    rows = [{"text": f"row {n}" if n % 5 else "", "id": n} for n in range(30)]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"), num_shards=3)
    (folder / "files").mkdir()
    for part in range(2):
        lines = "".join(json.dumps(row) + "\n" for row in rows[part * 15 : part * 15 + 15])
        (folder / "files" / f"train-{part}.jsonl").write_text(lines)
    return folder


@pytest.mark.parametrize(("name", "num_shards"), [("saved", 3), ("files?split=train", 2)])
def test_a_hugging_face_data_set_is_streamed(hub_folder: Path, tmp_path: Path, name: str, num_shards: int) -> None:
    source = f"hf:{hub_folder}/{name}"
    prepare_corpus(recipe(source), tmp_path / "data")
    data = open_prepared(tmp_path / "data")
    rows = documents(data.train, data) + documents(data.validation, data)
    assert sorted(rows) == sorted(f"row {n}" for n in range(30) if n % 5)
    assert data.num_empty == 6 and len(list((tmp_path / "data").glob("shard-*.json"))) == num_shards
    with pytest.raises(DataError, match=r"has no column 'body' for the text; it has .*'id'"):
        prepare_corpus(recipe(source, text_key="body"), tmp_path / "other")
    with pytest.raises(DataError, match=r"row 0 of part 0 has int in the column 'id'; it must be a string"):
        prepare_corpus(recipe(source, text_key="id"), tmp_path / "other")
    with pytest.raises(DataError, match=r"could not be opened: .*Check the name, config=... and split=..."):
        prepare_corpus(
            recipe(f"hf:{hub_folder}/saved?split=x&config=y".replace("saved", "nowhere")), tmp_path / "other"
        )
    with pytest.raises(DataError, match=r"lies inside the data set 'hf:.*Give another folder, outside it"):
        prepare_corpus(recipe(source), hub_folder / name.split("?")[0] / "prepared")
    with pytest.raises(DataError, match=r"has the option 'color', which is not one of config, split, revision"):
        prepare_corpus(recipe(f"hf:{hub_folder}/saved?color=red"), tmp_path / "other")


@pytest.mark.parametrize("name", ["saved", "files"])
def test_a_folder_that_changes_while_it_is_prepared_is_refused(hub_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(hub_folder / name, tmp_path / name)
    source = f"hf:{tmp_path / name}"
    num_parts, version = find_parts(source)
    assert list(open_rows(source, "text", 1, num_parts, version))
    os.utime(max((tmp_path / name).iterdir()), ns=(0, 0))
    with pytest.raises(
        DataError, match=r"has changed since the preparation began: .*Run the same command again once it"
    ):
        list(open_rows(source, "text", 1, num_parts, version))
    assert find_parts(source)[1] != version


def test_data_prepared_otherwise_is_refused(text: Path, tmp_path: Path) -> None:
    prepare_corpus(recipe(text), tmp_path / "data")
    with pytest.raises(DataError, match="prepared otherwise: text_key was 'text', now 'body'"):
        prepare_corpus(recipe(text, text_key="body"), tmp_path / "data")


def test_a_folder_prepared_by_another_version_is_refused_in_words(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe(text), folder)
    body = json.loads((folder / "data.json").read_text())
    del body["sha256"]
    (folder / "data.json").write_bytes(with_checksum(body | {"format": "longspan-tokens-3"}))
    for attempt in (lambda: open_prepared(folder), lambda: prepare_corpus(recipe(text), folder)):
        with pytest.raises(
            DataError, match=r"another version of longspan \(format 'longspan-tokens-3'\); this version reads"
        ):
            attempt()
    (folder / "data.json").unlink()
    (folder / "recipe.json").write_text("{}")
    for attempt in (lambda: open_prepared(folder), lambda: prepare_corpus(recipe(text), folder)):
        with pytest.raises(DataError, match=r"another version of longspan, .*format longspan-tokens-1"):
            attempt()


@pytest.mark.parametrize("name", ["data.json", "shard-00-00000.json"])
@pytest.mark.parametrize("key", ["format", "vocab_size", "tokenizer_sha256", "sources", "splits"])
def test_what_vouches_for_anything_is_refused(text: Path, tmp_path: Path, name: str, key: str) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe(text), folder)
    body = json.loads((folder / name).read_text())
    del body["sha256"]
    if key not in body:
        pytest.skip("not in this file")
    values: tuple[Any, ...] = (None, 3, "x", [], {}, [{}], {"train": {}})
    for value in values:
        (folder / name).write_bytes(with_checksum(body | {key: value}))
        with pytest.raises(DataError, match=r"Prepare the data again|another version"):
            open_prepared(folder)


def test_another_tokenizer_than_at_preparation_is_refused(text: Path, tmp_path: Path) -> None:
    prepare_corpus(recipe(text, tokenizer="bpe"), tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").write_text('{"kind": "bytes"}')
    with pytest.raises(
        DataError, match=r"tokenizer.json is not the tokenizer that the data of .*data.json was prepared"
    ):
        open_prepared(tmp_path / "data")


def test_blocks_may_be_verified_as_they_are_used(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe(text), folder)
    path = folder / "train-00-00000.tokens"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00-00000.tokens is not what was prepared"):
        open_prepared(folder)
    data = open_prepared(folder, verify=False)
    with pytest.raises(DataError, match=r"train-00-00000.tokens is not what was prepared"):
        data.train.read(0, 10)
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="which is no whole number of uint16 tokens"):
        open_prepared(folder, verify=False)


def test_two_processes_do_not_prepare_one_folder(text: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    descriptor = os.open(tmp_path / "data", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another process is preparing .* now. Wait until it is done"):
            prepare_corpus(recipe(text), tmp_path / "data")
    finally:
        os.close(descriptor)
    prepare_corpus(recipe(text), tmp_path / "data")


def test_a_disk_that_fills_keeps_what_is_done(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    append, count = shards.SplitWriter.append, 0

    def full(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(*arguments)

    with (
        mock.patch.object(shards.SplitWriter, "append", full),
        pytest.raises(
            DataError, match=r"could not be written to .*data: .*No space left on device. Make room .* goes on"
        ),
    ):
        prepare_corpus(recipe(text, shard_bytes=2000), folder)
    done = contents(folder)
    assert "shard-00-00001.json" in done and "data.json" not in done
    assert not any(name.startswith(".") for name in done)
    prepare_corpus(recipe(text, shard_bytes=2000), folder)
    prepare_corpus(recipe(text, shard_bytes=2000), tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")
    assert all(contents(folder)[name] == content for name, content in done.items())


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _grown_by(function: Callable[[], object]) -> int:
    # The peak begins anew here.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    kept = function()
    grown = _resident("VmHWM") - before
    del kept
    return grown


def _measure(source: Path, folder: Path, result: Path) -> None:
    """In a process of its own, where nothing else has been held before."""
    by_preparing = _grown_by(lambda: prepare_corpus(recipe(source, validation_fraction=0.01), folder))
    result.write_text(f"{by_preparing} {_grown_by(source.read_bytes)}")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures by Linux's /proc")
@pytest.mark.parametrize("kind", ["jsonl", pytest.param("txt", marks=pytest.mark.slow)])
def test_the_corpus_is_never_held_in_memory(tmp_path: Path, kind: str) -> None:
    line = " ".join(random.Random(0).choices(["alpha", "beta", "gamma", "delta"], k=4000))
    size, bound = 56 * 2**20, 40 * 2**20
    path = tmp_path / f"corpus.{kind}"
    with path.open("w") as file:
        while file.tell() < size:
            file.write(json.dumps({"text": line}) + "\n" if kind == "jsonl" else line + "\n")
    assert copied.call(_measure, path, tmp_path / "data", tmp_path / "measured") == 0
    grown, by_holding_it = map(int, (tmp_path / "measured").read_text().split())
    assert grown < bound < size <= by_holding_it
    data = open_prepared(tmp_path / "data", verify=False)
    assert data.train.num_text_bytes + data.validation.num_text_bytes > 0.99 * size
