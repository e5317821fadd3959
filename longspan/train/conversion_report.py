"""What became of a Llama: a table, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from longspan.models.conversion.mapping import MappedTensor
from longspan.train.transfer import Transfer, Transferred


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    source: the Llama's folder. operators: the mixer of each layer. transferred: errors of attention transfer, or None where it was
    left out. notes: what else is to be said, such as of the tokenizer.
    """

    source: str
    operators: tuple[str, ...]
    tensors: tuple[MappedTensor, ...]
    transfer: Transfer
    transferred: Transferred | None
    notes: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(tensor.num_parameters for tensor in self.tensors)

    @property
    def num_taken(self) -> int:
        """Parameters that the Llama's weights decide."""
        return sum(tensor.num_taken for tensor in self.tensors)

    def as_json(self) -> str:
        """Everything, as JSON."""
        values: dict[str, Any] = {
            "source": self.source,
            "operators": list(self.operators),
            "num_parameters": self.num_parameters,
            "num_taken": self.num_taken,
            "transfer": asdict(self.transfer),
            "error_before": None if self.transferred is None else dict(self.transferred.before),
            "error_after": None if self.transferred is None else dict(self.transferred.after),
            "notes": list(self.notes),
            "tensors": [
                {**asdict(tensor), "num_parameters": tensor.num_parameters, "num_new": tensor.num_new}
                for tensor in self.tensors
            ],
        }
        return json.dumps(values, indent=1) + "\n"

    def as_markdown(self) -> str:
        """Everything, as a page."""
        lines = ["# Conversion", "", *self.summary(), ""]
        if self.transferred is not None:
            lines += ["| layer | mixer | error before | error after |", "|---|---|---|---|"]
            lines += [
                f"| {layer} | {self.operators[layer]} | {error:.4f} | {self.transferred.after[layer]:.4f} |"
                for layer, error in self.transferred.before.items()
            ]
            lines.append("")
        lines += ["| tensor | shape | made of | how | share of all | of it new |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {tensor.name} | {' × '.join(map(str, tensor.shape))} | {', '.join(tensor.sources) or '-'} | {tensor.how} | "
            f"{tensor.num_parameters / self.num_parameters:.2%} | {tensor.num_new / tensor.num_parameters:.0%} |"
            for tensor in self.tensors
        ]
        return "\n".join([*lines, ""])

    def summary(self) -> list[str]:
        """Few lines: how much was taken over, what is new by mixer, what attention transfer gave, notes."""
        copied = sum(tensor.num_taken for tensor in self.tensors if tensor.how == "copied")
        total = self.num_parameters
        lines = [
            f"{self.source}: {total:,} parameters; {copied / total:.1%} copied, {(self.num_taken - copied) / total:.1%} otherwise "
            f"made of the Llama's, {1 - self.num_taken / total:.1%} new",
            f"layers {_runs(self.operators)}",
        ]
        for operator in dict.fromkeys(name for name in self.operators if name != "softmax"):
            lines.append(f"{operator}: {self._of_mixer(operator)}")
        if self.transferred is not None:
            before, after = (_mean(errors.values()) for errors in (self.transferred.before, self.transferred.after))
            lines.append(
                f"attention transfer, {self.transfer.steps} steps of {self.transfer.batch_tokens:,} tokens: error of an L layer's "
                f"output {before:.4f} before, {after:.4f} after, on held-out text (docs/conversion.md)"
            )
        return [*lines, *self.notes]

    def _of_mixer(self, operator: str) -> str:
        """How the weights of the first layer of a mixer were made."""
        layer = self.operators.index(operator)
        start = f"blocks.{layer}.mixer."
        own = [tensor for tensor in self.tensors if tensor.name.startswith(start)]
        own += [tensor for tensor in self.tensors if tensor.name.startswith(f"shared.{operator}.")]
        by_how: dict[str, list[str]] = {}
        for tensor in own:
            by_how.setdefault(tensor.how, []).append(tensor.name.removeprefix(start).removesuffix(".weight"))
        return "; ".join(f"{', '.join(names)} {how}" for how, names in by_how.items())


def _runs(names: Sequence[str]) -> str:
    """Names with how often each stands in a row: ``3 × gla, softmax``."""
    found: list[tuple[str, int]] = []
    for name in names:
        if found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + 1)
        else:
            found.append((name, 1))
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in found)


def _mean(values: Any) -> float:
    numbers = list(values)
    return float(sum(numbers) / len(numbers))
