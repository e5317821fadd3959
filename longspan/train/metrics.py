"""What a step took and gave: memory, the metrics file, the loss plot."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longspan.errors import CheckpointError
from longspan.train.trackers import Tracker

# Any number that is measured is smaller, the norm of a gradient in float32 before it overflows as well; NaN and infinity are not.
_LARGEST = 1e60


@dataclass
class Totals:
    """What the steps of a run took, those before a resume included: kept in its checkpoints."""

    tokens: int = 0
    seconds: float = 0.0
    seconds_waiting: float = 0.0
    memory_bytes: int = 0
    """The most of any rank."""
    last_loss: float | None = None
    """None before the first step, or where it was not finite."""
    seconds_waiting_for_data: float = 0.0
    tokens_by_document_length: list[int] = field(default_factory=list)
    """Tokens seen of documents of 2^i to 2^(i+1) - 1 tokens, by i, up to the longest seen."""

    def add(self, tokens: int, seconds: float, seconds_waiting: float, memory_bytes: int, loss: float) -> None:
        """Count a step."""
        self.tokens += tokens
        self.seconds += seconds
        self.seconds_waiting += seconds_waiting
        self.memory_bytes = max(self.memory_bytes, memory_bytes)
        self.last_loss = loss if math.isfinite(loss) else None

    def add_data(self, seconds_waiting: float, tokens_by_document_length: np.ndarray) -> None:
        """Count a step's waiting for data, and its tokens by the length of their documents, ``[64]`` by powers of two."""
        self.seconds_waiting_for_data += seconds_waiting
        counts = tokens_by_document_length.copy()
        counts[: len(self.tokens_by_document_length)] += np.array(self.tokens_by_document_length, dtype=np.int64)
        self.tokens_by_document_length = np.trim_zeros(counts, "b").tolist()

    @property
    def by_document_length(self) -> dict[str, int]:
        """Tokens seen of documents of so many tokens, by ranges such as ``"1024-2047"``, from the shortest on, none left out."""
        counts = self.tokens_by_document_length
        shortest = next((power for power, count in enumerate(counts) if count), 0)
        return {f"{2**power}-{2 ** (power + 1) - 1}": counts[power] for power in range(shortest, len(counts))}

    @property
    def data_wait_share(self) -> float:
        return self.seconds_waiting_for_data / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        return self.seconds_waiting / self.seconds if self.seconds else 0.0


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with its ``step``; the numbers go to `trackers`, too."""

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self.path = path
        self._trackers = trackers

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; a number that is not finite is written as null, which JSON has.

        Raises:
            CheckpointError: if it cannot be written.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
        except OSError as error:
            raise _unwritten(self.path, error) from error
        for tracker in self._trackers:
            tracker.write(finite)

    def sync(self) -> None:
        """Wait until what was appended is on the disk: a checkpoint of its steps must not outlive it.

        Raises:
            CheckpointError: if it cannot be written.
        """
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def close(self, failed: bool = False) -> None:
        """Let the trackers write what they have not written yet. failed: whether the run ends by an error."""
        for tracker in self._trackers:
            tracker.close(failed)

    def read(self) -> list[dict[str, Any]]:
        """All records, none if there is no file; a last line that a crash cut off is left out.

        Raises:
            CheckpointError: if the file cannot be read, or a line is no record; the message names the line.
        """
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error}. Give access to it, or move it away to go on"
            ) from error
        # Bytes, so that a line that is not UTF-8 is found by its number.
        lines = content.split(b"\n")
        records = []
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                records.append(_record(line))
            except (ValueError, RecursionError) as error:
                if number == len(lines):
                    break
                raise CheckpointError(
                    f"{self.path}, line {number}, {error}. Remove the line, or the whole file, to go on"
                ) from error
        return records

    def cut_after(self, step: int, validates_again: bool = False) -> None:
        """Drop the records of later steps, which a resumed run makes again; with `validates_again` the validation of `step`, too.

        Raises:
            CheckpointError: if the file cannot be read or written, or a line is no record.
        """

        def stays(record: dict[str, Any]) -> bool:
            again = validates_again and record["step"] == step and "validation_loss" in record
            return record["step"] <= step and not again

        kept = [record for record in self.read() if stays(record)]
        temporary = self.path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise _unwritten(self.path, error) from error


def _record(line: bytes) -> dict[str, Any]:
    """The record in a line of the metrics file; raises ValueError if it holds none."""
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("is not an object with a whole number as its step")
    for name, value in record.items():
        if not (value is None or (isinstance(value, bool | int | float) and abs(value) < _LARGEST)):
            raise ValueError(f"has a {name!r} that is no finite number")
    return record


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} could not be written: {error}. Make room or give access, and go on with --resume {path.parent}"
    )


def plot_losses(records: list[dict[str, Any]], baseline: float, baseline_name: str, path: Path) -> None:
    """Draw training and validation loss over the steps, and a baseline, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot([step for step, _ in training], [loss for _, loss in training], label="training", linewidth=1.2)
    axes.plot([step for step, _ in validation], [loss for _, loss in validation], "o-", label="validation")
    axes.axhline(baseline, color="grey", linestyle="--", label=f"{baseline_name} baseline (validation)")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
