"""Files and disks that are not what a run needs: F12 and F13 of docs/reliability.md, as far as no other test has them."""

from __future__ import annotations

import io
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.errors import ConfigError, LongspanError
from longspan.launch import EXIT_DONE
from longspan.train.checkpoint import complete_checkpoints, newest_checkpoint
from longspan.train.config import Config, read_toml
from longspan.train.trainer import Trainer
from tests.ranks import raised, run_on_ranks
from tests.train.tiny import tiny_config, train_here

# F12


class _Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_no_file_that_is_read_is_ever_unpickled(corpus: Path, tmp_path: Path) -> None:
    original, canary = tmp_path / "original", tmp_path / "canary"
    assert run_on_ranks(1, train_here, tiny_config(corpus, original, parallel__sp=1)) == [EXIT_DONE]
    newest = newest_checkpoint(original / "checkpoints")
    files = [*newest.rglob("*"), *(original / "data").rglob("*"), original / "metrics.jsonl", original / "config.toml"]
    pickled = pickle.dumps(_Canary(canary))
    archive = io.BytesIO()
    torch.save(_Canary(canary), archive)
    for path in [path for path in files if path.is_file()]:
        for content in (pickled, archive.getvalue()):
            run = tmp_path / "run"
            shutil.copytree(original, run)
            (run / path.relative_to(original)).write_bytes(content)
            if path.name == "config.toml":
                with pytest.raises(ConfigError, match=r"config.toml cannot be read as a config"):
                    read_toml(run / path.name)
            else:
                outcome = run_on_ranks(1, _resumed_or_refused, tiny_config(corpus, run, parallel__sp=1))[0]
                # A recipe is written anew where it is no recipe.
                assert path.name in outcome or outcome == "done", path
            assert not canary.exists(), path
            shutil.rmtree(run)
    # Names that other libraries unpickle, beside what is read.
    for name in (".metadata", "model.pt", "optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"):
        (newest / name).write_bytes(pickled)
        (original / name).write_bytes(pickled)
    assert run_on_ranks(1, _resumed_or_refused, tiny_config(corpus, original, parallel__sp=1))[0] == "done"
    assert not canary.exists()
    pickle.loads(pickled)
    assert canary.exists()


def _resumed_or_refused(config: Config) -> str:
    try:
        return {EXIT_DONE: "done"}[train_here(config, True)]
    except LongspanError as error:
        return str(error)


def test_links_lead_to_nothing_that_is_removed_or_written(corpus: Path, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    config = tiny_config(corpus, run, parallel__sp=1, train__steps=3)
    assert run_on_ranks(1, train_here, config) == [EXIT_DONE]
    outside.mkdir()
    (outside / "thesis.tex").touch()
    for name in (".writing-step-00000004", ".removing-step-00000001", "step-00000002"):
        (run / "checkpoints" / name).symlink_to(outside)
    longer = tiny_config(corpus, run, parallel__sp=1, train__steps=4, checkpoint__keep=1)
    run_on_ranks(1, _resumed_or_refused, longer)
    assert [path.name for path in outside.iterdir()] == ["thesis.tex"]


# F13


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a disk of its own needs root: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(corpus: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    values: dict[str, Any] = {
        "train__steps": 100,
        "checkpoint__every": 1,
        "checkpoint__keep": 100,
        "validation__every": 0,
    }
    values["parallel__sp"] = 1
    ((kind, text),) = run_on_ranks(1, raised, train_here, tiny_config(corpus, run, **values))
    assert kind in ("CheckpointError", "ConfigError")
    assert "could not be written" in text and "No space left on device" in text
    complete = complete_checkpoints(run / "checkpoints")
    assert len(complete) >= 2
    last = int(complete[-1].name.split("-")[1])
    for old in complete[:-1]:
        shutil.rmtree(old)
    go_on = tiny_config(corpus, run, **values | {"train__steps": last + 1, "checkpoint__keep": 1})
    assert run_on_ranks(1, train_here, go_on, True) == [EXIT_DONE]


def test_a_folder_that_cannot_be_written_is_refused_or_leaves_the_last_checkpoint(
    corpus: Path, tmp_path: Path, small_disk: Path
) -> None:
    run = small_disk / "run"
    config = tiny_config(corpus, run, parallel__sp=1, train__steps=3)
    assert run_on_ranks(1, train_here, config) == [EXIT_DONE]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (outcome,) = run_on_ranks(1, _resumed_or_refused, tiny_config(corpus, run, parallel__sp=1, train__steps=4))
    assert "could not be written" in outcome and "Read-only file system" in outcome
    (outcome,) = run_on_ranks(1, _refused, tiny_config(corpus, small_disk / "new", parallel__sp=1))
    assert "cannot be made" in outcome and "Read-only file system" in outcome
    assert newest_checkpoint(run / "checkpoints").name == "step-00000003"


def _refused(config: Config) -> str:
    return raised(train_here, config)[1]


def _folder_removed_before_step_2(config: Config) -> tuple[str, str]:
    begun = Trainer._train_step

    def step(trainer: Trainer, *arguments: Any) -> bool:
        if trainer.step == 1:
            shutil.rmtree(trainer.folder.path)
        return begun(trainer, *arguments)

    with mock.patch.object(Trainer, "_train_step", step):
        return raised(train_here, config)


def test_a_run_whose_folder_is_removed_ends_and_says_so(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ((kind, text),) = run_on_ranks(1, _folder_removed_before_step_2, tiny_config(corpus, run, parallel__sp=1))
    assert kind in ("CheckpointError", "ConfigError")
    assert f"{run}" in text and "No such file or directory" in text
    assert not run.exists()
