"""A prepared folder is, byte for byte, what was written, or every file that is not is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longspan.data.files import digest, read_checked, with_checksum
from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import is_prepared
from longspan.data.verify import verify_prepared
from longspan.errors import DataError
from tests.data.shards import recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bytes of eight documents in three shards."""
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"document {number} " * 20)
    prepare_corpus(recipe(tmp_path / "text", shard_bytes=700), tmp_path / "data")
    return tmp_path / "data"


def changed(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def test_a_folder_as_it_was_written_has_no_fault(folder: Path) -> None:
    found = verify_prepared(folder)
    files = list(folder.iterdir())
    assert found.faults == () and len(files) > 14
    assert (found.num_files, found.num_bytes) == (len(files), sum(path.stat().st_size for path in files))


def test_every_changed_cut_or_missing_file_is_named(folder: Path) -> None:
    """Each kind of file by itself, and each way: the message says which, and all others count as whole."""
    num_files = len(list(folder.iterdir()))
    kinds = ["tokenizer.json", "shard-00-00001.json", *(f"train-00-00001.{x}" for x in ("tokens", "index", "counts"))]
    described_by_it = len(list(folder.glob("*-00-00001.*"))) - 1
    damages: list[tuple[Callable[[Path], None], str]] = [
        (lambda path: changed(path, 9), "another|outside|cannot be read"),
        (cut, "cut off|another|cannot be read"),
        (Path.unlink, "cannot be read: .*No such file"),
    ]
    for name in kinds:
        content = (folder / name).read_bytes()
        for damage, message in damages:
            damage(folder / name)
            found = verify_prepared(folder)
            (fault,) = found.faults
            assert fault.startswith(str(folder / name)), fault
            assert re.search(message, fault), fault
            unread = described_by_it if name.startswith("shard") else 0
            assert found.num_files == num_files - 1 - unread
            (folder / name).write_bytes(content)
    assert verify_prepared(folder).faults == ()


def test_all_faults_are_told_at_once(folder: Path) -> None:
    changed(folder / "train-00-00000.tokens", 5)
    cut(folder / "train-00-00001.index")
    (folder / "train-00-00002.counts").unlink()
    assert [fault.split(" ")[0].rstrip(":") for fault in verify_prepared(folder).faults] == [
        str(folder / name) for name in ("train-00-00000.tokens", "train-00-00001.index", "train-00-00002.counts")
    ]


def test_a_folder_without_a_description_or_of_another_version_is_refused(folder: Path) -> None:
    manifest = folder / "data.json"
    body = read_checked(manifest, "")
    manifest.write_bytes(with_checksum(body | {"format": "longspan-tokens-3"}))
    with pytest.raises(
        DataError, match=r"another version of longspan \(format 'longspan-tokens-3'\); this version reads"
    ):
        verify_prepared(folder)
    manifest.write_bytes(with_checksum({key: value for key, value in body.items() if key != "sources"}))
    with pytest.raises(DataError, match=r"data.json does not describe prepared data: KeyError: 'sources'"):
        verify_prepared(folder)
    manifest.write_bytes(with_checksum(body))
    changed(manifest, 30)
    with pytest.raises(DataError, match=r"data.json (is not what was written|cannot be read)"):
        verify_prepared(folder)
    manifest.unlink()
    assert is_prepared(folder)
    with pytest.raises(DataError, match=r"it has no data.json"):
        verify_prepared(folder)


def resealed(folder: Path, suffix: str, numbers: np.ndarray) -> None:
    """Shard 0 with other numbers in a file, and digests of them."""
    (folder / f"train-00-00000{suffix}").write_bytes(numbers.astype("<u8").tobytes())
    path, manifest = folder / "shard-00-00000.json", folder / "data.json"
    body, described = read_checked(path, ""), read_checked(manifest, "")
    body["splits"]["train"][f"{suffix[1:]}_sha256"] = digest(numbers.astype("<u8").tobytes())
    path.write_bytes(with_checksum(body))
    described["sources"][0]["shards"][0] = digest(path.read_bytes())
    manifest.write_bytes(with_checksum(described))


@pytest.mark.parametrize(
    ("suffix", "message"), [(".index", "does not divide"), (".counts", "counts .* tokens; the shard has")]
)
def test_an_index_and_counts_that_do_not_fit_the_tokens_are_faults(folder: Path, suffix: str, message: str) -> None:
    numbers = np.fromfile(folder / f"train-00-00000{suffix}", "<u8")
    resealed(folder, suffix, numbers)
    assert verify_prepared(folder).faults == ()
    numbers[-1] += 1
    resealed(folder, suffix, numbers)
    (fault,) = verify_prepared(folder).faults
    assert fault.startswith(str(folder / f"train-00-00000{suffix}"))
    assert re.search(message, fault), fault
