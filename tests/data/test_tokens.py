"""A token file is what was prepared, or it is refused with the place named."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from longspan.data.prepare import Recipe, open_prepared, prepare_corpus
from longspan.data.tokens import open_token_file, sidecar_path, write_token_file
from longspan.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "train.bin"
    write_token_file(path, [[1, 2, 3], [4], [5, 299]], 300, 17, "abc")
    return path


def change(path: Path, **values: object) -> None:
    sidecar = sidecar_path(path)
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | values))


def test_what_is_written_is_read(path: Path) -> None:
    file = open_token_file(path)
    assert file.tokens.tolist() == [1, 2, 3, 4, 5, 299]
    assert file.info.documents == (0, 3, 4, 6)
    assert (file.info.dtype, file.info.num_text_bytes, file.info.tokenizer_sha256) == ("uint16", 17, "abc")
    assert path.read_bytes() == np.array([1, 2, 3, 4, 5, 299], "<u2").tobytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.bin", "train.json"]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    write_token_file(path, [[70_000, 1]], 70_001, 2, "abc")
    assert open_token_file(path).tokens.tolist() == [70_000, 1]
    assert path.stat().st_size == 8


def test_a_cut_file_is_refused(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="has 11 bytes, which is no whole number of uint16 tokens"):
        open_token_file(path)
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"holds 5 tokens of uint16; train.json says 6"):
        open_token_file(path)


def test_another_dtype_is_refused(path: Path) -> None:
    change(path, dtype="uint32")
    with pytest.raises(DataError, match=r"holds 3 tokens of uint32; train.json says 6: .* its dtype is another"):
        open_token_file(path)
    change(path, dtype="float32")
    with pytest.raises(DataError, match="dtype 'float32' is not one of uint16, uint32"):
        open_token_file(path)


def test_a_token_outside_the_vocabulary_is_named_with_its_offset(path: Path) -> None:
    tokens = np.fromfile(path, "<u2")
    tokens[4] = 300
    tokens.tofile(path)
    with pytest.raises(DataError, match=r"token 300 at offset 4 \(byte 8\) is outside the vocabulary of 300"):
        open_token_file(path)


def test_any_flipped_bit_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"train.bin"):
            open_token_file(path)


def test_missing_and_foreign_files_are_refused(path: Path) -> None:
    path.unlink()
    with pytest.raises(DataError, match=r"train.bin is missing, though train.json describes it"):
        open_token_file(path)
    sidecar_path(path).write_text('{"format": "other"}')
    with pytest.raises(DataError, match=r"train.json does not describe a token file"):
        open_token_file(path)
    sidecar_path(path).unlink()
    with pytest.raises(DataError, match=r"train.json cannot be read"):
        open_token_file(path)


RECIPE = Recipe("", (".txt",), "text", 10**9, 0.2, "bpe", 280, 0)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text"
    text.mkdir()
    numbers = random.Random(0)
    for name in range(10):
        (text / f"{name}.txt").write_text("".join(numbers.choices("abcd ", k=500)))
    return Recipe(**(vars(RECIPE) | {"source": str(text)}))


def test_prepared_data_opens_and_is_not_prepared_twice(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    prepare_corpus(recipe, folder)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    prepare_corpus(recipe, folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    data = open_prepared(folder)
    ends = [stop - 1 for stop in data.train.info.documents[1:]]
    assert (data.train.tokens[ends] == data.tokenizer.end_of_document).all()
    num_bytes = data.train.info.num_text_bytes + data.validation.info.num_text_bytes
    assert num_bytes == 5000
    assert data.tokenizer.token_bytes[data.train.tokens].sum() == data.train.info.num_text_bytes
    assert data.train.info.vocab_size <= 280


def test_preparing_twice_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    prepare_corpus(recipe, tmp_path / "one")
    prepare_corpus(recipe, tmp_path / "two")
    assert open_prepared(tmp_path / "one").fingerprint == open_prepared(tmp_path / "two").fingerprint


def test_data_prepared_otherwise_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    prepare_corpus(recipe, tmp_path / "data")
    other = Recipe(**(vars(recipe) | {"vocab_size": 270}))
    with pytest.raises(DataError, match="prepared otherwise: vocab_size was 280, now 270"):
        prepare_corpus(other, tmp_path / "data")


def test_another_tokenizer_than_at_preparation_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    prepare_corpus(recipe, tmp_path / "data")
    (tmp_path / "data" / "tokenizer.json").write_text('{"kind": "bytes"}')
    with pytest.raises(DataError, match=r"tokenizer.json is not the tokenizer that train.bin was prepared with"):
        open_prepared(tmp_path / "data")


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    prepare_corpus(recipe, tmp_path / "data")
    change(tmp_path / "data" / "train.bin", vocab_size=1000)
    with pytest.raises(DataError, match="was prepared for a vocabulary of 1000; the tokenizer has"):
        open_prepared(tmp_path / "data")


def test_a_preparation_that_was_cut_off_is_made_again(recipe: Recipe, tmp_path: Path) -> None:
    prepare_corpus(recipe, tmp_path / "data")
    expected = open_prepared(tmp_path / "data").fingerprint
    (tmp_path / "data" / "recipe.json").unlink()
    (tmp_path / "data" / "train.bin").write_bytes(b"half")
    prepare_corpus(recipe, tmp_path / "data")
    assert open_prepared(tmp_path / "data").fingerprint == expected
