"""The order of a call: what `schedule` says is what is taken, and `auto` takes what the cost model finds, on every rank alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan import SequenceLayout
from longspan.attention.linear import LinearMemory
from longspan.errors import InputError
from longspan.exchange import Auto
from longspan.ops.variants import VARIANTS
from longspan.plan import Cluster, Link
from longspan.state import Dense
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.variants import make_inputs, operator_of, shard_gates

SEQ_LEN = 150
DECAYS = ("linear_attention", "retention", "simple_gla", "gla")


def cluster(bandwidth: float) -> Cluster:
    link = Link(latency=1e-6, bandwidth=bandwidth)
    return Cluster(2, 2, link, link, fold_latency=0.0, fold_bandwidth=1e10, matmul_rate=1e10)


def orders_taken(operator: Any, *arguments: Any, **options: Any) -> list[str]:
    """In which order the memories that a call writes are read."""
    taken: list[str] = []
    originals = {name: getattr(LinearMemory, name) for name in ("read", "read_overlapped")}

    def recorded(name: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Tensor:
            taken.append(name)
            found: Tensor = originals[name](*args, **kwargs)
            return found

        return read

    try:
        for name in originals:
            setattr(LinearMemory, name, recorded(name))
        operator(*arguments, **options)
    finally:
        for name, original in originals.items():
            setattr(LinearMemory, name, original)
    return taken


def calls_on_a_rank(layout: SequenceLayout) -> dict[str, Any]:
    """Every linear operator in one call."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, layout.num_local_tokens, *shape, generator=torch.Generator().manual_seed(1))

    x, f, groups = normal(2, 8), normal(2, 8), normal(1, 8)
    calls: dict[str, Any] = {}
    for name in VARIANTS:
        inputs = make_inputs(name, SEQ_LEN, heads=2, key_size=8, value_size=8, dtype=torch.float32)
        q, k, v = (layout.shard(y.detach()) for y in (inputs.q, inputs.k, inputs.v))
        gates = shard_gates(name, {key: y.detach() for key, y in inputs.gates.items()}, layout)
        calls[name] = (operator_of(name), (q, k, v), gates)
    calls["mamba2"] = (longspan.mamba2, (x, normal(2).abs(), torch.tensor([-1.0, -0.1]), groups, groups), {})
    calls["hgrn2"] = (longspan.hgrn2, (x, f, x), {})
    calls["normalized"] = (longspan.normalized_linear_attention, (x.abs(), f.abs(), x), {})
    return calls


def orders_of_every_operator() -> dict[str, list[str]]:
    layout = SequenceLayout(SEQ_LEN)
    found: dict[str, list[str]] = {}
    for name, (operator, arguments, gates) in calls_on_a_rank(layout).items():
        options: dict[str, Any] = {**gates, "layout": layout}
        for schedule in ("fused", "overlapped"):
            found[f"{name}, {schedule}"] = orders_taken(operator, *arguments, **options, schedule=schedule)
        for speed, bandwidth in (("slow", 1e6), ("fast", 1e12)):
            exchange = Auto(cluster=cluster(bandwidth))
            found[f"{name}, {speed}"] = orders_taken(operator, *arguments, **options, exchange=exchange)
    return found


def test_every_operator_takes_the_order_that_is_asked_for_or_that_pays() -> None:
    for found in run_on_ranks(2, orders_of_every_operator):
        for what, orders in found.items():
            name, kind = what.split(", ")
            # Both orders of the delta rules are one.
            overlapped = kind == "overlapped" or (
                kind == "slow" and (name not in VARIANTS or VARIANTS[name].transition is not Dense)
            )
            assert orders == ["read_overlapped" if overlapped else "read"], what


def differences_between_the_orders() -> list[tuple[bool, float]]:
    layout = SequenceLayout(SEQ_LEN)
    found = []
    for name, (operator, arguments, gates) in calls_on_a_rank(layout).items():
        if name in DECAYS:
            one, other, again = (
                operator(*arguments, **gates, layout=layout, schedule=schedule, exchange="all_gather")
                for schedule in ("fused", "overlapped", "auto")
            )
            found.append((torch.equal(again, one) or torch.equal(again, other), relative_error(other, one)))
    return found


def test_the_orders_differ_by_rounding_alone_and_auto_is_one_of_them() -> None:
    for found in run_on_ranks(2, differences_between_the_orders):
        assert len(found) == len(DECAYS)
        assert all(is_one for is_one, _ in found)
        assert worst(difference for _, difference in found) < 1e-5


def test_one_rank_reads_in_one_pass() -> None:
    x = torch.randn(1, 20, 2, 8)
    assert orders_taken(longspan.linear_attention, x, x, x) == ["read"]
    assert orders_taken(longspan.linear_attention, x, x, x, schedule="overlapped") == ["read_overlapped"]


def test_an_order_that_does_not_exist_or_cannot_be_is_refused() -> None:
    x = torch.randn(1, 20, 2, 8)
    wrong: Any = "lasp"
    with pytest.raises(InputError, match=r"schedule must be one of 'auto', 'fused', 'overlapped'; got 'lasp'"):
        longspan.linear_attention(x, x, x, schedule=wrong)
    with pytest.raises(InputError, match=r"schedule='overlapped' is for causal attention.*Leave out schedule"):
        longspan.linear_attention(x, x, x, causal=False, schedule="overlapped")
    with pytest.raises(InputError, match=r"normalized_linear_attention: schedule='overlapped' is for causal attention"):
        longspan.normalized_linear_attention(x.abs(), x.abs(), x, causal=False, schedule="overlapped")
