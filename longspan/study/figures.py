"""A study's losses and accuracies over the share of softmax layers, a line for each mixer, with error bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longspan.study.grid import ALL, RATIOS, REFERENCE
from longspan.study.paper import TABLES
from longspan.study.results import Row, Spread

_MARKERS = "os^Dv<>Phx*+"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what is there of each task, and the paper's losses beside those of text; the path's ending says in which format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, str, Mapping[tuple[str, str], Spread]]] = []
    for task, label, value in _PANELS:
        found = values_of(rows, task, value)
        if found:
            panels.append((f"{task}, this study", label, found))
        if found and task == "text":
            losses = TABLES["Table 2"] | TABLES["Table 4"]
            paper = {place: Spread(loss, None, 1) for place, loss in losses.items()}
            panels.append(("LASP-2 (arXiv 2502.07563), tables 2 and 4", "loss (nats per token)", paper))
    mixers = list(dict.fromkeys(row.group.mixer for row in rows))
    # A panel for nothing says that there is nothing.
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(6 * max(1, len(panels)), 5), squeeze=False, layout="constrained"
    )
    for panel, (title, label, of_panel) in zip(axes[0], panels, strict=False):
        _draw_panel(panel, mixers, of_panel)
        panel.set(title=title, xlabel="softmax layers", ylabel=label)
    figure.savefig(path)
    pyplot.close(figure)


def values_of(rows: Sequence[Row], task: str, value: Callable[[Row], Spread | None]) -> dict[tuple[str, str], Spread]:
    """By mixer and share of softmax layers: what is there of a task."""
    found = {(row.group.mixer, row.group.ratio): value(row) for row in rows if row.group.task == task}
    return {place: known for place, known in found.items() if known is not None}


def loss_of(row: Row) -> Spread | None:
    """In nats per token."""
    return row.loss


def accuracy_of(row: Row) -> Spread | None:
    """Of recall alone."""
    return row.accuracy


_PANELS: tuple[tuple[str, str, Callable[[Row], Spread | None]], ...] = (
    ("text", "validation loss (nats per token)", loss_of),
    ("recall", "accuracy of answers", accuracy_of),
)


def _draw_panel(panel: Any, mixers: Sequence[str], found: Mapping[tuple[str, str], Spread]) -> None:
    shares = [ratio for ratio in RATIOS if any(place[1] == ratio for place in found)]
    for number, mixer in enumerate(mixers):
        known = [(index, found[mixer, ratio]) for index, ratio in enumerate(shares) if (mixer, ratio) in found]
        if not known:
            continue
        # Side by side, so that error bars do not hide each other.
        places = [index + 0.02 * (number - len(mixers) / 2) for index, _ in known]
        means, deviations = [value.mean for _, value in known], [value.deviation or 0.0 for _, value in known]
        panel.errorbar(
            *(places, means, deviations),
            marker=_MARKERS[number % len(_MARKERS)],
            color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
            capsize=3,
            linewidth=1.2,
            label=mixer,
        )
    reference = found.get((REFERENCE, ALL))
    if reference is not None:
        panel.axhline(reference.mean, color="black", linestyle=":", label=f"{REFERENCE} alone")
        if reference.deviation is not None:
            low, high = reference.mean - reference.deviation, reference.mean + reference.deviation
            panel.axhspan(low, high, color="black", alpha=0.08)
    panel.set_xticks(range(len(shares)), shares)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)
