"""A loss may take any part of what an operator returns, another one on each rank: gradients are right, and so is the next call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import longspan
from longspan.attention.softmax import SOFTMAX_METHODS, SoftmaxMethod
from longspan.layout import SequenceLayout
from longspan.ops.variants import VARIANTS
from tests.attention.test_conformance import documents_of, packings_of
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.variants import Inputs, make_inputs, operator_of, reference, shard_gates

SEQ_LEN = 23
EXCHANGES = ("all_gather", "ring", "pipelined", "neighbour", "all_to_all", "two_level")


@dataclass(frozen=True)
class Part:
    """Which parts of the outputs enter a rank's loss, and which inputs take gradients there.

    reads: numbers of two reads of a memory. final: the final state. form: how the operator is called.
    """

    reads: tuple[int, ...] = (0,)
    final: bool = True
    frozen: tuple[str, ...] = ()
    form: str = "write and read"


ALL = Part((0, 1))
ALL_BUT_Q = ("k", "v", "g", "beta", "initial_state")
PARTS: dict[str, Callable[[int], Part]] = {
    "the final state alone": lambda rank: Part((), True),
    "the final state alone, asked for first": lambda rank: Part((), True, form="final first"),
    "the final state alone, never read": lambda rank: Part((), True, form="never read"),
    "o alone": lambda rank: Part((0,), False),
    "o on the first rank, the final state on the others": lambda rank: Part((0,) if rank == 0 else (), rank > 0),
    "the final state on the first rank, o on the others": lambda rank: Part((0,) if rank > 0 else (), rank == 0),
    "another read on each rank": lambda rank: Part((rank % 2,), rank > 0),
    "the first read, after one without gradients": lambda rank: Part((0,), rank == 0, form="first without gradients"),
    "queries frozen on the first rank": lambda rank: Part((0,), True, ("q",) if rank == 0 else ()),
    "queries frozen": lambda rank: Part((0,), False, ("q",)),
    "keys and values frozen on the last rank": lambda rank: Part((0,), True, ALL_BUT_Q if is_last(rank) else ()),
    "keys and values frozen on the first rank": lambda rank: Part((0,), False, ALL_BUT_Q if rank == 0 else ()),
    "keys and values frozen": lambda rank: Part((0,), False, ALL_BUT_Q),
    "gates frozen on the first rank": lambda rank: Part((0,), True, ("g", "beta") if rank == 0 else ()),
    "o alone, in one call": lambda rank: Part((0,), False, form="one call"),
    "the final state alone, recomputed": lambda rank: Part((), True, form="checkpoint"),
    "o here, the final state there, recomputed": lambda rank: Part((0,) if rank else (), not rank, form="checkpoint"),
    "the final state alone, recomputed by the engine": lambda rank: Part((), True, form="reentrant checkpoint"),
    "o alone, recomputed by the engine": lambda rank: Part((0,), False, form="reentrant checkpoint"),
}


def is_last(rank: int) -> bool:
    return rank == dist.get_world_size() - 1


def expected_gradients(inputs: Inputs, name: str, parts: list[Part], layout: SequenceLayout) -> dict[str, Tensor]:
    o, final = reference(name, inputs)
    rank_of = torch.empty(layout.seq_len, dtype=torch.int64)
    for rank in range(layout.num_ranks):
        for start, stop in layout.segments_of(rank):
            rank_of[start:stop] = rank
    reads = torch.tensor([sum(1.0 + read for read in part.reads) for part in parts], dtype=torch.float64)
    weights = torch.tensor([(rank + 1.0) * part.final for rank, part in enumerate(parts)], dtype=torch.float64)
    loss = (o * inputs.grad_o * reads[rank_of][:, None, None]).sum() + weights.sum() * (final * inputs.grad_final).sum()
    grads = torch.autograd.grad(loss, inputs.leaves(), allow_unused=True, materialize_grads=True)
    return dict(zip(inputs.leaf_names(), grads, strict=True))


def error_of(name: str, inputs: Inputs, layout: SequenceLayout, exchange: str, part_of: Callable[[int], Part]) -> float:
    """The largest error of this rank's gradients."""
    parts = [part_of(rank) for rank in range(layout.num_ranks)]
    part, rank = parts[layout.rank], layout.rank
    expected = expected_gradients(inputs, name, parts, layout)
    leaves = {key: layout.shard(x.detach()) for key, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))}
    gates = shard_gates(name, {key: x.detach() for key, x in inputs.gates.items()}, layout)
    leaves |= {key: gates[key] for key in inputs.differentiable}
    leaves["initial_state"] = inputs.initial_state.detach().clone()
    leaves = {key: x.clone().requires_grad_(key not in part.frozen) for key, x in leaves.items()}
    constants = {key: x for key, x in gates.items() if key not in leaves}

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(leaves, tensors, strict=True))
        q = given.pop("q")
        options: dict[str, Any] = {"output_final_state": True, "layout": layout, "exchange": exchange, "chunk_size": 4}
        if part.form == "one call":
            o, final = operator_of(name)(q, **given, **constants, scale=inputs.scale, **options)
            return o, o * 2, final
        options |= given | constants
        memory = longspan.write(name, options.pop("k"), options.pop("v"), **options)
        if part.form == "final first":
            memory.final_state()
        if part.form == "first without gradients":
            with torch.no_grad():
                memory.read(q, inputs.scale)
        if part.form == "never read":
            return memory.final_state().new_zeros(()), memory.final_state().new_zeros(()), memory.final_state()
        o = memory.read(q, inputs.scale)
        return o, memory.read(q, inputs.scale) * 2, memory.final_state()

    if "checkpoint" in part.form:
        outputs = checkpoint(call, *leaves.values(), use_reentrant=part.form.startswith("reentrant"))
    else:
        outputs = call(*leaves.values())
    losses = [(outputs[read] * layout.shard(inputs.grad_o)).sum() for read in part.reads]
    losses += [(rank + 1.0) * (outputs[2] * inputs.grad_final).sum()] if part.final else []
    torch.stack(losses).sum().backward()
    errors = [0.0]
    initial = leaves["initial_state"].grad
    initial = torch.zeros_like(inputs.initial_state) if initial is None else initial.clone()
    dist.all_reduce(initial)
    if all("initial_state" not in other.frozen for other in parts):
        errors.append(relative_error(initial, expected["initial_state"], 1e-3))
    for key, x in leaves.items():
        if key == "initial_state":
            continue
        assert (x.grad is None) or key not in part.frozen
        if key not in part.frozen:
            grad = torch.zeros_like(x) if x.grad is None else x.grad
            errors.append(relative_error(grad, layout.shard(expected[key]), 1e-3))
    return worst(errors)


def failures(name: str, exchanges: tuple[str, ...], orders: tuple[Any, ...]) -> list[str]:
    found = []
    for exchange in exchanges:
        for order in orders:
            documents = documents_of(packings_of(exchange)[-1], SEQ_LEN) if exchange == "neighbour" else None
            if documents is None and order == "zigzag":
                documents = [0, 5, 18, SEQ_LEN]
            layout = SequenceLayout(SEQ_LEN, order=order, documents=documents)
            inputs = make_inputs(name, SEQ_LEN, documents=documents)
            for what, part_of in PARTS.items():
                error = error_of(name, inputs, layout, exchange, part_of)
                after = error_of(name, inputs, layout, exchange, lambda rank: ALL)
                if error > 1e-10 or after > 1e-10:
                    found.append(f"{exchange}, {order}, {what}: {error:g}, the next call {after:g}")
    return found


# The rest is slow: what every topology and operator has in common is seen by one of them.
QUICK = [("simple_gla", 2, exchange) for exchange in EXCHANGES] + [("gated_delta_rule", 3, "all_gather")]
EVERY = [(name, num_ranks, exchange) for name in VARIANTS for num_ranks in (2, 3) for exchange in EXCHANGES]


@pytest.mark.slow_rows(r"-2-(two_level|all_to_all)", r"-(neighbour|ring|pipelined)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gated_delta_rule-3-all_gather$")
@pytest.mark.parametrize(
    ("name", "num_ranks", "exchange"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in EVERY],
)
def test_every_rank_may_take_its_own_part_of_the_outputs(name: str, num_ranks: int, exchange: str) -> None:
    orders = ("zigzag",) if (name, num_ranks, exchange) in QUICK else ("contiguous", "zigzag")
    for found in run_on_ranks(num_ranks, failures, name, (exchange,), orders, timeout=300):
        assert found == []


def error_of_layer(kind: str, order: Any, part: str) -> float:
    """The largest error of this rank's gradients for a layer of another kind, of which each rank takes `part`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    documents = [0, 5, 18, SEQ_LEN]
    layout, whole = SequenceLayout(SEQ_LEN, order=order, documents=documents), SequenceLayout.local(SEQ_LEN, documents)
    rank = layout.rank
    first, others = part.split(" | ")
    mine = first if rank == 0 else others
    if kind == "convolution":
        everything = {"x": normal(1, SEQ_LEN, 3), "weight": normal(3, 4)}
        upstream = [normal(1, SEQ_LEN, 3), normal(3, 3, 3)]
    else:
        everything = {key: normal(1, SEQ_LEN, 6, 4) for key in "qkv"}
        upstream = [normal(1, SEQ_LEN, 6, 4)] * 2

    def call(given: dict[str, Tensor], layout: SequenceLayout) -> list[Tensor]:
        if kind == "convolution":
            return list(longspan.causal_conv1d(given["x"], given["weight"], layout=layout, output_final_state=True))
        if kind in ("linear_attention", "retention"):
            gates: Any = {"log_decay": torch.full((6,), -0.1, dtype=torch.float64)} if kind == "retention" else {}
            memory: longspan.Memory[Any] = longspan.write(
                kind, given["k"], given["v"], **gates, causal=False, layout=layout, exchange="all_gather"
            )
        else:
            methods: dict[str, SoftmaxMethod] = {name: name for name in SOFTMAX_METHODS}
            memory = longspan.write("softmax", given["k"], given["v"], layout=layout, method=methods[kind], num_heads=6)
        return [memory.read(given["q"]), memory.read(given["q"])]

    def loss(outputs: list[Tensor], layout: SequenceLayout, taken: str) -> Tensor:
        terms = []
        if "first" in taken or "frozen" in taken:
            terms.append((outputs[0] * layout.shard(upstream[0])).sum())
        if "second" in taken:
            terms.append((outputs[1] * (upstream[1] if kind == "convolution" else layout.shard(upstream[1]))).sum())
        return torch.stack(terms).sum()

    frozen = {"x", "k", "v"} if "frozen" in mine else set()
    leaves = {
        key: (x if key == "weight" else layout.shard(x)).clone().requires_grad_(key not in frozen)
        for key, x in everything.items()
    }
    loss(call(leaves, layout), layout, mine).backward()

    exact = {key: x.clone().requires_grad_() for key, x in everything.items()}
    expected_outputs = call(exact, whole)
    total = torch.zeros((), dtype=torch.float64)
    for number in range(layout.num_ranks):
        taken = first if number == 0 else others
        masked = []
        for place, out in enumerate(expected_outputs):
            mask = torch.zeros(SEQ_LEN, dtype=torch.float64)
            for start, stop in layout.segments_of(number):
                mask[start:stop] = 1.0
            is_final = kind == "convolution" and place == 1
            masked.append(out if is_final else out * mask.view(1, -1, *[1] * (out.dim() - 2)))
        total = total + loss(masked, whole, taken)
    total.backward()
    errors = [0.0]
    for key, x in leaves.items():
        want, got = exact[key].grad, x.grad
        want = torch.zeros_like(x) if want is None and key == "weight" else want
        assert want is not None
        if key == "weight":
            got = torch.zeros_like(x) if got is None else got.clone()
            dist.all_reduce(got)
        elif key in frozen:
            assert got is None
            continue
        else:
            want = layout.shard(want)
            got = torch.zeros_like(x) if got is None else got
        errors.append(relative_error(got, want, 1e-3))
    return worst(errors)


def errors_of_layers(cases: list[tuple[str, Any, str]]) -> dict[tuple[str, Any, str], float]:
    return {case: error_of_layer(*case) for case in cases}


@pytest.mark.slow_rows(r"^2")
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_may_take_its_own_part_of_other_layers(num_ranks: int) -> None:
    cases: list[tuple[str, Any, str]] = []
    methods = ("all_gather", "ring", "ulysses")
    for order in ("contiguous", "zigzag"):
        for part in ("second | second", "first | first", "first | second", "second | first", "frozen | first"):
            cases += [("convolution", order, part), ("convolution", order, "first and second | frozen")]
        for kind in ("linear_attention", "retention", *methods):
            cases += [(kind, order, part) for part in ("first and second | first and second", "frozen | first")]
            cases += [(kind, order, "first | frozen")]
        for kind in ("linear_attention", "retention"):
            cases += [(kind, order, "first | second"), (kind, order, "second | first and second")]
    for errors in run_on_ranks(num_ranks, errors_of_layers, cases, timeout=300):
        assert worst(errors) < 1e-10, {case: error for case, error in errors.items() if not error < 1e-10}
