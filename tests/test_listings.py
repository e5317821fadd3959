"""The listings of the engines, which are there to be read, equal the recurrences and the engines: outputs and gradients."""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.exchange import start_exchange
from longspan.exchange.listing import entering_states, entering_states_by_ring, gradients_of_leaving_states
from longspan.exchange.topologies.all_gather import AllGather
from longspan.exchange.topologies.ring import Ring
from longspan.layout import SequenceLayout
from longspan.ops.decay.listing import decay_by_chunks
from longspan.ops.delta.listing import delta_rule_by_chunks
from longspan.ops.dplr.listing import low_rank_by_chunks
from longspan.ops.gates import DecayKind
from longspan.ops.slots.listing import slots_by_chunks
from longspan.ops.softmax.listing import softmax_by_blocks
from longspan.ops.variants import VARIANTS
from longspan.state import Dense, Pair
from tests.attention.softmax_reference import dense_attention, random_inputs
from tests.compare import relative_error, worst
from tests.exchange.scan import random_pair
from tests.ops.test_variants import run
from tests.ranks import run_on_ranks
from tests.variants import Inputs, make_inputs

PROJECT_ROOT = Path(__file__).resolve().parent.parent
LISTINGS = sorted((PROJECT_ROOT / "longspan").rglob("listing.py"))


def by_listing(name: str, inputs: Inputs, chunk_size: int) -> dict[str, Tensor]:
    """Outputs, states and gradients of the listing, head by head, in the names of `run`."""
    variant = VARIANTS[name]
    q, k, v = (x[0].movedim(-2, 0) for x in (inputs.q, inputs.k, inputs.v))
    decays = variant.decay.of(inputs.gates)
    g: Tensor = torch.zeros_like(q)
    if decays.constant is not None:
        g = decays.constant[:, None, None].expand_as(q)
    elif decays.in_time is not None and not variant.has_slots:
        g = (
            (decays.in_time if decays.kind is DecayKind.CHANNEL else decays.in_time.unsqueeze(-1))[0]
            .transpose(0, 1)
            .expand_as(q)
        )
    found = []
    gates = {key: x[0].movedim(-1 if key == "beta" else -2, 0) for key, x in inputs.gates.items() if x.dim() > 2}
    for head in range(len(q)):
        arguments: Any = (q[head], k[head], v[head], g[head])
        listing: Any = decay_by_chunks
        if name == "gated_delta_product":
            # Rows one after another, of which a token's first decays and its last reads.
            last, first = (torch.zeros_like(k[head]) for _ in range(2))
            last, first = last.index_fill(1, torch.tensor([1]), 1.0), first.index_fill(1, torch.tensor([0]), 1.0)
            q_rows, g_rows = q[head][:, None] * last, g[head][:, None] * first
            rows = [x.flatten(0, 1) for x in (q_rows, k[head], v[head], g_rows, gates["beta"][head])]
            arguments = (*rows, inputs.initial_state[0, head], inputs.scale, chunk_size)
            o, state = delta_rule_by_chunks(*arguments)
            found.append((o[1::2], state))
            continue
        if name == "gated_slot_attention":
            listing, arguments = slots_by_chunks, (q[head], k[head], v[head], gates["s"][head], gates["g"][head])
        elif name == "dplr_delta_rule":
            listing, arguments = low_rank_by_chunks, (*arguments, gates["a"][head], gates["b"][head])
        elif name == "comba":
            listing, b = low_rank_by_chunks, gates["beta"][head][:, None] * k[head]
            arguments = (q[head], b, v[head], g[head], -gates["p"][head], b)
        elif variant.transition is Dense:
            listing, arguments = delta_rule_by_chunks, (*arguments, gates["beta"][head])
        found.append(listing(*arguments, inputs.initial_state[0, head], inputs.scale, chunk_size))
    o, final = torch.stack([o for o, _ in found], dim=1)[None], torch.stack([state for _, state in found])[None]
    loss = (o * inputs.grad_o).sum() + (final * inputs.grad_final).sum()
    grads = torch.autograd.grad(loss, inputs.leaves())
    return {"o": o, "final": final, **dict(zip(inputs.leaf_names(), grads, strict=True))}


# `gla_with_bonus` is `gla` between two shifts.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gla_with_bonus"])
def test_decay_and_delta_rule(name: str) -> None:
    inputs = make_inputs(name, 23, decay=2.0)
    engine, recurrence = run(name, inputs)
    listing = by_listing(name, inputs, chunk_size=5)
    for other in (engine, recurrence):
        assert worst({key: relative_error(listing[key], want) for key, want in other.items()}) < 1e-12


def test_softmax() -> None:
    q, k, v, up = random_inputs(0, 1, 23, 1, 1, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    listing = softmax_by_blocks(q[0, :, 0], k[0, :, 0], v[0, :, 0], 0.5, 5)[None, :, None]
    engine = longspan.softmax_attention(q, k, v, scale=0.5)
    definition = dense_attention(q, k, v, causal=True, documents=(0, 23), scale=0.5)
    got = [listing, *torch.autograd.grad(listing, leaves, up)]
    for other in (engine, definition):
        want = [other, *torch.autograd.grad(other, leaves, up)]
        assert worst(relative_error(x, y) for x, y in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("find", [entering_states, entering_states_by_ring])
def test_the_exchange_joins_segments_of_a_recurrence(find: Any) -> None:
    """Each segment from zero, with what the exchange says enters it, is the whole; and its reverse is autograd's backward."""
    inputs = make_inputs("gla", 23, heads=1)
    q, k, v, g, up = (x[0, :, 0] for x in (inputs.q, inputs.k, inputs.v, inputs.gates["g"], inputs.grad_o))
    zero = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype)
    whole, _ = decay_by_chunks(q, k, v, g, zero, 1.0, 1)
    segments = [slice(start, stop) for start, stop in pairwise((0, 7, 8, 15, 23))]
    u = [decay_by_chunks(q[s], k[s], v[s], g[s], zero, 1.0, 1)[1] for s in segments]
    a = [g[s].sum(0).exp().diag() for s in segments]
    entering = find(a, u)
    outputs = [decay_by_chunks(q[s], k[s], v[s], g[s], x, 1.0, 1)[0] for s, x in zip(segments, entering, strict=True)]
    assert relative_error(torch.cat(outputs), whole) < 1e-12

    # G is the gradient of what enters each rank, by its own output alone.
    grad_in = [torch.zeros_like(zero)]
    for s, state in zip(segments[1:], entering[1:], strict=True):
        leaf = state.detach().requires_grad_()
        o, _ = decay_by_chunks(q[s], k[s], v[s], g[s], leaf, 1.0, 1)
        grad_in.append(torch.autograd.grad(o, leaf, up[s])[0])
    want = torch.autograd.grad(torch.cat(outputs), u[:-1], up)
    got = gradients_of_leaving_states(a, grad_in)[:-1]
    assert worst(relative_error(x, y) for x, y in zip(got, want, strict=True)) < 1e-12


def exchanged(seq_len: int) -> list[tuple[Tensor, ...]]:
    """What enters this rank, and the gradients of U and A, by two topologies."""
    layout = SequenceLayout(seq_len)
    pair = random_pair(Dense, (1, 1, 3, 4), layout, torch.float64)
    grad_in = torch.randn(pair.state.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own, results = list(layout.own_segments), []
    for topology in (AllGather(), Ring()):
        state, parameter = (x[own].requires_grad_() for x in (pair.state, pair.transition.parameter))
        incoming = start_exchange(topology, Pair(Dense(parameter), state), layout).wait()
        results.append((incoming.detach(), *torch.autograd.grad(incoming, [state, parameter], grad_in[own])))
    return results


def test_the_exchange_is_that_of_the_topologies() -> None:
    layout = SequenceLayout.for_rank(12, 3, 0)
    pair = random_pair(Dense, (1, 1, 3, 4), layout, torch.float64)
    grad_in = torch.randn(pair.state.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, u = list(pair.transition.parameter[:, 0, 0]), list(pair.state[:, 0, 0])
    entering, leaving = entering_states(a, u), gradients_of_leaving_states(a, list(grad_in[:, 0, 0]))
    for rank, results in enumerate(run_on_ranks(3, exchanged, 12)):
        want = (entering[rank], leaving[rank], leaving[rank] @ entering[rank].T)
        for got in results:
            assert worst(relative_error(x[0, 0, 0], y) for x, y in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("path", LISTINGS, ids=lambda path: path.parent.name)
def test_listings_are_short_and_the_design_refers_to_them(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert sum((node.end_lineno or 0) - node.lineno + 1 for node in functions) <= 45
    assert str(path.relative_to(PROJECT_ROOT)) in (PROJECT_ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert len(LISTINGS) == 6
