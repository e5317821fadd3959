"""Documents are isolated from each other: NaN and infinity in one change no bit of the others, forward or backward, on any rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.attention.softmax import SOFTMAX_METHODS
from longspan.layout import SequenceLayout
from longspan.ops.gates import DecayKind
from longspan.ops.variants import VARIANTS
from tests.ranks import run_on_ranks
from tests.variants import NUM_SLOTS, make_inputs

SEQ_LEN = 30
# The second and the third meet inside a segment that both cross the edge of; short ones reach no further than the next segment.
LONG, SHORT = [0, 4, 14, 22, 25, 30], [0, 4, 6, 9, 12, 14, 18, 21, 23, 26, 30]
BAD = (float("nan"), float("inf"))

Tensors = dict[str, Tensor]
Call = Callable[[Tensors, SequenceLayout], tuple[Tensors, Tensors]]
"""Outputs, and gradients, of named global inputs that a layout shards."""


def changed_bits(
    call: Call, inputs: Tensors, by_document: set[str], layout: SequenceLayout, document: int
) -> list[str]:
    """Which outputs and gradients of other documents differ when one document's inputs hold NaN or infinity, input by input."""
    start, stop = layout.document_bounds[document], layout.document_bounds[document + 1]
    expected = [kept(results, by_document, layout, document) for results in call(inputs, layout)]
    assert all(bool(x.isfinite().all()) for results in expected for x in results.values())
    changed = []
    for name in inputs:
        # One value of each kind for each input would say no more: where 0 · NaN is NaN, so is 0 · infinity.
        for bad in BAD if name == "v" else BAD[:1]:
            planted = {key: x.clone() for key, x in inputs.items()}
            if name in by_document:
                planted[name][document] = bad
            else:
                planted[name][:, start:stop] = bad
            got = [kept(results, by_document, layout, document) for results in call(planted, layout)]
            changed += [
                f"{bad} in {name}: {key}"
                for results, wanted in zip(got, expected, strict=True)
                for key, x in results.items()
                if not torch.equal(x, wanted[key])
            ]
    return changed


def kept(results: Tensors, by_document: set[str], layout: SequenceLayout, document: int) -> Tensors:
    """What belongs to the other documents: rows of those that have one per document, this rank's tokens of the rest."""
    tokens = [row for piece in layout.pieces if piece.document != document for row in range(piece.start, piece.stop)]
    documents = [number for number in range(layout.num_documents) if number != document]
    return {key: x[documents] if key in by_document else x[:, tokens] for key, x in results.items()}


def linear_call(name: str, exchange: str, chunk_size: int | None) -> Call:
    def call(inputs: Tensors, layout: SequenceLayout) -> tuple[Tensors, Tensors]:
        leaves = {
            key: (x if key == "initial_state" else layout.shard(x)).clone().requires_grad_()
            for key, x in inputs.items()
            if not key.startswith("grad")
        }
        gates: Any = {gate.name: leaves[gate.name] for gate in VARIANTS[name].gates if gate.name in leaves}
        if name == "retention":
            gates["log_decay"] = torch.tensor([-0.1, -0.7], dtype=torch.float64)
        if name == "gla_with_bonus":
            # What all documents share takes a gradient of all.
            gates["u"] = torch.tensor([[0.2, 0.5, 2.0], [1.0, -0.3, 0.0]], dtype=torch.float64)
        memory = longspan.write(
            name,
            leaves["k"],
            leaves["v"],
            **gates,
            initial_state=leaves["initial_state"],
            output_final_state=True,
            layout=layout,
            exchange=exchange,
            chunk_size=chunk_size,
        )
        o, final = memory.read(leaves["q"]), memory.final_state()
        grads = torch.autograd.grad(
            [o, final], list(leaves.values()), [layout.shard(inputs["grad_o"]), inputs["grad_final"]]
        )
        return {"o": o.detach(), "final_state": final.detach()}, dict(zip(leaves, grads, strict=True))

    return call


def linear_inputs(name: str, documents: list[int]) -> Tensors:
    inputs = make_inputs(name, SEQ_LEN, documents=documents)
    planted = [gate.name for gate in VARIANTS[name].gates if "T" in gate.dims and not gate.is_log_decay]
    gates = {key: inputs.gates[key] for key in planted}
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **gates, "initial_state": inputs.initial_state}
    tensors |= {"grad_o": inputs.grad_o, "grad_final": inputs.grad_final}
    return {key: x.detach() for key, x in tensors.items()}


def changed_by_linear(name: str, order: Any, exchanges: list[str], documents_of_layout: list[int]) -> list[str]:
    changed = []
    layout = SequenceLayout(SEQ_LEN, order=order, documents=documents_of_layout, ranks_per_node=ranks_per_node())
    inputs = linear_inputs(name, documents_of_layout)
    by_document = {"initial_state", "final_state", "grad_final"}
    if any(gate.name == "g" for gate in VARIANTS[name].gates):
        channels = [NUM_SLOTS if VARIANTS[name].has_slots else 3]
        shape = [1, SEQ_LEN, 2] + (channels if VARIANTS[name].decay is DecayKind.CHANNEL else [])
        constant = -torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for exchange in exchanges:
        plain = linear_call(name, exchange, 4)

        def call(tensors: Tensors, layout: SequenceLayout, plain: Call = plain) -> tuple[Tensors, Tensors]:
            # A log decay may not be NaN: it is not among what is planted.
            gates = {"g": constant} if any(gate.name == "g" for gate in VARIANTS[name].gates) else {}
            return plain(tensors | gates, layout)

        for document in (1, 2):
            found = changed_bits(call, inputs, by_document, layout, document)
            changed += [f"{exchange}, document {document}: {what}" for what in found]
    return changed


def ranks_per_node() -> int:
    size = dist.get_world_size()
    return 2 if size % 2 == 0 else 1


SPLITS = [(3, "contiguous")]
MORE = [(2, "zigzag"), (1, "contiguous"), (2, "contiguous"), (3, "zigzag")]


@pytest.mark.slow_rows(
    r"^(gla|delta_rule)-",
    r"^(linear_attention|retention|kda|gated_delta_rule)-",
    r"^(gla_with_bonus|comba|gated_delta_product|gated_slot_attention)-",
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^dplr_delta_rule-")
@pytest.mark.parametrize(
    ("num_ranks", "order"), [*SPLITS, *(pytest.param(*split, marks=pytest.mark.slow) for split in MORE)]
)
@pytest.mark.parametrize("name", VARIANTS)
def test_nan_and_infinity_stay_in_their_document(name: str, order: str, num_ranks: int) -> None:
    exchanges = ["all_gather", "ring", "all_to_all"]
    for documents, topologies in ((LONG, exchanges), (SHORT, ["neighbour"])):
        for changed in run_on_ranks(num_ranks, changed_by_linear, name, order, topologies, documents):
            assert changed == []


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", VARIANTS)
def test_nan_and_infinity_stay_in_their_document_over_nodes(name: str, order: str) -> None:
    for changed in run_on_ranks(4, changed_by_linear, name, order, ["two_level", "all_to_all"], LONG):
        assert changed == []


def changed_by_others(kind: str, order: Any, option: Any) -> list[str]:
    layout = SequenceLayout(SEQ_LEN, order=order, documents=LONG)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def call(inputs: Tensors, layout: SequenceLayout) -> tuple[Tensors, Tensors]:
        leaves = {
            key: (x if key == "initial_state" else layout.shard(x)).clone().requires_grad_()
            for key, x in inputs.items()
            if not key.startswith("grad")
        }
        if kind == "softmax":
            outputs = {
                "o": longspan.softmax_attention(
                    leaves["q"], leaves["k"], leaves["v"], layout=layout, method=option, causal=True
                )
            }
        elif kind == "both directions":
            gates: Any = {"log_decay": torch.tensor([-0.1, -0.7], dtype=torch.float64)} if option == "retention" else {}
            memory = longspan.write(
                option, leaves["k"], leaves["v"], **gates, causal=False, layout=layout, exchange="all_gather"
            )
            outputs = {"o": memory.read(leaves["q"])}
        elif kind == "convolution":
            y, final = longspan.causal_conv1d(
                leaves["x"], weight, layout=layout, initial_state=leaves["initial_state"], output_final_state=True
            )
            outputs = {"o": y, "final_state": final}
        else:
            outputs = {"o": longspan.token_shift(leaves["x"], layout=layout)}
        upstream = [inputs["grad_final"] if key == "final_state" else layout.shard(inputs["grad_o"]) for key in outputs]
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
        return {key: x.detach() for key, x in outputs.items()}, dict(zip(leaves, grads, strict=True))

    weight = normal(5, 4)
    if kind in ("softmax", "both directions"):
        inputs = {key: normal(1, SEQ_LEN, 6, 4) for key in ("q", "k", "v", "grad_o")}
        if kind == "both directions":
            inputs = {key: x[:, :, :2] for key, x in inputs.items()}
    else:
        inputs = {key: normal(1, SEQ_LEN, 5) for key in ("x", "grad_o")}
    if kind == "convolution":
        inputs |= {key: normal(len(LONG) - 1, 3, 5) for key in ("initial_state", "grad_final")}
    by_document = {"initial_state", "final_state", "grad_final"}
    return [what for document in (1, 2) for what in changed_bits(call, inputs, by_document, layout, document)]


OTHERS: list[tuple[str, str | None]] = [("softmax", method) for method in SOFTMAX_METHODS if method != "auto"]
OTHERS += [
    ("both directions", "linear_attention"),
    ("both directions", "retention"),
    ("convolution", None),
    ("shift", None),
]


@pytest.mark.slow_rows(r"-2-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(softmax-ring|both directions-retention|convolution-None)-3-contiguous$",
    r"^(softmax-ulysses|softmax-all_gather|both directions-linear_attention)-3-zigzag$",
)
@pytest.mark.parametrize(("num_ranks", "order"), [*SPLITS, *MORE])
@pytest.mark.parametrize(("kind", "option"), OTHERS)
def test_nan_and_infinity_stay_in_their_document_in_other_layers(
    kind: str, option: str | None, order: str, num_ranks: int
) -> None:
    for changed in run_on_ranks(num_ranks, changed_by_others, kind, order, option):
        assert changed == []
