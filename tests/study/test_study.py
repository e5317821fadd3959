"""``longspan study`` as a user calls it: killed in the middle it goes on, and finds what it would have found unbroken."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longspan.cli import main
from longspan.train.checkpoint import complete_checkpoints
from tests.train.tiny import metrics, write_corpus

TIMEOUT = 600.0
GRID = ("--mixers", "gla", "deltanet", "--ratios", "1/4", "--seeds", "0", "--jobs", "1", "--threads", "1")
SMALL = {
    "dim": 16,
    "hidden_dim": 24,
    "text_vocab_size": 270,
    "text_steps": 4,
    "text_seq_len": 32,
    "text_batch_tokens": 64,
    "recall_steps": 24,
    "recall_seq_len": 32,
    "recall_batch_tokens": 64,
    "recall_pairs": 4,
    "recall_vocab_size": 24,
}
COMPUTED = ("step", "loss", "gradient_norm", "validation_loss", "validation_accuracy")


def command(out: Path, corpus: Path) -> list[str]:
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "longspan", "study", "--out", str(out), "--text_source", str(corpus), *GRID, *sizes]


@pytest.mark.slow
def test_a_study_that_is_killed_goes_on_to_what_an_unbroken_one_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path / "text")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = subprocess.run(command(unbroken, corpus), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4 trainings, 0 of them done before\n") and "That was the last\n" in done.stdout

    begun = broken / "cells" / "recall-gla-1-4-seed0"
    process = subprocess.Popen(command(broken, corpus), stdout=subprocess.PIPE)
    deadline = time.monotonic() + TIMEOUT
    while not complete_checkpoints(begun / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    # The training ends with the command that has started it.
    time.sleep(1.0)
    assert not (begun / "summary.json").exists()

    again = subprocess.run(command(broken, corpus), capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.startswith("4 trainings, 2 of them done before\n")
    assert "going on from step" in (broken / "logs" / f"{begun.name}.log").read_text()
    for cell in sorted(path.name for path in (unbroken / "cells").iterdir()):
        assert metrics(broken / "cells" / cell, *COMPUTED) == metrics(unbroken / "cells" / cell, *COMPUTED), cell
    ours, theirs = (json.loads((out / "study.json").read_text())["rows"] for out in (broken, unbroken))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs]
    assert all(row["num_done"] == 1 for row in ours)

    (unbroken / "study.md").unlink()
    assert main(["study", "--out", str(unbroken), "--report_only"]) == 0
    assert capsys.readouterr().out.endswith("study.svg\n")
    assert "4 of 4 trainings are done, of 1 seeds" in (unbroken / "study.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "study needs a folder"),
        (["--out", "nowhere", "--mixers", "gated_deltane"], "Did you mean 'gated_deltanet'?"),
        (["--out", "nowhere", "--ratios", "1/3"], "ratios must be of pure, 1/8, 1/4, 1/2; got '1/3'"),
        (["--out", "nowhere", "--jobs", "0"], "jobs must be at least 1; got 0"),
        (["--out", "nowhere", "--threads", "0"], "parallel.threads is 0"),
        (["--out", "nowhere", "--text_steps", "0"], "train.steps is 0"),
        (["--out", "nowhere", "--report_only"], "nowhere has no trainings of a study to report"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["study", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
