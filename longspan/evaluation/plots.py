"""Figures of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.evaluation.hidden_keys import HiddenKeyResult
from longspan.evaluation.loss import LossTables
from longspan.evaluation.recall import RecallResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_loss(tables: LossTables, path: Path) -> None:
    """Draw the loss by tokens seen, and by the length of the document."""
    figure, panels = _figure(2)
    for axes, table, label in (
        (panels[0], tables.by_context, "tokens seen"),
        (panels[1], tables.by_document_length, "tokens of the document"),
    ):
        axes.plot([2.0**power for power in table], [found.nats_per_token for found in table.values()], "o-")
        axes.axhline(tables.whole.nats_per_token, color="grey", linestyle="--", label="all")
        axes.set(xlabel=label, ylabel="loss (nats per token)")
        axes.set_xscale("log", base=2)
        axes.legend()
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_recall(results: Sequence[RecallResult], path: Path) -> None:
    """Draw the accuracy by the number of pairs, a line for each length."""
    figure, (axes,) = _figure(1)
    for length in dict.fromkeys(each.seq_len for each in results):
        of_length = [each for each in results if each.seq_len == length]
        axes.plot(
            [each.num_pairs for each in of_length],
            [each.accuracy for each in of_length],
            "o-",
            label=f"{length:,} tokens",
        )
    chances = {each.num_pairs: each.chance for each in results}
    axes.plot(sorted(chances), [chances[count] for count in sorted(chances)], "x--", color="grey", label="by chance")
    axes.set(xlabel="pairs", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def plot_hidden_keys(results: Sequence[HiddenKeyResult], name: str, path: Path) -> None:
    """Draw the share that was found, as a field of lengths and depths."""
    lengths = list(dict.fromkeys(each.num_tokens for each in results))
    depths = list(dict.fromkeys(each.depth for each in results))
    found = {(each.depth, each.num_tokens): each.accuracy for each in results}
    figure, (axes,) = _figure(1)
    image = axes.imshow(
        [[found[depth, length] for length in lengths] for depth in depths], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"
    )
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set(xlabel="tokens", ylabel=f"depth of the {name}")
    figure.colorbar(image, label="found")
    _save(figure, path)


def _figure(num_panels: int) -> tuple[Figure, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, num_panels, figsize=(6 * num_panels, 4.5), layout="constrained", squeeze=False)
    return figure, list(panels[0])


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
