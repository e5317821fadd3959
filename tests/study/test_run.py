"""A study's order of work: what is done is left, what was begun is gone on with, what fails holds nothing up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from longspan.errors import ConfigError
from longspan.launch import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from longspan.study import run as running
from longspan.study.grid import Cell, Grid, Group
from longspan.study.results import folder_of
from longspan.study.run import Study, expected_seconds, read_size
from longspan.study.size import SIZES
from tests.study.fake import write_summary

GRID = Grid(mixers=("gla", "kda"), ratios=("pure",), tasks=("recall",), seeds=(0, 1))

JOB = """
import json, pathlib, sys, tomllib
config = tomllib.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(config["run"]["dir"])
print("operator", config["model"]["operator"], flush=True)
if config["model"]["operator"][0] in sys.argv[2:]:
    sys.exit(1)
(folder / "checkpoints").mkdir(parents=True)
summary = {"validation_loss": 1.0, "validation_accuracy": 0.5, "tokens_per_second": 1.0, "seconds_of_this_process": 1.0}
(folder / "summary.json").write_text(json.dumps(summary))
"""


class Jobs:
    """Stands in for trainings: notes which were started, and lets those of some mixers fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[str] = []
        self.failing: list[str] = []
        monkeypatch.setattr(running, "start_job", self.start)

    def start(self, command: Sequence[str], threads: int, folder: Path, output: BinaryIO) -> subprocess.Popen[bytes]:
        assert command[1:4] == ["-m", "longspan", "train"] and command[4] == "--config"
        self.started.append(Path(command[5]).stem)
        arguments = [sys.executable, "-c", JOB, command[5], *self.failing]
        return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=output, stderr=output)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    return Jobs(monkeypatch)


def make(folder: Path, grid: Grid = GRID, **changes: Any) -> tuple[int, list[str]]:
    """The exit code of the study, and what it has said."""
    said: list[str] = []
    return Study(folder, grid, SIZES["short"].changed(changes), 2, 1, said.append).run(), said


def test_every_cell_is_trained_once_and_keeps_no_checkpoint(tmp_path: Path, jobs: Jobs) -> None:
    code, said = make(tmp_path / "study")
    assert code == EXIT_DONE
    assert jobs.started == [cell.name for cell in GRID.cells]
    assert said[0] == "4 trainings, 0 of them done before" and said[-1].endswith("That was the last")
    for cell in GRID.cells:
        assert not (folder_of(tmp_path / "study", cell) / "checkpoints").exists()
        assert f"operator ['{cell.group.mixer}']" in (tmp_path / "study" / "logs" / f"{cell.name}.log").read_text()
    jobs.started.clear()
    assert make(tmp_path / "study") == (EXIT_DONE, ["4 trainings, 4 of them done before"])
    assert jobs.started == []


def test_what_was_begun_is_gone_on_with_and_what_is_done_is_left(tmp_path: Path, jobs: Jobs) -> None:
    done, begun = GRID.cells[0], GRID.cells[1]
    write_summary(tmp_path, done)
    folder_of(tmp_path, begun).mkdir()
    code, said = make(tmp_path)
    assert code == EXIT_DONE and said[0] == "4 trainings, 1 of them done before"
    assert jobs.started == [cell.name for cell in GRID.cells[1:]]
    # The run's own way to go on, or to begin.
    assert "go_on = true" in (tmp_path / "configs" / f"{begun.name}.toml").read_text()


def test_a_training_that_fails_is_named_and_tried_again(tmp_path: Path, jobs: Jobs) -> None:
    jobs.failing = ["gla"]
    code, said = make(tmp_path)
    assert code == EXIT_FAILED and jobs.started == [cell.name for cell in GRID.cells]
    failed = [cell for cell in GRID.cells if cell.group.mixer == "gla"]
    for cell in failed:
        log = tmp_path / "logs" / f"{cell.name}.log"
        assert f"failed: {cell}; its words are in {log}. The same command tries again" in said
        assert log.read_text().endswith("it ended with exit code 1\n")
    jobs.started.clear()
    jobs.failing = []
    assert make(tmp_path)[0] == EXIT_DONE
    assert jobs.started == [cell.name for cell in failed]


def test_a_signal_stops_what_is_trained_and_the_same_command_goes_on(
    tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes while a training is being started."""
    started: list[str] = []

    def start(command: Sequence[str], threads: int, folder: Path, output: BinaryIO) -> subprocess.Popen[bytes]:
        started.append(Path(command[5]).stem)
        waits = [sys.executable, "-c", "import time; time.sleep(600)"]
        process = subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=output, stderr=output)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    with monkeypatch.context() as context:
        context.setattr(running, "start_job", start)
        code, said = make(tmp_path)
    assert (code, said[-1]) == (EXIT_STOPPED, "stopped, with 2 trainings not begun: the same command goes on")
    assert started == [cell.name for cell in GRID.cells[:2]]
    assert make(tmp_path)[0] == EXIT_DONE
    assert jobs.started == [cell.name for cell in GRID.cells]


def test_more_of_the_grid_goes_into_the_same_folder_and_another_size_does_not(tmp_path: Path, jobs: Jobs) -> None:
    make(tmp_path)
    jobs.started.clear()
    more = Grid(mixers=("gla", "retention"), ratios=("pure",), tasks=("recall",), seeds=(0, 1))
    assert make(tmp_path, more)[0] == EXIT_DONE
    assert {name.split("-")[1] for name in jobs.started} == {"retention"}
    assert read_size(tmp_path) == SIZES["short"]
    with pytest.raises(ConfigError, match=r"a study of another size \(dim 64 -> 32, recall_steps 300 -> 7\)"):
        make(tmp_path, dim=32, recall_steps=7)
    (tmp_path / "size.json").write_text('{"dim": 64}')
    with pytest.raises(ConfigError, match="of another version of longspan: it differs in hidden_dim"):
        make(tmp_path)


def test_text_is_prepared_once_and_not_for_recall(tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Path] = []

    def prepare(recipe: Any, folder: Path) -> float:
        assert recipe.vocab_size == SIZES["short"].text_vocab_size
        prepared.append(folder)
        return 1.0

    monkeypatch.setattr(running, "prepare_corpus", prepare)
    make(tmp_path)
    assert prepared == []
    both = Grid(mixers=("gla", "kda"), ratios=("pure",), seeds=(0,))
    make(tmp_path, both)
    assert prepared == [tmp_path / "data"]
    text = [cell for cell in both.cells if cell.group.task == "text"]
    for cell in text:
        assert f'prepared = "{tmp_path / "data"}"' in (tmp_path / "configs" / f"{cell.name}.toml").read_text()


def test_a_size_that_no_run_takes_is_refused_before_anything_is_written(tmp_path: Path, jobs: Jobs) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"recall_steps": 0}, "train.steps is 0"),
        ({"num_heads": 5}, "dim 64 is not a multiple of num_heads 5"),
        ({"recall_pairs": 40}, "recall.pairs 40"),
    )
    for changes, message in refused:
        with pytest.raises(ConfigError, match=message):
            make(tmp_path / "study", **changes)
    assert not (tmp_path / "study").exists() and jobs.started == []


def test_the_time_left_is_by_the_cells_most_like_it() -> None:
    def cell(task: str, mixer: str, ratio: str, seed: int = 0) -> Cell:
        return Cell(Group(task, mixer, ratio), seed)

    known = {cell("text", "gla", "pure"): 10.0, cell("text", "gla", "1/2"): 30.0, cell("recall", "kda", "pure"): 50.0}
    assert expected_seconds(cell("text", "gla", "pure", 1), known) == 10.0
    assert expected_seconds(cell("text", "gla", "1/4"), known) == 20.0
    assert expected_seconds(cell("recall", "gla", "pure"), known) == 50.0
    assert expected_seconds(cell("text", "kda", "pure"), known) == 20.0
    assert expected_seconds(cell("text", "kda", "pure"), {}) == 0.0
