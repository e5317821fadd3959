"""A checkpoint is whole or absent, and no changed byte of it is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from longspan.errors import CheckpointError
from longspan.train.checkpoint import (
    complete_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    verify_checkpoint,
)
from tests.train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint


def checkpoint(step: int) -> Checkpoint:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
    tensors = {
        "model": {"a.weight": weight},
        "optimizer": {"a.weight/exp_avg": weight * 2, "a.weight/step": torch.tensor(1.0)},
    }
    return Checkpoint(step, tensors, {"step": step, "text": "é", "config": {"lr": 0.1}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.state) == (7, checkpoint(7).state)
    assert loaded.tensors.keys() == {"model", "optimizer"}
    for name, tensors in checkpoint(7).tensors.items():
        for key, tensor in tensors.items():
            assert torch.equal(loaded.tensors[name][key], tensor)


def test_the_newest_are_kept_and_incomplete_ones_beside_change_nothing(tmp_path: Path) -> None:
    for name in ("step-00000001", "step-00000900", "step-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00000.safetensors").write_bytes(b"half")
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]
    assert names(tmp_path) == ["step-00000001", "step-00000020", "step-00000030", "step-00000900", "step-x"]


@pytest.mark.parametrize("instant", ["fsync", "rename"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_crash_while_writing_leaves_the_last_one_and_its_traces_are_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: str, keep: int
) -> None:
    save_checkpoint(tmp_path, checkpoint(10), keep)

    class Killed(BaseException):
        pass

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os if instant == "fsync" else Path, instant, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, checkpoint(20), keep)
    assert newest_checkpoint(tmp_path).name == "step-00000010"
    assert load_checkpoint(newest_checkpoint(tmp_path)).step == 10
    assert names(tmp_path) == [".writing-step-00000020", "step-00000010"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000010"]
    assert save_checkpoint(tmp_path, checkpoint(20), keep) == newest_checkpoint(tmp_path)


def test_a_full_disk_is_an_error_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, checkpoint(10), keep=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"step 20 could not be written .*No space left.* untouched: make room"
        ):
            save_checkpoint(tmp_path, checkpoint(20), keep=1)
    assert names(tmp_path) == ["step-00000010"]
    assert load_checkpoint(newest_checkpoint(tmp_path)).step == 10


def test_every_changed_byte_is_noticed_and_its_file_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    random_ = random.Random(0)
    for name in names(path):
        content = (path / name).read_bytes()
        for _ in range(40):
            damaged = bytearray(content)
            damaged[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
            (path / name).write_bytes(damaged)
            for read in (load_checkpoint, verify_checkpoint):
                with pytest.raises(CheckpointError, match=f"{name} .*Remove the folder step-00000007 to go on from"):
                    read(path)
        (path / name).write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)
        (path / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            load_checkpoint(newest_checkpoint(tmp_path))
        (path / name).write_bytes(content)
    assert load_checkpoint(path).step == 7
    assert sorted(file.name for file in verify_checkpoint(path)) == names(path)


def test_files_of_another_checkpoint_are_noticed(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path / "a", checkpoint(7), keep=1)
    second = save_checkpoint(tmp_path / "b", checkpoint(8), keep=1)
    shutil.copy(second / "model-00000.safetensors", first / "model-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00000.safetensors has changed"):
        load_checkpoint(first)
    renamed = second.rename(second.parent / "step-00000009")
    with pytest.raises(CheckpointError, match=r"manifest.json is that of step 8"):
        load_checkpoint(renamed)


def test_a_manifest_that_points_outside_its_folder_is_refused(tmp_path: Path) -> None:
    from longspan.train import checkpoint as module

    path = save_checkpoint(tmp_path, checkpoint(7), keep=1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    (path / "manifest.json").write_bytes(
        module._manifest(7, {**files, "../secret.safetensors": {"bytes": 0, "sha256": ""}})
    )
    with pytest.raises(CheckpointError, match=r"names a file outside its folder: '../secret.safetensors'"):
        load_checkpoint(path)


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
            newest_checkpoint(folder)
