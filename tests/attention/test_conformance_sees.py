"""The conformance suite sees a NaN in anything that a rank computes, on whichever rank, wherever it stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.exchange import autograd as exchange_nodes
from longspan.ops.variants import VARIANTS
from tests.attention.test_conformance import Case, assert_right, worst_on_rank
from tests.compare import INFINITE
from tests.ranks import run_on_ranks

NUM_RANKS = 3
NAME = "gla"
Results = list[tuple[float, Case, dict[str, float]]]
CASE: Case = ("contiguous", "packed", 23, "fused")

PLACES = ["o", "final_state", "dq", "dk", "dv", "dinitial_state", "dg"]
POSITIONS = (0, 0.5, -1)
# What every rank has a share of, so that all see a NaN in the share of one.
SHARED = ["dinitial_state"]


def test_the_places_are_all_that_the_suite_compares() -> None:
    gates = [gate.name for gate in VARIANTS[NAME].gates]
    assert ["o", "final_state", "dq", "dk", "dv", "dinitial_state", *("d" + gate for gate in gates)] == PLACES


def planted(x: Tensor, position: float) -> Tensor:
    """x with a NaN at the first, the middle or the last of its numbers; gradients pass as they are."""
    added = torch.zeros(x.numel(), dtype=x.dtype)
    added[-1 if position == -1 else int(position * x.numel())] = float("nan")
    return x + added.view(x.shape)


class PlantedInGradient(torch.autograd.Function):
    """The identity; its gradient has a NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, position: float) -> Tensor:
        ctx.position = position
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return planted(grads[0], ctx.position), None


class PlantedMemory:
    """A memory whose outputs, or the gradient of what reads it, have a NaN."""

    def __init__(self, memory: Any, place: str, position: float) -> None:
        self.memory, self.place, self.position = memory, place, position

    def read(self, q: Tensor, scale: float) -> Tensor:
        q = PlantedInGradient.apply(q, self.position) if self.place == "dq" else q
        o: Tensor = self.memory.read(q, scale)
        return planted(o, self.position) if self.place == "o" else o

    def final_state(self) -> Tensor:
        state: Tensor = self.memory.final_state()
        return planted(state, self.position) if self.place == "final_state" else state


def with_nan(place: str, victim: int) -> list[Results]:
    """What the suite finds for each position of a NaN at `place` on one rank."""
    original = longspan.write
    found = []
    for position in POSITIONS:

        def write(name: str, k: Tensor, v: Tensor, position: float = position, **options: Any) -> Any:
            given = {"dk": k, "dv": v, **{"d" + key: x for key, x in options.items() if isinstance(x, Tensor)}}
            if place in given:
                given[place] = PlantedInGradient.apply(given[place], position)
            options |= {key: given["d" + key] for key in options if "d" + key in given}
            return PlantedMemory(original(name, given["dk"], given["dv"], **options), place, position)

        if dist.get_rank() == victim:
            longspan.write = write  # type: ignore[assignment]
        try:
            found.append(worst_on_rank(NAME, "all_gather", [CASE]))
        finally:
            longspan.write = original
    return found


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"-1$", r"^(dq|dk|dv)-0$")
@pytest.mark.parametrize("victim", range(NUM_RANKS))
@pytest.mark.parametrize("place", PLACES)
def test_a_nan_in_one_number_of_one_rank_fails_the_suite(place: str, victim: int) -> None:
    for by_rank in zip(*run_on_ranks(NUM_RANKS, with_nan, place, victim), strict=True):
        for rank, ((error, _, errors),) in enumerate(by_rank):
            sees = rank == victim or place in SHARED
            assert errors[place] == INFINITE if sees else errors[place] < 1e-10
            assert (error == INFINITE) == sees
        with pytest.raises(AssertionError, match=f"rank {0 if place in SHARED else victim} of {NUM_RANKS}"):
            assert_right(list(by_rank))


def with_nan_from_the_exchange(name: str, topology: str, victim: int) -> Results:
    """What the suite finds where the gradient that comes back to one rank from the others is NaN."""
    node: Any = exchange_nodes._StateStart
    original = node.backward

    def backward(ctx: Any, *grads: Tensor) -> Any:
        first, *others = original(ctx, *grads)
        return torch.full_like(first, float("nan")), *others

    if dist.get_rank() == victim:
        node.backward = staticmethod(backward)
    try:
        return worst_on_rank(name, topology, [("contiguous", "one document", 23, "fused")])
    finally:
        node.backward = staticmethod(original)


# The last rank sends nothing.
@pytest.mark.parametrize("victim", range(NUM_RANKS - 1))
@pytest.mark.parametrize(("name", "topology"), [("simple_gla", "all_gather"), ("gated_delta_rule", "ring")])
def test_a_nan_for_the_gradient_of_what_a_rank_sent_fails_the_suite(name: str, topology: str, victim: int) -> None:
    by_rank = run_on_ranks(NUM_RANKS, with_nan_from_the_exchange, name, topology, victim)
    ((error, _, errors),) = by_rank[victim]
    assert error == errors["dv"] == errors["dk"] == INFINITE
    with pytest.raises(AssertionError):
        assert_right(by_rank)
