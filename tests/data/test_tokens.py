"""Tokens are what was prepared, or they are refused with the place named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from longspan.data import tokens as module
from longspan.data.tokens import TokenShard, TokenStream, TokenType, verify_shards
from longspan.errors import DataError
from tests.data.shards import write_shard, write_stream

DOCUMENTS = [[1, 2, 3], [4], [5, 299]]


@pytest.fixture
def shard(tmp_path: Path) -> TokenShard:
    return write_shard(tmp_path / "train-00-00000", DOCUMENTS, 300)


def opened(shard: TokenShard) -> TokenShard:
    """The shard as another process sees it: nothing mapped, nothing verified."""
    return TokenShard(shard.stem, shard.info, shard.token_type)


def read_all(shard: TokenShard) -> list[int]:
    return opened(shard).read(0, shard.info.num_tokens).tolist()


def test_what_is_written_is_read(shard: TokenShard) -> None:
    assert read_all(shard) == [1, 2, 3, 4, 5, 299]
    assert shard.bounds.tolist() == [0, 3, 4, 6]
    assert (shard.info.num_documents, shard.info.num_text_bytes) == (3, 6)
    assert np.flatnonzero(shard.counts).tolist() == [1, 2, 3, 4, 5, 299] and shard.counts.sum() == 6
    assert shard.path.read_bytes() == np.array([1, 2, 3, 4, 5, 299], "<u2").tobytes()
    assert shard.stem.with_suffix(".index").read_bytes() == np.array([0, 3, 4, 6], "<u8").tobytes()
    names = [f"train-00-00000.{suffix}" for suffix in ("counts", "index", "tokens")]
    assert sorted(path.name for path in shard.stem.parent.iterdir()) == names


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "large", [[70_000, 1]], 70_001)
    assert read_all(shard) == [70_000, 1]
    assert shard.path.stat().st_size == 8


def test_a_cut_file_is_refused(shard: TokenShard) -> None:
    content = shard.path.read_bytes()
    shard.path.write_bytes(content[:-1])
    with pytest.raises(DataError, match="has 11 bytes, which is no whole number of uint16 tokens"):
        read_all(shard)
    shard.path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"holds 5 tokens of uint16; 6 were written"):
        read_all(shard)
    shard.path.write_bytes(content)
    index = shard.stem.with_suffix(".index")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00-00000.index has 31 bytes; 4 numbers of 8 bytes were written"):
        _ = opened(shard).bounds


def test_another_dtype_is_refused(shard: TokenShard) -> None:
    wide = TokenShard(shard.stem, shard.info, TokenType(70_000))
    with pytest.raises(DataError, match=r"holds 3 tokens of uint32; 6 were written: .* its dtype is another"):
        wide.read(0, 6)


def test_a_token_outside_the_vocabulary_is_named_with_its_offset(shard: TokenShard) -> None:
    tokens = np.fromfile(shard.path, "<u2")
    tokens[4] = 300
    tokens.tofile(shard.path)
    with pytest.raises(DataError, match=r"token 300 at offset 4 \(byte 8\) is outside the vocabulary of 300"):
        read_all(shard)


@pytest.mark.parametrize("suffix", [".tokens", ".index", ".counts"])
def test_any_flipped_bit_is_noticed(shard: TokenShard, suffix: str) -> None:
    path = shard.stem.with_suffix(suffix)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 1 if len(content) < 100 else 97):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=path.name):
            verify_shards([opened(shard)])
    path.write_bytes(content)
    verify_shards([opened(shard)])


def test_a_missing_file_is_named(shard: TokenShard) -> None:
    for suffix in (".tokens", ".index", ".counts"):
        path = shard.stem.with_suffix(suffix)
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=rf"{path.name} cannot be read: .*No such file.*Prepare the data again"):
            verify_shards([opened(shard)])
        path.write_bytes(content)


def test_a_block_is_verified_before_it_is_used_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    written = write_shard(tmp_path / "blocks", [list(range(50)), list(range(50, 100))], 300)
    assert written.num_blocks == 4
    tokens = np.fromfile(written.path, "<u2")
    tokens[70] += 1
    tokens.tofile(written.path)
    shard = opened(written)
    assert shard.read(0, 64).tolist() == list(range(64))
    for start, stop in ((60, 66), (95, 96), (64, 65)):
        with pytest.raises(DataError, match=r"the SHA-256 of its bytes 128 to 191 is another"):
            shard.read(start, stop)
    assert shard.read(96, 100).tolist() == list(range(96, 100))
    told: list[int] = []
    with pytest.raises(DataError, match="bytes 128 to 191"):
        verify_shards([opened(written)], told.append)
    tokens[70] -= 1
    tokens.tofile(written.path)
    told.clear()
    verify_shards([opened(written)], told.append)
    assert sorted(told) == [8, 64, 64, 64]


def test_a_stream_is_its_shards_one_after_another(tmp_path: Path) -> None:
    documents = [list(range(n)) for n in (3, 1, 4, 1, 5, 9, 2, 6)]
    everything = [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)])
    for name, per_shard in (("one", 8), ("three", 3), ("eight", 1)):
        (tmp_path / name).mkdir()
        stream = write_stream(tmp_path / name, documents, 300, per_shard)
        assert (stream.num_tokens, stream.num_documents, stream.num_text_bytes) == (31, 8, 31)
        for start in range(31):
            for stop in range(start + 1, 32):
                assert stream.read(start, stop).tolist() == everything[start:stop]
                inside = [n for n in starts[:-1] if start <= n < stop]
                assert stream.document_starts(start, stop).tolist() == inside
                first = max(n for n in starts if n <= start)
                expected = [first, *(n for n in starts if first < n < stop), min(n for n in starts if n >= stop)]
                assert stream.bounds_of_documents(start, stop).tolist() == expected
        assert stream.num_longer_documents(4) == 3
        assert stream.token_counts(300)[:3].tolist() == [8, 6, 5]


def test_a_fingerprint_is_of_tokens_and_documents(tmp_path: Path) -> None:
    stream = write_stream(tmp_path, DOCUMENTS, 300)
    assert TokenStream("another name", stream.shards).fingerprint == stream.fingerprint
    (info,) = (shard.info for shard in stream.shards)
    for changed in (
        dataclasses.replace(info, index_sha256="0" * 64),
        dataclasses.replace(info, tokens_sha256=("0" * 64,)),
    ):
        other = TokenShard(stream.shards[0].stem, changed, stream.shards[0].token_type)
        assert TokenStream("", [other]).fingerprint != stream.fingerprint
