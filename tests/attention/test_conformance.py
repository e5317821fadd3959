"""Every variant × topology × layout × number of ranks equals the recurrent form: outputs, states, gradients, on every rank."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist

import longspan
from longspan.exchange import TOPOLOGIES
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan
from tests.variants import expected_of, shard_gates

LENGTHS = (4, 23, 64, 101)
PACKINGS = ("one document", "packed")
# The topology that carries a state no further than the next segment, and documents that reach no further.
NEIGHBOUR, SHORT = "neighbour", "short documents"


def documents_of(packing: str, seq_len: int) -> list[int] | None:
    if packing == "one document":
        return None
    if packing == SHORT:
        return [*(start for start in range(seq_len) if start % 6 in (0, 2, 3)), seq_len]
    # Fractions of the length: one-token documents, boundaries inside shards and on them, documents over 0, 1 and 2 cuts.
    return sorted({round(fraction * seq_len) for fraction in (0.0, 0.02, 0.04, 0.1, 0.25, 0.5, 0.52, 1.0)})


def packings_of(exchange: str) -> tuple[str, ...]:
    return (SHORT,) if exchange == NEIGHBOUR else PACKINGS


def errors_on_rank(
    name: str,
    exchange: str,
    order: Any,
    documents: list[int] | None,
    seq_len: int,
    form: str,
    options: dict[str, Any],
    backend: str = "torch",
    chunk_size: int = 8,
) -> dict[str, float]:
    """Errors of this rank's outputs and gradients against the recurrent form of the whole sequence; options: of `make_inputs`."""
    # Every rank weighs the final state its own way, by 1, 2, ...; its gradient is the sum over ranks.
    weight = sum(range(1, dist.get_world_size() + 1))
    expected = expected_of(name, seq_len, None if documents is None else tuple(documents), weight, **options)
    inputs = expected.inputs

    layout = longspan.SequenceLayout(seq_len, order=order, documents=documents)
    q, k, v = (layout.shard(x.detach()).requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    gates = shard_gates(name, {key: x.detach() for key, x in inputs.gates.items()}, layout)
    for key in inputs.differentiable:
        gates[key].requires_grad_()
    initial = inputs.initial_state.detach().requires_grad_()
    memory = longspan.write(
        name,
        k,
        v,
        **gates,
        initial_state=initial,
        output_final_state=True,
        layout=layout,
        exchange=exchange,
        backend=backend,
        chunk_size=chunk_size,
    )
    o = memory.read_overlapped(q, inputs.scale) if form == "overlapped" else memory.read(q, inputs.scale)
    final = memory.final_state()
    loss = (o * layout.shard(inputs.grad_o)).sum() + (dist.get_rank() + 1) * (final * inputs.grad_final).sum()
    grads = torch.autograd.grad(loss, [q, k, v, initial, *(gates[key] for key in inputs.differentiable)])

    replicated = [gate.name for gate in VARIANTS[name].gates if "T" not in gate.dims]
    errors = {
        "o": relative_error(o, layout.shard(expected.o)),
        "final_state": relative_error(final, expected.final_state),
    }
    for leaf, got, wanted in zip(inputs.leaf_names(), grads, expected.grads, strict=True):
        if leaf == "initial_state" or leaf in replicated:
            got = got.clone()
            dist.all_reduce(got)
        else:
            wanted = layout.shard(wanted)
        errors["d" + leaf] = relative_error(got, wanted)
    return errors


Case = tuple[Any, str, int, str]
"""Order, packing, length, form of the read phase."""


@unwritten_memory_is_nan()
def worst_on_rank(name: str, exchange: str, cases: list[Case]) -> list[tuple[float, Case, dict[str, float]]]:
    """For each case, this rank's largest error, with the case and all of them."""
    results = []
    for case in cases:
        order, packing, seq_len, form = case
        documents = documents_of(packing, seq_len)
        options = {"batch": 2 if documents is None else 1, "heads": 2, "key_heads": 1, "seed": seq_len}
        errors = errors_on_rank(name, exchange, order, documents, seq_len, form, options)
        results.append((worst(errors), case, errors))
    return results


def check(name: str, exchange: str, num_ranks: int, cases: list[Case]) -> None:
    assert_right(run_on_ranks(num_ranks, worst_on_rank, name, exchange, cases))


def assert_right(by_rank: list[list[tuple[float, Case, dict[str, float]]]]) -> None:
    for rank, results in enumerate(by_rank):
        for error, case, errors in results:
            assert error < 1e-10, f"rank {rank} of {len(by_rank)}, {case}: {errors}"


# What the package takes without being asked is tried in full; of the other topologies, what test_exchange.py does not show already.
FULL = [
    pytest.param(
        exchange, num_ranks, marks=() if exchange == "all_gather" and num_ranks in (1, 2, 3, 4) else pytest.mark.slow
    )
    for exchange, num_ranks in itertools.product([*TOPOLOGIES, "auto"], (1, 2, 3, 4, 8))
    if exchange == "all_gather" or num_ranks > 1
]


# The gated delta rule has all that the plain one has.
@pytest.mark.slow_rows(r"^gated_delta_product-contiguous-", r"^delta_rule-zigzag-")
@pytest.mark.slow_rows(
    r"^(?!linear_attention|kda).*-1$",
    r"^(retention|gla|delta_rule|gated_delta_rule|dplr_delta_rule|gated_slot_attention)-contiguous-",
    r"-all_gather-4$",
    r"^(gla_with_bonus|comba)-",
)
# On three ranks, the fewest that have all kinds of bounds, the one that `tests/planted.py` names.
@pytest.mark.slow_rows(r"^(?!simple_gla).*-3$", r"^simple_gla-.*-2$", r"^(kda|linear_attention)-zigzag-all_gather-2$")
@pytest.mark.parametrize(("exchange", "num_ranks"), FULL)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", VARIANTS)
def test_sequence_parallel_equals_the_recurrent_form_on_every_rank(
    name: str, exchange: str, order: str, num_ranks: int
) -> None:
    for packing in packings_of(exchange):
        # Short documents reach no further than the next segment where segments are not shorter still.
        lengths = [length for length in LENGTHS if length >= (4 * num_ranks if packing == SHORT else num_ranks)]
        check(name, exchange, num_ranks, list(itertools.product([order], [packing], lengths, ("fused", "overlapped"))))


# Many cases: by default the smallest and the largest transition that is sent on any number of ranks, the others on three and four.
EVERY = [
    pytest.param(
        name, n, marks=pytest.mark.slow if n in (2, 8) and name not in ("simple_gla", "gated_delta_rule") else ()
    )
    for name, n in itertools.product(VARIANTS, (2, 3, 4, 8))
]


@pytest.mark.slow_rows(
    r"-dplr_delta_rule-4$",
    r"-(gla|kda|dplr_delta_rule)-3$",
    r"-gla-4$",
    r"-(linear_attention|retention|gated_delta_rule)-",
    r"-8$",
    r"(^|[-[])(gla_with_bonus|comba|gated_delta_product|gated_slot_attention)(-|$)",
)
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"-simple_gla-[34]$", r"-delta_rule-4$")
@pytest.mark.parametrize(("name", "num_ranks"), EVERY)
@pytest.mark.parametrize("exchange", [*(name for name in TOPOLOGIES if name != "all_gather"), "auto"])
def test_every_topology_serves_every_variant(name: str, exchange: str, num_ranks: int) -> None:
    seq_len = 23 if num_ranks <= 4 else 37
    packings = packings_of(exchange)
    # One document contiguous, documents in zigzag order, and the other way round; of 8 ranks the first two alone.
    cases: list[Case] = [("contiguous", packings[0], seq_len, "fused"), ("zigzag", packings[-1], seq_len, "fused")]
    if num_ranks < 8:
        cases += [("zigzag", packings[0], seq_len, "overlapped"), ("contiguous", packings[-1], seq_len, "overlapped")]
    check(name, exchange, num_ranks, cases)


@pytest.mark.slow_rows(r"(^|[-[])(gla_with_bonus|comba|gated_delta_product|gated_slot_attention)(-|$)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(delta_rule|gated_delta_rule|retention)$")
@pytest.mark.parametrize("name", VARIANTS)
def test_random_packings_and_strong_decays(name: str) -> None:
    """Random document lengths that cross 0, 1 and 2 cuts, with decays from none to beyond what a float32 holds."""
    rng = random.Random(0)
    for trial, decay in enumerate((0.0, 1.0, 30.0, 900.0)):
        seq_len = rng.randint(20, 70)
        documents = [0, *sorted(rng.sample(range(1, seq_len), rng.randint(1, 12))), seq_len]
        order = rng.choice(["contiguous", "zigzag"])
        options = {"decay": decay, "seed": trial}
        arguments = (name, "auto", order, documents, seq_len, "fused", options, "torch", 8)
        for errors in run_on_ranks(3, errors_on_rank, *arguments):
            assert worst(errors) < 1e-10, (decay, errors)
