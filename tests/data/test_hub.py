"""Data sets of the hub of Hugging Face, streamed from a stand-in on loopback, by the command as a user gives it."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from longspan.data.prepared import open_prepared
from longspan.launch import EXIT_DONE, EXIT_REFUSED
from tests.data.hub import StandInHub
from tests.data.test_prepare import contents, documents

# Each starts a process that imports the package of data sets.
pytestmark = pytest.mark.slow

OLD, NEW = "a" * 40, "b" * 40
NAME = "someone/verse"
README = b"""---
configs:
- config_name: prose
  data_files: prose/*.parquet
- config_name: poems
  data_files:
  - split: train
    path: poems/train-*.parquet
  - split: spare
    path: poems/spare.parquet
---
"""


def texts(commit: str, part: object) -> list[str]:
    return [f"{commit[0]} {part} {row}" if row % 5 else "" for row in range(10)]


def table(rows: list[str]) -> bytes:
    written = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "text": rows}), written)
    return written.getvalue()


def files_at(commit: str) -> dict[str, bytes]:
    """Three parts of poems, and what is not asked for."""
    poems = {f"poems/train-{part}.parquet": table(texts(commit, part)) for part in range(3)}
    others = {name: table(texts(commit, name)) for name in ("poems/spare.parquet", "prose/a.parquet")}
    return {"README.md": README, **poems, **others}


def hub() -> StandInHub:
    return StandInHub({NAME: {OLD: files_at(OLD), NEW: files_at(NEW)}}, {NAME: OLD})


def command(folder: Path, source: str) -> list[str]:
    options = ["--source", source, "--tokenizer", "bytes", "--validation-fraction", "0.3"]
    return [sys.executable, "-m", "longspan", "prepare", str(folder), *options]


def prepare(stand_in: StandInHub, folder: Path, source: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, source),
        env=stand_in.environment(folder.parent / "home"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def texts_in(folder: Path) -> list[str]:
    data = open_prepared(folder)
    return sorted(documents(data.train, data) + documents(data.validation, data))


def test_all_parts_are_of_the_commit_that_was_found_whatever_is_pushed_meanwhile(tmp_path: Path) -> None:
    with hub() as stand_in:

        def push(path: str) -> None:
            if path.endswith(".parquet"):
                stand_in.heads[NAME] = NEW

        stand_in.before = push
        done = prepare(stand_in, tmp_path / "data", f"hf:{NAME}?config=poems")
        assert done.returncode == EXIT_DONE, done.stderr
        read = {path for method, path in stand_in.asked if method == "GET" and path.endswith(".parquet")}
    assert texts_in(tmp_path / "data") == sorted(text for part in range(3) for text in texts(OLD, part) if text)
    # Nothing else was read, and nothing twice from elsewhere.
    assert read == {f"/datasets/{NAME}/resolve/{OLD}/poems/train-{part}.parquet" for part in range(3)}
    assert "6 documents without text" in done.stdout


def test_a_preparation_from_a_hub_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    source = f"hf:{NAME}?config=poems&split=train&revision=main"
    with hub() as stand_in:
        assert prepare(stand_in, tmp_path / "whole", source).returncode == EXIT_DONE
        held = threading.Event()
        stand_in.before = lambda path: None if "train-2" not in path else (held.wait(300), None)[1]
        environment = stand_in.environment(tmp_path / "home")
        with subprocess.Popen(command(folder, source), env=environment, stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 300
            while not (folder / "shard-00-00001.json").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.kill()
        held.set()
        done_before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
        assert done_before.keys() == {"shard-00-00000.json", "shard-00-00001.json"}
        done = prepare(stand_in, folder, source)
        assert done.returncode == EXIT_DONE, done.stderr
        assert contents(folder) == contents(tmp_path / "whole")
        assert {name: (folder / name).stat().st_mtime_ns for name in done_before} == done_before
        # One that was killed before a push is made anew of what was pushed.
        (folder / "data.json").unlink()
        stand_in.heads[NAME] = NEW
        assert prepare(stand_in, folder, source).returncode == EXIT_DONE
    assert texts_in(folder) == sorted(text for part in range(3) for text in texts(NEW, part) if text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/nothing", "hf:someone/nothing could not be opened: DatasetNotFoundError: "),
        (f"{NAME}?config=essays", "could not be opened: ValueError: BuilderConfig 'essays' not found"),
        (f"{NAME}?config=poems&split=test", "could not be opened: ValueError: "),
        (f"{NAME}?config=poems&revision=v2", "could not be opened: DatasetNotFoundError: Revision 'v2' doesn't exist"),
    ],
)
def test_what_a_hub_does_not_have_is_refused_by_name(tmp_path: Path, source: str, message: str) -> None:
    with hub() as stand_in:
        done = prepare(stand_in, tmp_path / "data", f"hf:{source}")
    assert done.returncode == EXIT_REFUSED
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("longspan: error: ")]
    assert message in line and line.endswith("Check the name, config=... and split=..., and the network")
    assert not (tmp_path / "data" / "data.json").exists()


def test_a_hub_that_does_not_answer_is_refused_in_words(tmp_path: Path) -> None:
    with hub() as stand_in:
        pass
    # Its port is closed.
    done = prepare(stand_in, tmp_path / "data", f"hf:{NAME}?config=poems")
    assert done.returncode == EXIT_REFUSED
    assert f"longspan: error: hf:{NAME}?config=poems could not be opened: ConnectionError: " in done.stderr
