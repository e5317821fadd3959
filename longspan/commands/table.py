"""Costs as a table of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from longspan.plan.cost import Cost


def columns(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lines of aligned columns, the first to the left and the others to the right."""
    lines = [list(heading), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        + "\n"
        for line in lines
    )


def cost_table(costs: Iterable[Cost], compute_seconds: float) -> str:
    """One line per topology: times, what stays exposed beside a computation of `compute_seconds` each way, bytes, messages, steps.

    Bytes, messages and steps are of both directions.
    """
    heading = ["topology", "forward ms", "backward ms", "both ms", "exposed ms", "bytes", "messages", "steps"]
    rows = []
    for cost in costs:
        exposed = cost.forward.exposed(compute_seconds) + cost.backward.exposed(compute_seconds)
        times = [cost.forward.seconds, cost.backward.seconds, cost.seconds, exposed]
        name = cost.topology if cost.num_blocks is None else f"{cost.topology} ({cost.num_blocks} blocks)"
        rows.append(
            [
                name,
                *(f"{seconds * 1e3:.3f}" for seconds in times),
                f"{cost.bytes_sent:,}",
                f"{cost.num_messages:,}",
                f"{cost.forward.num_steps + cost.backward.num_steps:,}",
            ]
        )
    return columns(heading, rows)
