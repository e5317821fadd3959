"""Documents are read and split the same everywhere; what cannot be read is named."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from longspan.data import reading
from longspan.errors import DataError
from tests.data.corpus import Corpus, read_corpus


def read(
    source: Path | str,
    max_bytes: int | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    shard_bytes: int = 10**9,
) -> Corpus:
    suffixes = (".txt", ".jsonl", ".parquet")
    return read_corpus(str(source), suffixes, "text", max_bytes, validation_fraction, seed, shard_bytes)


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in (*corpus.train, *corpus.validation)]


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
    with pytest.raises(DataError, match=r"has no file that ends in .txt, .jsonl, .parquet"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path)
    (tmp_path / "empty.txt").write_text("x")
    with pytest.raises(DataError, match="too short to be split"):
        read(tmp_path)


def test_empty_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": "c"}\n{"text": ""}\n')
    corpus = read(tmp_path)
    assert (sorted(texts(corpus)), corpus.num_empty) == (["b", "c"], 3)


@pytest.mark.parametrize("shard_bytes", [1, 20, 33, 100, 10**6])
def test_a_file_of_lines_is_the_same_however_it_is_divided(tmp_path: Path, shard_bytes: int) -> None:
    lines = [json.dumps({"text": "ä" * n}, ensure_ascii=n % 2 == 0) for n in range(30)]
    (tmp_path / "all.jsonl").write_text("\n".join([*lines[:10], "", *lines[10:]]))
    whole, divided = read(tmp_path), read(tmp_path, shard_bytes=shard_bytes)
    assert (divided.train, divided.validation) == (whole.train, whole.validation)
    assert len(texts(whole)) == 29 and whole.num_empty == 1
    assert divided.num_portions == max(1, -(-(tmp_path / "all.jsonl").stat().st_size // shard_bytes))


def test_a_bad_line_of_a_later_part_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 9 + "no\n" + '{"text": "fine"}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 10, is not JSON"):
        read(tmp_path, shard_bytes=30)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' * 9 + b'{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=r"a.jsonl is not UTF-8: byte 0xe9 at offset 163"):
        read(tmp_path, shard_bytes=30)


def test_max_bytes_reads_the_beginning_of_a_long_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(100)))
    corpus = read(tmp_path, max_bytes=200)
    assert {f"text {n}" for n in range(8)} <= set(texts(corpus)) and len(texts(corpus)) <= 12


@pytest.mark.parametrize("text", ["line of text\n" * 40, "no line end äöü€😀" * 30, "ä" * 257, "x" * 64, "y" * 65])
def test_long_texts_come_in_pieces_that_make_them_up(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    (tmp_path / "one.txt").write_text(text)
    (tmp_path / "two.txt").write_text(text + "!")
    (tmp_path / "three.jsonl").write_text(json.dumps({"text": text + "?"}) + "\n")
    corpus = read(tmp_path)
    assert sorted(texts(corpus)) == sorted([text, text + "!", text + "?"])
    (item,) = reading_items(tmp_path / "one.txt")
    pieces = [piece for document in reading.read_documents(item, "text") for piece in document.pieces]
    assert all(len(piece.encode()) <= 64 for piece in pieces)
    assert len(pieces) == 1 or len(text.encode()) > 64
    if "\n" in text:
        assert all(piece.endswith("\n") for piece in pieces)


def reading_items(path: Path) -> list[reading.Item]:
    status = path.stat()
    return [reading.Item("text", str(path), path.name, status.st_size, status.st_mtime_ns)]


def test_a_long_single_document_is_cut_near_the_share_that_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    text = "".join(f"line {n}\n" for n in range(100))
    for fraction in (0.02, 0.2, 0.5, 0.97):
        (tmp_path / "one.txt").write_text(text)
        corpus = read(tmp_path, validation_fraction=fraction)
        (train,), (validation,) = corpus.train, corpus.validation
        assert train.text + validation.text == text
        assert abs(len(validation.text) / len(text) - fraction) < 0.01


def test_a_byte_in_a_later_piece_that_is_not_utf8_is_named_with_its_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    (tmp_path / "latin.txt").write_bytes(b"x\n" * 100 + b"caf\xe9")
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(DataError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 203"):
        read(tmp_path)


def write_parquet(path: Path, row_groups: list[list[str | None]], column: str = "text") -> None:
    table = pyarrow.table({"id": list(range(sum(map(len, row_groups)))), column: [t for g in row_groups for t in g]})
    with parquet.ParquetWriter(path, table.schema) as writer:
        start = 0
        for group in row_groups:
            writer.write_table(table.slice(start, len(group)))
            start += len(group)


def test_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    groups: list[list[str | None]] = [[f"text {n} ä" for n in range(7)], ["seven", None, ""], ["eight"]]
    write_parquet(tmp_path / "a.parquet", groups)
    corpus = read(tmp_path)
    assert sorted(texts(corpus)) == sorted(text for group in groups for text in group if text)
    assert corpus.num_empty == 2
    assert read(tmp_path, shard_bytes=1).num_portions == 3
    for shard_bytes in (1, 100):
        divided = read(tmp_path, shard_bytes=shard_bytes)
        assert (divided.train, divided.validation) == (corpus.train, corpus.validation)
    assert 1 < len(texts(read(tmp_path, max_bytes=40))) < 6


def test_parquet_without_a_column_of_text_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [["x"]], column="body")
    with pytest.raises(DataError, match=r"a.parquet has no column 'text' for the text; it has 'id', 'body'"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"a.parquet: the column 'id' holds int64; text is a column of strings"):
        read_corpus(str(tmp_path), (".parquet",), "id", None, 0.2, 0)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and something else")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as a Parquet file"):
        read(tmp_path)


def test_a_file_that_changes_while_it_is_prepared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (item,) = reading_items(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("another text")
    with pytest.raises(DataError, match=r"a.txt was changed while it was prepared: it had 4 bytes and has 12"):
        list(reading.read_documents(item, "text"))
