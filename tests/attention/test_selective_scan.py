"""The selective scan over ranks: each topology, layout and number of ranks equals the recurrence, with every gradient."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan import SequenceLayout, record_traffic
from longspan.exchange import TOPOLOGIES
from tests.attention.test_conformance import (
    FULL,
    LENGTHS,
    NEIGHBOUR,
    SHORT,
    Case,
    assert_right,
    documents_of,
    packings_of,
)
from tests.compare import relative_error, worst
from tests.ranks import raised, run_on_ranks
from tests.scans import PER_TOKEN, call, expected_of_scan, make_scan, reference, shard
from tests.unwritten import unwritten_memory_is_nan

SHARED = {"A", "D", "delta_bias", "initial_state"}


def errors_on_rank(
    exchange: Any, order: Any, documents: list[int] | None, seq_len: int, **options: Any
) -> dict[str, float]:
    """Errors of this rank's outputs and gradients against the recurrence of the whole sequence; options: of `make_scan`."""
    # Every rank weighs the final state its own way, by 1, 2, ...; its gradient is the sum over ranks.
    weight = sum(range(1, dist.get_world_size() + 1))
    kept = None if documents is None else tuple(documents)
    values, grads, o_want, final_want, expected = expected_of_scan(seq_len, kept, weight, **options)
    softplus = "delta_bias" in values

    layout = SequenceLayout(seq_len, order=order, documents=documents)
    own = shard(values, layout)
    o, final = call(own, softplus, layout=layout, exchange=exchange, chunk_size=8)
    loss = (o * layout.shard(grads["o"])).sum() + (dist.get_rank() + 1) * (final * grads["final"]).sum()
    got = torch.autograd.grad(loss, list(own.values()))
    errors = {"o": relative_error(o, layout.shard(o_want)), "final": relative_error(final, final_want)}
    for name, ours, theirs in zip(values, got, expected, strict=True):
        if name in SHARED:
            ours = ours.clone()
            dist.all_reduce(ours)
        errors["d" + name] = relative_error(ours, theirs if name in SHARED else layout.shard(theirs))
    return errors


@unwritten_memory_is_nan()
def worst_on_rank(exchange: str, cases: list[Case]) -> list[tuple[float, Case, dict[str, float]]]:
    """For each case, this rank's largest error, with the case and all of them; the form says whether there is a softplus."""
    results = []
    for case in cases:
        order, packing, seq_len, form = case
        documents = documents_of(packing, seq_len)
        options = {"batch": 2 if documents is None else 1, "groups": 2, "softplus": form == "softplus", "seed": seq_len}
        errors = errors_on_rank(exchange, order, documents, seq_len, **options)
        results.append((worst(errors), case, errors))
    return results


@pytest.mark.slow_rows(r"contiguous-all_gather-1")
@pytest.mark.slow_rows(r"zigzag-all_gather-4|contiguous-all_gather-2", r"-all_gather-3$")
@pytest.mark.parametrize(("exchange", "num_ranks"), FULL)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_every_rank_equals_the_recurrence(exchange: str, order: str, num_ranks: int) -> None:
    for packing in packings_of(exchange):
        lengths = [length for length in LENGTHS if length >= (4 * num_ranks if packing == SHORT else num_ranks)]
        cases = list(itertools.product([order], [packing], lengths, ("softplus", "steps")))
        assert_right(run_on_ranks(num_ranks, worst_on_rank, exchange, cases))


@pytest.mark.slow_rows(r"-[23]$")
@pytest.mark.parametrize("num_ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("exchange", [*(name for name in TOPOLOGIES if name != "all_gather"), "auto"])
def test_every_topology_serves_it(exchange: str, num_ranks: int) -> None:
    first, *_, last = packings_of(exchange) * 2
    seq_len = 23 if num_ranks <= 4 else 37
    cases: list[Case] = [("contiguous", first, seq_len, "softplus"), ("zigzag", last, seq_len, "steps")]
    if exchange != NEIGHBOUR:
        cases += [("zigzag", first, seq_len, "softplus"), ("contiguous", last, seq_len, "softplus")]
    assert_right(run_on_ranks(num_ranks, worst_on_rank, exchange, cases))


def two_level_on_rank() -> float:
    values, grads = make_scan(41, batch=2, channels=6)
    want, _ = reference(values)
    expected = torch.autograd.grad((want * grads["o"]).sum(), list(values.values()))
    worst_error = 0.0
    for order in ("contiguous", "zigzag"):
        layout = SequenceLayout(41, order=order, ranks_per_node=2)
        own = shard(values, layout)
        o = longspan.selective_scan(**own, delta_softplus=True, layout=layout, exchange="two_level")
        got = torch.autograd.grad((o * layout.shard(grads["o"])).sum(), list(own.values()))
        errors = [relative_error(o, layout.shard(want))]
        for name, ours, theirs in zip(values, got, expected, strict=True):
            if name in PER_TOKEN:
                errors.append(relative_error(ours, layout.shard(theirs)))
        worst_error = worst([worst_error, *errors])
    return worst_error


def test_several_nodes_of_several_ranks() -> None:
    assert worst(run_on_ranks(4, two_level_on_rank)) < 1e-12


@pytest.mark.parametrize("step", [1e-6, 30.0, 1000.0])
def test_short_and_long_steps_cross_ranks(step: float) -> None:
    for documents in (None, [0, 3, 20, 47]):
        for errors in run_on_ranks(3, long_steps_on_rank, step, documents):
            assert worst(errors) < 1e-11, errors


def long_steps_on_rank(step: float, documents: list[int] | None) -> dict[str, float]:
    return errors_on_rank("all_gather", "zigzag", documents, 47, step=step, softplus=False)


def losses_on_rank(takes: tuple[str, ...]) -> dict[str, float]:
    """As many kinds of losses as ranks: of o alone, of the final state alone, of both."""
    values, grads = make_scan(30)
    o_want, final_want = reference(values)
    loss = torch.zeros((), dtype=torch.float64)
    layout = SequenceLayout(30)
    for rank, taken in enumerate(takes):
        of_rank = SequenceLayout.for_rank(30, len(takes), rank)
        if taken != "final":
            loss = loss + (of_rank.shard(o_want) * of_rank.shard(grads["o"])).sum()
        if taken != "o":
            loss = loss + (final_want * grads["final"]).sum()
    expected = torch.autograd.grad(loss, list(values.values()), materialize_grads=True)
    own = shard(values, layout)
    o, final = call(own, layout=layout)
    taken, loss = takes[dist.get_rank()], torch.zeros((), dtype=torch.float64)
    if taken != "final":
        loss = loss + (o * layout.shard(grads["o"])).sum()
    if taken != "o":
        loss = loss + (final * grads["final"]).sum()
    got = torch.autograd.grad(loss, list(own.values()))
    return {
        name: relative_error(ours, layout.shard(theirs))
        for name, ours, theirs in zip(values, got, expected, strict=True)
        if name in PER_TOKEN
    }


@pytest.mark.parametrize("takes", [("o", "final", "both"), ("final", "final", "final"), ("final", "o", "o")])
def test_ranks_may_take_the_outputs_the_final_state_or_both(takes: tuple[str, ...]) -> None:
    for errors in run_on_ranks(3, losses_on_rank, takes):
        assert worst(errors) < 1e-12, errors


def traffic_on_rank() -> tuple[int, int]:
    values, _ = make_scan(24, channels=5, state_size=7, dtype=torch.float32)
    layout = SequenceLayout(24)
    own = shard(values, layout)
    with record_traffic() as traffic:
        o = longspan.selective_scan(**own, delta_softplus=True, layout=layout, exchange="all_gather")
    forward = traffic.bytes_sent
    with record_traffic() as traffic:
        o.sum().backward()
    return forward, traffic.bytes_sent


def test_a_rank_sends_a_state_and_a_sum_per_channel() -> None:
    state, sums = 5 * 7 * 4, 5 * 4
    assert run_on_ranks(2, traffic_on_rank) == [(state + sums, state)] * 2


def stretches_on_rank(order: Any, documents: list[int] | None) -> dict[str, float]:
    """A sequence that goes on from five tokens before, in three calls that hand a state on, against one recurrence."""
    values, grads = make_scan(44, documents=documents)
    # Of several documents the first alone goes on from a state.
    first = values["initial_state"][:1].detach().requires_grad_()
    values["initial_state"] = torch.cat([first, torch.zeros_like(values["initial_state"][1:])])
    o_want, finals = reference(values, documents=documents)
    loss = (o_want * grads["o"]).sum() + dist.get_world_size() * (finals[-1:] * grads["final"][-1:]).sum()
    names = [name for name in values if name != "initial_state"]
    expected = torch.autograd.grad(loss, [*(values[name] for name in names), first])

    whole = SequenceLayout(44, order=order, documents=documents, continues=5)
    parts = [(slice(*cut), whole.stretch(*cut)) for cut in ((0, 13), (13, 17), (17, 44))]
    shared = {name: values[name].detach().requires_grad_() for name in names if name not in PER_TOKEN}
    state = start = first.detach().requires_grad_()
    own: dict[str, list[Tensor]] = {name: [] for name in names if name in PER_TOKEN}
    loss, errors = torch.zeros((), dtype=torch.float64), {}
    for tokens, layout in parts:
        for name, held in own.items():
            held.append(layout.shard(values[name].detach()[:, tokens]).requires_grad_())
        given = {name: held[-1] for name, held in own.items()}
        o, state = call({**given, **shared, "initial_state": state}, layout=layout, chunk_size=8)
        errors[f"o {tokens.start}"] = relative_error(o, layout.shard(o_want[:, tokens]))
        loss = loss + (o * layout.shard(grads["o"][:, tokens])).sum()
    errors["final"] = relative_error(state, finals[-1:])
    loss = loss + (state * grads["final"][-1:]).sum()
    leaves = [*(x for held in own.values() for x in held), *shared.values(), start]
    got = iter(torch.autograd.grad(loss, leaves))
    want = dict(zip([*names, "initial_state"], expected, strict=True))
    for name in own:
        for tokens, layout in parts:
            errors[f"d{name} {tokens.start}"] = relative_error(next(got), layout.shard(want[name][:, tokens]), 1e-3)
    for name in [*shared, "initial_state"]:
        total = next(got).clone()
        dist.all_reduce(total)
        errors["d" + name] = relative_error(total, want[name])
    return errors


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^zigzag-3$")
@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_stretch_by_stretch_it_is_one_call(order: str, num_ranks: int) -> None:
    for documents in (None, [0, 2, 8, 9, 10, 30, 44], [0, 17, 20, 44]):
        for errors in run_on_ranks(num_ranks, stretches_on_rank, order, documents):
            assert worst(errors) < 1e-11, (documents, errors)


def refusals_on_rank() -> list[tuple[str, str]]:
    """A step that one rank alone has, and rates that all have."""
    layout = SequenceLayout(24)
    values, _ = make_scan(24, softplus=False)
    own = {name: x.detach() for name, x in shard(values, layout).items()}
    below = own["delta"].clone()
    if dist.get_rank() == 1:
        below[0, 2, 1] = -0.25
    found = []
    for change in ({"delta": below}, {"A": -own["A"]}):
        found.append(raised(partial(longspan.selective_scan, **{**own, **change}, layout=layout)))
    # Nothing is left behind that the next call would meet.
    longspan.selective_scan(**own, layout=layout)
    return found


def test_a_step_below_zero_on_one_rank_is_refused_on_all() -> None:
    first, *others = run_on_ranks(3, refusals_on_rank)
    assert others == [first, first]
    assert [name for name, _ in first] == ["InputError"] * 2
    assert "the smallest of all ranks is -0.25" in first[0][1]
    assert "A holds rates of decay and must not exceed 0" in first[1][1]
