"""Figures of several runs over each other: loss, tokens per second, memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.errors import CheckpointError, ConfigError
from longspan.train.metrics import MetricsFile

_PANELS = (
    ("loss", "loss (nats per token)", 1.0),
    ("tokens_per_second", "tokens per second, all ranks", 1.0),
    ("peak_memory_bytes", "peak memory of a rank (GiB)", 2.0**30),
)


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of a run, under a name."""

    name: str
    records: list[dict[str, Any]]

    def line(self, key: str) -> tuple[list[int], list[float]]:
        """Steps that have a number `key`, and these numbers."""
        found = [(record["step"], record[key]) for record in self.records if record.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]


def read_run(path: Path) -> RunMetrics:
    """The metrics of a run folder, or of a metrics file.

    Raises:
        ConfigError: if there are none.
        CheckpointError: if a line is damaged; the message names it.
    """
    file = path if path.is_file() else path / "metrics.jsonl"
    if not file.is_file():
        what = "no run folder: it has no metrics.jsonl" if path.is_dir() else "neither a run folder nor a metrics file"
        raise ConfigError(f"{str(path)!r} is {what}. Give the folder of a run, such as runs/2026-01-31_12-00-00")
    try:
        records = MetricsFile(file).read()
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if not any("loss" in record for record in records):
        raise ConfigError(f"{file} has no steps yet. Plot it once the run has made one")
    return RunMetrics(path.resolve().parent.name if path.is_file() else path.resolve().name, records)


def plot_runs(runs: list[RunMetrics], path: Path) -> None:
    """Draw the runs over each other, a panel for each of loss, tokens per second and memory, as a PNG.

    Validation losses are points on the loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_PANELS), figsize=(15, 4.5), layout="constrained")
    for panel, (key, label, unit) in zip(panels, _PANELS, strict=True):
        for run in runs:
            steps, values = run.line(key)
            (drawn,) = panel.plot(steps, [value / unit for value in values], label=run.name, linewidth=1.2)
            if key == "loss":
                panel.plot(*run.line("validation_loss"), "o", color=drawn.get_color(), markersize=4)
        panel.set(xlabel="step", ylabel=label)
        panel.grid(alpha=0.3)
        if key != "loss":
            panel.set_ylim(bottom=0)
    panels[0].legend(title="points: validation")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
