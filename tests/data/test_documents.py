"""Documents are read and split the same everywhere; what cannot be read is named."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from longspan.data.documents import Corpus, read_corpus
from longspan.errors import DataError


def read(source: Path | str, max_bytes: int = 10**9, validation_fraction: float = 0.2, seed: int = 0) -> Corpus:
    return read_corpus(str(source), (".txt", ".jsonl"), "text", max_bytes, validation_fraction, seed)


def names(corpus: Corpus) -> tuple[list[str], list[str]]:
    return [d.name for d in corpus.train], [d.name for d in corpus.validation]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    order = list(range(40))
    random.shuffle(order)
    for number in order:
        path = tmp_path / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {number}\n")
    return tmp_path


def test_every_document_is_on_one_side_and_the_order_of_the_file_system_has_no_effect(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    train, validation = names(read(folder))
    assert sorted(train + validation) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert 1 <= len(validation) <= 20
    copy = tmp_path_factory.mktemp("copy")
    for path in sorted(folder.rglob("*.txt"), reverse=True):
        (copy / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        (copy / path.relative_to(folder)).write_text(path.read_text())
    assert names(read(copy)) == (train, validation)


def test_the_split_depends_on_the_seed_and_a_new_document_moves_no_other(folder: Path) -> None:
    train, validation = names(read(folder))
    assert names(read(folder, seed=1)) != (train, validation)
    (folder / "new.txt").write_text("new")
    train_after, validation_after = names(read(folder))
    assert set(train) <= set(train_after)
    assert set(validation) <= set(validation_after)


def test_max_bytes_limits_what_is_read(folder: Path) -> None:
    corpus = read(folder, max_bytes=50)
    size = sum(len(d.text) for d in (*corpus.train, *corpus.validation))
    assert 50 <= size < 60


def test_a_single_file_is_cut_and_its_end_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a" * 80 + "b" * 20)
    corpus = read(tmp_path / "one.txt")
    assert corpus.train[0].text == "a" * 80
    assert corpus.validation[0].text == "b" * 20


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {n}", "id": n}) for n in range(9)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n\n")
    corpus = read(tmp_path / "all.jsonl")
    assert sorted(d.text for d in (*corpus.train, *corpus.validation)) == [f"line {n}" for n in range(9)]


def test_the_standard_library_is_there_and_its_tests_are_left_out() -> None:
    corpus = read("python-stdlib", max_bytes=300_000)
    assert sum(len(d.text) for d in corpus.train) > 100_000
    assert all(name.endswith(".py") and "/test" not in f"/{name}" for name in itertools.chain(*names(corpus)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", "a.jsonl, line 2, is not JSON"),
        ('["text"]', "line 2, has no text under the key 'text'; it has list"),
        ('{"body": "x"}', "it has 'body'. Set data.text_key"),
        ('{"text": 3}', "no text under the key 'text'"),
        ("[" * 100_000, "line 2, is not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + content + "\n")
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        read(tmp_path)


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3"):
        read(tmp_path)


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist. Give a folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no file that ends in .txt, .jsonl"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("x")
    with pytest.raises(DataError, match="too short to be split"):
        read(tmp_path)
