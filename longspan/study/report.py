"""What a study has found, as tables in Markdown, as JSON and as a figure."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longspan.data.files import write_whole
from longspan.errors import ConfigError
from longspan.launch import num_cores
from longspan.study.figures import accuracy_of, draw, loss_of, values_of
from longspan.study.grid import ALL, NUM_LAYERS, RATIOS, Grid
from longspan.study.paper import TABLES, agreements
from longspan.study.results import Row, Spread, rows_of
from longspan.study.size import Size


def write_report(study: Path, grid: Grid, size: Size) -> list[Path]:
    """Write study.md, study.json and study.svg into the folder of a study, of what is done so far; their paths.

    Raises:
        ConfigError: for a summary that cannot be read, and for files that cannot be written.
    """
    rows = rows_of(study, grid)
    paths = [study / f"study.{ending}" for ending in ("md", "json", "svg")]
    try:
        draw(rows, paths[2])
        write_whole(paths[1], (json.dumps(as_json(rows, grid, size), indent=1) + "\n").encode())
        write_whole(paths[0], as_markdown(rows, grid, size).encode())
    except OSError as error:
        raise ConfigError(f"the report could not be written to {study}: {error}. Make room or give access") from error
    return paths


def as_json(rows: Sequence[Row], grid: Grid, size: Size) -> dict[str, Any]:
    """Everything that the tables say, and what it was made by."""
    losses = values_of(rows, "text", loss_of)
    return {
        "size": size.as_json(),
        "seeds": list(grid.seeds),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": num_cores(),
        "rows": [asdict(row) for row in rows],
        "lasp2": {
            name: {f"{mixer}, {ratio}": loss for (mixer, ratio), loss in table.items()}
            for name, table in TABLES.items()
        },
        "ordering": {name: [asdict(found) for found in every] for name, every in agreements(losses).items()},
    }


def as_markdown(rows: Sequence[Row], grid: Grid, size: Size) -> str:
    """The tables."""
    done, wanted = sum(row.num_done for row in rows), len(grid.cells)
    parts = [
        "# Mixers beside each other",
        f"{done} of {wanted} trainings are done, of {len(grid.seeds)} seeds. " + _described(size),
    ]
    if done < wanted:
        parts.append("**Not all is done: means of fewer seeds stand beside each other.**")
    for task, title, value in _TABLES:
        found = values_of(rows, task, value)
        if found:
            parts += [f"## {title}", _matrix(found, "mixer")]
    for task in grid.tasks:
        of_task = [row for row in rows if row.group.task == task and row.num_done]
        if of_task:
            parts += [f"## All numbers: {task}", _numbers(of_task)]
    parts += _beside_the_paper(rows)
    if done:
        parts.append("![Losses and accuracies over the share of softmax layers](study.svg)")
    return "\n\n".join(parts) + "\n"


_TABLES: tuple[tuple[str, str, Callable[[Row], Spread | None]], ...] = (
    ("text", "Text: validation loss, nats per token", loss_of),
    ("recall", "Associative recall: accuracy of answers", accuracy_of),
)


def _described(size: Size) -> str:
    text = size.text_steps * size.text_batch_tokens
    recall = size.recall_steps * size.recall_batch_tokens
    return (
        f"Models of {NUM_LAYERS} layers, width {size.dim}, {size.num_heads} heads, feed-forward {size.hidden_dim}. Text "
        f"({', '.join(size.text_source)}): {text:,} tokens in sequences of {size.text_seq_len:,}, BPE of "
        f"{size.text_vocab_size:,}. Recall: {recall:,} tokens in sequences of {size.recall_seq_len:,} with {size.recall_pairs} "
        f"pairs of {size.recall_vocab_size} words; naming one of a sequence's values at random is right "
        f"{1 / size.recall_pairs:.1%} of the time. Numbers are means over seeds ± the standard deviation of the seeds."
    )


def _matrix(found: dict[tuple[str, str], Spread], first: str) -> str:
    """Mixers down, shares of softmax layers across."""
    shares = [ratio for ratio in (*RATIOS, ALL) if any(place[1] == ratio for place in found)]
    mixers = list(dict.fromkeys(mixer for mixer, _ in found))
    lines = [[first, *shares]]
    for mixer in mixers:
        lines.append([mixer, *(str(found.get((mixer, ratio), "")) for ratio in shares)])
    return _table(lines)


def _numbers(rows: Sequence[Row]) -> str:
    lines = [["mixer", "softmax layers", "parameters", "loss", "bits per byte", "accuracy", "tokens/s", "seeds"]]
    for row in rows:
        speed = "" if row.tokens_per_second is None else row.tokens_per_second.rounded(0)
        lines.append(
            [
                row.group.mixer,
                row.group.ratio,
                "" if row.parameters is None else f"{row.parameters:,}",
                *("" if value is None else str(value) for value in (row.loss, row.bits_per_byte, row.accuracy)),
                speed,
                str(row.num_done),
            ]
        )
    # A task has no use for some of them.
    kept = [index for index in range(len(lines[0])) if any(line[index] for line in lines[1:])]
    return _table([[line[index] for index in kept] for line in lines])


def _beside_the_paper(rows: Sequence[Row]) -> list[str]:
    losses = values_of(rows, "text", loss_of)
    parts: list[str] = []
    for name, found in agreements(losses).items():
        table = TABLES[name]
        both = [place for place in table if place in losses]
        if not found:
            continue
        lines = [["mixer", "softmax layers", f"LASP-2, {name}", "this study"]]
        lines += [[mixer, ratio, f"{table[mixer, ratio]:.3f}", str(losses[mixer, ratio])] for mixer, ratio in both]
        parts += [f"## Beside {name} of LASP-2", _table(lines), "\n".join(f"- {agreement}" for agreement in found)]
    if parts:
        parts.insert(
            0,
            "The losses of LASP-2 (arXiv 2502.07563) are those of 1 billion parameters after 50 billion tokens of SlimPajama. What "
            "can be compared is the order.",
        )
    return parts


def _table(lines: Sequence[Sequence[str]]) -> str:
    header, *rest = lines
    written = [header, ["---"] * len(header), *rest]
    return "\n".join("| " + " | ".join(line) + " |" for line in written)
