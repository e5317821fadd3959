"""What a run has written stays whole, whatever happens to what shall take its place."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from longspan.errors import ConfigError
from longspan.launch import EXIT_DONE
from longspan.train import run_folder
from longspan.train.config import Config
from longspan.train.run_folder import claimed, create_run_folder, replacing
from tests.ranks import raised, run_on_ranks
from tests.train.tiny import tiny_config, train_here, write_corpus

FULL = OSError(28, "No space left on device")


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("before")
    with pytest.raises(ConfigError, match=r"config.toml could not be written: .*No space left"), replacing(path) as new:
        new.write_text("half")
        raise FULL
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as new:
        new.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_library_writes_for_its_owner_alone_may_be_read_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with replacing(tmp_path / "weights.safetensors") as new:
        new.unlink()
        new.touch(mode=0o600)
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_start_that_was_cut_off_while_it_wrote_can_be_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / ".writing-config.toml").write_text("half")
    assert create_run_folder(str(tmp_path), or_begun=True).path == tmp_path


def test_runs_that_begin_at_the_same_moment_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-31_12-00-00")
    # Neither sees the other's, as both look before both make theirs.
    monkeypatch.setattr(Path, "exists", lambda path: False)
    made = [create_run_folder(None).path.name for _ in range(3)]
    assert made == ["2026-01-31_12-00-00", "2026-01-31_12-00-00-2", "2026-01-31_12-00-00-3"]


def test_a_claim_is_of_one_process_and_one_that_ends_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_SECONDS_TO_END", 0.0)
    first = contextlib.ExitStack()
    first.enter_context(claimed(tmp_path))
    with pytest.raises(ConfigError, match=r"another process is writing into .* its run still goes on"):
        first.enter_context(claimed(tmp_path))
    monkeypatch.setattr(run_folder, "_SECONDS_TO_END", 60.0)
    threading.Timer(0.2, first.close).start()
    with claimed(tmp_path):
        pass
    with pytest.raises(ConfigError, match="cannot be read"), claimed(tmp_path / "missing"):
        raise AssertionError


def _without_waiting(config: Config) -> tuple[str, str]:
    with mock.patch.object(run_folder, "_SECONDS_TO_END", 0.0):
        return raised(train_here, config, True)


def test_a_run_that_still_goes_on_is_not_gone_on_with(tmp_path: Path) -> None:
    """Two processes that write the same checkpoint would make one of both, which is damaged."""
    run = tmp_path / "run"
    config = tiny_config(write_corpus(tmp_path / "text"), run, train__steps=1, sample__tokens=0)
    assert run_on_ranks(2, train_here, config) == [EXIT_DONE] * 2
    before = (run / "metrics.jsonl").read_bytes()
    with claimed(run):
        for kind, text in run_on_ranks(2, _without_waiting, config):
            assert kind == "ConfigError" and f"another process is writing into {run}" in text
    assert (run / "metrics.jsonl").read_bytes() == before
    assert run_on_ranks(2, train_here, config, True) == [EXIT_DONE] * 2


def _with_a_full_disk(config: Config, after_the_start: bool) -> tuple[str, str]:
    write = Path.write_text

    def writes(path: Path, text: str, **options: Any) -> int:
        if path.suffix not in (".toml", ".json", ".md"):
            return write(path, text, **options)
        write(path, text[: len(text) // 2], **options)
        raise FULL

    def saves(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise FULL

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Path, "write_text", writes))
        stack.enter_context(mock.patch("safetensors.torch.save_file", saves))
        if after_the_start:
            stack.enter_context(mock.patch("longspan.train.run._write_start", lambda trainer: None))
        return raised(train_here, config, True)


def test_a_disk_that_is_full_when_a_run_is_gone_on_with_leaves_what_it_has_written(tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = {"parallel__sp": 1, "train__steps": 2, "sample__tokens": 0}
    config = tiny_config(write_corpus(tmp_path / "text"), run, **values)
    assert run_on_ranks(1, train_here, config) == [EXIT_DONE]

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix != ".jsonl"}

    before = files()
    assert before.keys() == {"config.toml", "loss.png", "summary.json", "summary.md", "weights.safetensors"}
    for after_the_start, name in ((False, "config.toml"), (True, "weights.safetensors")):
        ((kind, text),) = run_on_ranks(1, _with_a_full_disk, config, after_the_start)
        assert kind == "ConfigError" and f"{name} could not be written: [Errno 28] No space left on device" in text
        assert files() == before
