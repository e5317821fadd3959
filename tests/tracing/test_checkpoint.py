"""Selective activation checkpointing: whatever a policy saves, gradients are those of a plain call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import longspan
from longspan import SequenceLayout, record_traffic
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.tracing.calls import CALLS, inputs_of, local_inputs, results

ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
)
COLLECTIVES = (
    "_allgather_base_",
    "allgather_",
    "alltoall_base_",
    "allreduce_",
    "all_gather_into_tensor",
    "all_reduce",
    "all_to_all_single",
    "reduce_scatter_tensor",
    "wait_tensor",
)
# Names of operators whose outputs are saved; "" stands for all of them.
POLICIES = {
    "attention": ATTENTION,
    "products": ("bmm", "mm", "exp", "baddbmm"),
    "every other mm, attention and collectives": (*ATTENTION, *COLLECTIVES, "mm", "max"),
    "collectives": COLLECTIVES,
    "everything": ("",),
    "nothing": (),
}


def _saves(
    names: tuple[str, ...], ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    name = op.overloadpacket.__name__
    saved = names == ("",) or name in names
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(function: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def call(layout: Any, *tensors: Tensor) -> Any:
        contexts = partial(create_selective_checkpoint_contexts, partial(_saves, names))

        # Something of a user's own before and behind, which the policy sees.
        def inside(*xs: Tensor) -> Any:
            return tuple((y @ y.new_ones(y.shape[-1], 3)).exp().sin() for y in function(layout, *(x * 1.0 for x in xs)))

        return checkpoint(inside, *tensors, use_reentrant=False, context_fn=contexts)

    return call


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layout, *xs: tuple(
        (y @ y.new_ones(y.shape[-1], 3)).exp().sin() for y in function(layout, *(x * 1.0 for x in xs))
    )


# One device has no collectives to keep, and all that is kept is a plain call.
@pytest.mark.slow_rows(r"^(?!simple_gla).*-(collectives|everything)$")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CALLS)
def test_gradients_are_those_of_a_plain_call(name: str, policy: str) -> None:
    call = CALLS[name]
    tensors = inputs_of(call, 70)
    got = results(checkpointed(call.function, POLICIES[policy]), None, tensors)
    expected = results(plain(call.function), None, tensors)
    assert worst([relative_error(x, y) for x, y in zip(got, expected, strict=True)]) < 1e-12


def on_ranks(name: str, order: Any) -> float:
    call = CALLS[name]
    layout = SequenceLayout(71, order=order)
    tensors = local_inputs(call, inputs_of(call, 71), layout)
    expected = results(plain(call.function), layout, tensors)
    # The groups are as they were: a plain call at the end is right.
    functions = [*(checkpointed(call.function, names) for names in POLICIES.values()), plain(call.function)]
    errors = []
    for function in functions:
        got = results(function, layout, tensors)
        errors += [relative_error(x, y) for x, y in zip(got, expected, strict=True)]
    return worst(errors)


@pytest.mark.slow_rows(
    r"^(comba|dplr_delta_rule|gla_with_bonus|gated_delta_rule|delta_rule|retention|simple_gla)$",
    r"^(complex exponentials|long convolution of a function|selective scan of steps|hgrn2|normalized)$",
    r"of both sides$",
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(gated_delta_product|gated_slot_attention|gla|linear_attention|mamba2|exponentials)$",
    r"^softmax (of a window|of narrow values)$",
    r"^softmax, write and read$",
)
@pytest.mark.parametrize("name", CALLS)
def test_ranks_have_the_gradients_of_a_plain_call(name: str) -> None:
    assert worst(run_on_ranks(2, on_ranks, name, "contiguous", timeout=120.0)) < 1e-12


def gathered(layout: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"exchange": "all_gather", "initial_state": state, "output_final_state": True}
    found = longspan.simple_gla(q, k, v, g, layout=layout, **options)
    assert isinstance(found, tuple)
    return found


def num_collectives() -> list[int]:
    layout = SequenceLayout(71)
    tensors = local_inputs(CALLS["simple_gla"], inputs_of(CALLS["simple_gla"], 71), layout)
    counts = []
    for names in POLICIES.values():
        with record_traffic() as traffic:
            results(checkpointed(gathered, names), layout, tensors)
        counts.append(traffic.num_collectives)
    return counts


def test_every_policy_makes_the_same_collectives_on_every_rank() -> None:
    first, second = run_on_ranks(2, num_collectives)
    assert first == second
    assert set(first) == {first[0]}


def test_other_modes_see_what_an_operator_computes() -> None:
    call = CALLS["gla"]
    tensors = inputs_of(call, 70)
    counts = []
    for function in (plain(call.function), checkpointed(call.function, POLICIES["everything"])):
        with FlopCounterMode(display=False) as counter:
            function(None, *tensors)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
