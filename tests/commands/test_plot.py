"""``longspan plot`` draws runs over each other, and names what is no run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from longspan.cli import main
from longspan.train.figures import read_run


def make_run(path: Path, num_steps: int) -> Path:
    path.mkdir(parents=True)
    records = [
        {"step": step, "loss": 5.0 / step, "tokens_per_second": 100.0, "peak_memory_bytes": 2**30}
        for step in range(1, num_steps + 1)
    ]
    records.append({"step": num_steps, "validation_loss": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_several_runs_are_drawn_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = make_run(tmp_path / "a" / "run", 3), make_run(tmp_path / "b" / "run", 5)
    out = tmp_path / "figure.png"
    drawn: list[Any] = []
    with mock.patch("matplotlib.pyplot.close", drawn.append):
        assert main(["plot", str(first), str(second / "metrics.jsonl"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    # Of the same name both: each goes by what the user has called it.
    names = [str(first), str(second / "metrics.jsonl")]
    (figure,) = drawn
    loss, speed, memory = figure.axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == names
    for panel, value in ((speed, 100.0), (memory, 1.0)):
        lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}
        assert lines == {name: ([*range(1, n + 1)], [value] * n) for name, n in zip(names, (3, 5), strict=True)}
    curves = [(list(line.get_xdata()), list(line.get_ydata()), line.get_color()) for line in loss.lines]
    (_, _, blue), (_, _, orange) = curves[0], curves[2]
    assert blue != orange
    # Behind each run's loss its validation, in its colour.
    assert curves == [
        ([1, 2, 3], [5.0 / step for step in (1, 2, 3)], blue),
        ([3], [1.0], blue),
        ([1, 2, 3, 4, 5], [5.0 / step for step in (1, 2, 3, 4, 5)], orange),
        ([5], [1.0], orange),
    ]


def test_one_run_keeps_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 2)
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'metrics.png'}\n"
    assert (run / "metrics.png").exists()


def test_a_line_has_the_steps_that_have_a_number(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", 2))
    assert run.name == "run"
    assert run.line("loss") == ([1, 2], [5.0, 2.5])
    assert run.line("validation_loss") == ([2], [1.0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run folder: it has no metrics.jsonl"),
        ("", "has no steps yet"),
        ('{"step": 1, "validation_loss": 1.0}\n', "has no steps yet"),
        ('{"step"\n{"step": 1}\n', "line 1, is not JSON"),
    ],
)
def test_what_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["plot", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "metrics.png").exists()


def test_what_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 1)
    for out in (tmp_path / "nowhere" / "x.png", tmp_path / "x.unknown"):
        assert main(["plot", str(run), "--out", str(out)]) == 2
        assert "could not be written" in capsys.readouterr().err
    assert main(["plot"]) == 2
    assert "plot takes the runs to draw" in capsys.readouterr().err
    assert main(["plot", str(tmp_path / "absent")]) == 2
    assert "neither a run folder nor a metrics file" in capsys.readouterr().err
