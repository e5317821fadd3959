"""What bfloat16 states cost in accuracy: the tables of docs/exchange.md: ``python -m benchmarks.rounding``.

Everything but the states' way between ranks is float32, and is compared with one process in float64.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan
from benchmarks.harness import Table, machine, run_ranks
from longspan.exchange import TOPOLOGIES as EXCHANGES

SEQ_LEN, NUM_HEADS, SIZE = 2048, 4, 64
OPERATORS = ("simple_gla", "gated_delta_rule")
TOPOLOGIES = ("all_gather", "ring", "pipelined", "all_to_all", "two_level")
CASES = [(topology, state_dtype) for topology in TOPOLOGIES for state_dtype in (torch.bfloat16, None)]
NUM_RANKS = (2, 4, 8)

Errors = dict[str, float]


def inputs(operator: str) -> dict[str, Tensor]:
    """Float64 inputs whose states keep about e^-8 of the first token at the last, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(1, SEQ_LEN, NUM_HEADS, *sizes, generator=generator, dtype=torch.float64)

    made = {"q": normal(SIZE), "k": F.normalize(normal(SIZE), dim=-1), "v": normal(SIZE)}
    made["g"] = -normal().abs() / 200
    if operator == "gated_delta_rule":
        made["beta"] = normal().sigmoid()
    return made | {"grad": normal(SIZE)}


def run(
    operator: str, values: dict[str, Tensor], layout: longspan.SequenceLayout | None, exchange: object
) -> dict[str, Tensor]:
    """The output and every gradient."""
    leaves = {name: x.clone().requires_grad_() for name, x in values.items() if name != "grad"}
    options: dict[str, Any] = {name: x for name, x in leaves.items() if name not in ("q", "k", "v")}
    options["exchange"] = exchange
    memory = longspan.write(operator, leaves["k"], leaves["v"], **options, layout=layout)
    o = memory.read(leaves["q"])
    o.backward(values["grad"])
    return {"o": o.detach()} | {f"∂{name}": x.grad for name, x in leaves.items() if x.grad is not None}


def squares(operator: str, reference: str) -> list[dict[str, tuple[float, float]]]:
    """Sums over this rank's tokens of the squares of errors and of exact values, for each case of `CASES`."""
    num_ranks = torch.distributed.get_world_size()
    layout = longspan.SequenceLayout(SEQ_LEN, ranks_per_node=2 if num_ranks > 2 else 1)
    values = {name: layout.shard(x).float() for name, x in inputs(operator).items()}
    exact = {name: layout.shard(x) for name, x in torch.load(reference).items()}
    found = []
    for topology, state_dtype in CASES:
        got = run(operator, values, layout, EXCHANGES[topology](state_dtype))
        sums = {name: (got[name] - exact[name]).square().sum() for name in exact}
        found.append({name: (float(sums[name]), float(exact[name].square().sum())) for name in exact})
    return found


def errors(num_ranks: int, operator: str, reference: str) -> dict[tuple[str, torch.dtype | None], Errors]:
    """‖error‖ / ‖exact‖ over all ranks, of the output and every gradient, for each case."""
    by_rank = run_ranks(num_ranks, squares, operator, reference)
    found = {}
    for case, of_ranks in zip(CASES, zip(*by_rank, strict=True), strict=True):
        totals = {name: torch.tensor([rank[name] for rank in of_ranks]).sum(0) for name in of_ranks[0]}
        found[case] = {name: float((total[0] / total[1]).sqrt()) for name, total in totals.items()}
    return found


def table(operator: str) -> Table:
    names = list(inputs(operator))[:-1]
    result = Table(
        f"rounding-{operator}",
        f"{operator}: ‖error‖ / ‖exact‖ with bfloat16 states, {SEQ_LEN:,} tokens, B1 H{NUM_HEADS} K = V = {SIZE}; two_level with "
        "nodes of two ranks (of one for two ranks)",
        "bfloat16's rounding, at most 2⁻⁸, on the part of the results that comes from other ranks",
        ["topology", "ranks", "o", *(f"∂{name}" for name in names), "float32 states, worst of them"],
    )
    with tempfile.TemporaryDirectory() as folder:
        reference = str(Path(folder) / "exact.pt")
        torch.save(run(operator, inputs(operator), None, "auto"), reference)
        of_ranks = {num_ranks: errors(num_ranks, operator, reference) for num_ranks in NUM_RANKS}
    for topology in TOPOLOGIES:
        for num_ranks, found in of_ranks.items():
            rounded, plain = found[topology, torch.bfloat16], found[topology, None]
            worst = max(x if x == x else float("inf") for x in plain.values())
            cells = [f"{rounded[name]:.1e}" for name in ("o", *(f"∂{name}" for name in names))]
            result.add(f"`{topology}`", num_ranks, *cells, f"{worst:.0e}")
    return result


def main() -> None:
    print(", ".join(f"{key} {value}" for key, value in machine().items()) + "\n", flush=True)
    for operator in OPERATORS:
        print(table(operator).markdown(), flush=True)


if __name__ == "__main__":
    main()
