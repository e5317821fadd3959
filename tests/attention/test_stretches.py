"""A sequence that is computed stretch by stretch equals one call: every operator with a state, documents that span stretches or
begin on their bounds, any cuts, every rank, outputs, the final state and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import longspan
from longspan.layout import ORDERS, SequenceLayout
from longspan.ops.variants import VARIANTS
from tests.attention.convolution_reference import definition
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan
from tests.variants import Inputs, make_inputs, reference, shard_gates

NUM_BEFORE = 5
"""How many tokens the first document has before the sequence of these tests."""

CUTS: tuple[tuple[int, ...], ...] = ((0, 8, 20, 25, 44), (0, 3, 44), (0, 13, 17, 44))
DOCUMENTS: tuple[tuple[int, ...] | None, ...] = (None, (0, 2, 8, 9, 10, 30, 44), (0, 17, 20, 44))


def stretches(
    documents: Sequence[int] | None, cuts: Sequence[int], order: Any
) -> Iterator[tuple[slice, SequenceLayout]]:
    """The tokens of each stretch, and this rank's layout of them."""
    whole = SequenceLayout(cuts[-1], order=order, documents=documents, continues=NUM_BEFORE)
    for start, stop in pairwise(cuts):
        yield slice(start, stop), whole.stretch(start, stop)


def sharded(x: Tensor, parts: Sequence[tuple[slice, SequenceLayout]]) -> list[Tensor]:
    """This rank's tokens of each stretch of x."""
    return [layout.shard(x[:, tokens]) for tokens, layout in parts]


def compared(
    got: dict[str, list[Tensor] | Tensor], want: dict[str, Tensor], parts: Sequence[tuple[slice, SequenceLayout]]
) -> dict[str, float]:
    """Errors of what stretches gave (lists) and of what ranks have a share of (tensors)."""
    errors = {}
    for name, found in got.items():
        if isinstance(found, list):
            errors[name] = worst(
                relative_error(x, y, 1e-3) for x, y in zip(found, sharded(want[name], parts), strict=True)
            )
        else:
            errors[name] = relative_error(found, want[name], 1e-3)
    return errors


def summed(x: Tensor) -> Tensor:
    """A rank's share, summed over the ranks."""
    total = x.clone()
    dist.all_reduce(total)
    return total


@unwritten_memory_is_nan()
def errors_of_variant(name: str, order: Any, documents: Any, cuts: tuple[int, ...], exchange: str) -> dict[str, float]:
    inputs: Inputs = make_inputs(name, cuts[-1], documents=documents and list(documents), key_heads=1, seed=len(cuts))
    # Of several documents the first alone goes on from a state.
    first = inputs.initial_state[:1].detach().requires_grad_()
    inputs.initial_state = torch.cat([first, torch.zeros_like(inputs.initial_state[1:])])
    o, finals = reference(name, inputs)
    loss = (o * inputs.grad_o).sum()
    loss = loss + sum(rank + 1 for rank in range(dist.get_world_size())) * (finals[-1:] * inputs.grad_final[-1:]).sum()
    leaves = [inputs.q, inputs.k, inputs.v, *(inputs.gates[gate] for gate in inputs.differentiable)]
    want_grads = torch.autograd.grad(loss, [*leaves, first])

    parts = list(stretches(documents, cuts, order))
    q, k, v = ([x.detach().requires_grad_() for x in sharded(y, parts)] for y in (inputs.q, inputs.k, inputs.v))
    own = first.detach().requires_grad_()
    state, outputs, gates = own, [], []
    for number, (tokens, layout) in enumerate(parts):
        of_stretch = {
            gate.name: inputs.gates[gate.name].detach()[:, tokens] if "T" in gate.dims else inputs.gates[gate.name]
            for gate in VARIANTS[name].gates
        }
        given = {key: x.detach() for key, x in shard_gates(name, of_stretch, layout).items()}
        gates.append({key: x.requires_grad_(key in inputs.differentiable) for key, x in given.items()})
        memory = longspan.write(
            name, k[number], v[number], **gates[-1], initial_state=state, output_final_state=True, layout=layout,
            exchange=exchange, chunk_size=8,
        )  # fmt: skip
        outputs.append(memory.read(q[number], inputs.scale))
        state = memory.final_state()
    losses = [(x * y).sum() for x, y in zip(outputs, sharded(inputs.grad_o, parts), strict=True)]
    total = torch.stack(losses).sum() + (dist.get_rank() + 1) * (state * inputs.grad_final[-1:]).sum()
    learned = inputs.differentiable
    by_stretch = [[q[i], k[i], v[i], *(gates[i][gate] for gate in learned)] for i in range(len(parts))]
    grads = torch.autograd.grad(total, [x for leaves in by_stretch for x in leaves] + [own])
    size = 3 + len(learned)
    got: dict[str, list[Tensor] | Tensor] = {"o": outputs, "final state": state, "d initial state": summed(grads[-1])}
    want = {"o": o, "final state": finals[-1:], "d initial state": want_grads[-1]}
    of_all_tokens = {gate.name for gate in VARIANTS[name].gates if "T" not in gate.dims}
    for index, leaf in enumerate(("q", "k", "v", *learned)):
        by_stretch_of_leaf = list(grads[index:-1:size])
        got[f"d {leaf}"] = summed(sum(by_stretch_of_leaf)) if leaf in of_all_tokens else by_stretch_of_leaf  # type: ignore[arg-type]
        want[f"d {leaf}"] = want_grads[index]
    return compared(got, want, parts)


def check(errors_of: Callable[..., dict[str, float]], num_ranks: int, cases: Sequence[tuple[Any, ...]]) -> None:
    for case in cases:
        for rank, errors in enumerate(run_on_ranks(num_ranks, errors_of, *case)):
            assert worst(errors) <= 1e-10, (case, rank, errors)


RANKS = [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 3, 4))]


@pytest.mark.slow_rows(r"^(gla|gated_delta_rule)-2")
@pytest.mark.slow_rows(r"^(gated_delta_product|comba|gla_with_bonus|delta_rule|retention)-2", r"^gated_slot_attention-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(dplr_delta_rule|linear_attention)-2$")
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_memory_state_passes_from_stretch_to_stretch(name: str, num_ranks: int) -> None:
    # On two ranks, by default, the fewest that show all kinds of bounds.
    cuts = CUTS[:2] if num_ranks == 2 else [cuts for cuts in CUTS if num_ranks < 4 or 3 not in cuts]
    settings = list(product(ORDERS if num_ranks > 1 else ORDERS[:1], DOCUMENTS, cuts))
    check(errors_of_variant, num_ranks, [(name, *setting, "auto") for setting in settings])


Maker = Callable[..., tuple[Tensor, Tensor]]


def convolved(x: Tensor, initial: Tensor, layout: SequenceLayout | None, documents: Any) -> tuple[Tensor, Tensor]:
    """A convolution of four taps in stretches (with a layout), or by its definition."""
    weight = torch.linspace(-1.0, 1.0, 4 * x.shape[2], dtype=x.dtype).view(-1, 4)
    if layout is None:
        return definition(x, weight, None, "silu", documents, initial)
    return longspan.causal_conv1d(x, weight, None, "silu", layout, initial_state=initial, output_final_state=True)


def shifted(x: Tensor, initial: Tensor, layout: SequenceLayout | None, documents: Any) -> tuple[Tensor, Tensor]:
    """A token shift in stretches, or as the convolution that it is."""
    if layout is None:
        return definition(x, x.new_tensor([1.0, 0.0]).expand(x.shape[2], 2), None, None, documents, initial)
    y, final = longspan.token_shift(x, initial_state=initial.squeeze(1), output_final_state=True, layout=layout)
    return y, final.unsqueeze(1)


def third_before(x: Tensor, initial: Tensor, layout: SequenceLayout | None, documents: Any) -> tuple[Tensor, Tensor]:
    """The token three before each, of the halo of three tokens, or by the convolution that it is."""
    if layout is None:
        return definition(x, x.new_tensor([1.0, 0.0, 0.0, 0.0]).expand(x.shape[2], 4), None, None, documents, initial)
    before, final = longspan.halo(x, 3, layout, initial_state=initial, output_final_state=True)
    tokens = [
        torch.cat([earlier, x[:, piece.start : piece.stop]], dim=1)[:, : piece.num_tokens]
        for piece, earlier in zip(layout.pieces, before, strict=True)
    ]
    return torch.cat(tokens, dim=1), final


SHORT: dict[str, tuple[Maker, int]] = {
    "causal_conv1d": (convolved, 3),
    "token_shift": (shifted, 1),
    "halo": (third_before, 3),
}


@unwritten_memory_is_nan()
def errors_of_taps(name: str, order: Any, documents: Any, cuts: tuple[int, ...]) -> dict[str, float]:
    make, width = SHORT[name]
    generator = torch.Generator().manual_seed(len(cuts))
    sizes = [(cuts[-1], 5), (width, 5), (cuts[-1], 5), (width, 5)]
    x, first, grad_y, grad_final = (torch.randn(1, *s, generator=generator, dtype=torch.float64) for s in sizes)
    leaves = [x.clone().requires_grad_(), first.clone().requires_grad_()]
    others = 0 if documents is None else len(documents) - 2
    y, finals = make(leaves[0], torch.cat([leaves[1], first.new_zeros(others, width, 5)]), None, documents)
    weight = sum(rank + 1 for rank in range(dist.get_world_size()))
    want_grads = torch.autograd.grad((y * grad_y).sum() + weight * (finals[-1:] * grad_final).sum(), leaves)

    parts = list(stretches(documents, cuts, order))
    own, state = [part.requires_grad_() for part in sharded(x, parts)], first.clone().requires_grad_()
    initial, outputs = state, []
    for tokens, (_, layout) in zip(own, parts, strict=True):
        output, state = make(tokens, state, layout, documents)
        outputs.append(output)
    losses = [(a * b).sum() for a, b in zip(outputs, sharded(grad_y, parts), strict=True)]
    total = torch.stack(losses).sum() + (dist.get_rank() + 1) * (state * grad_final).sum()
    *grads, grad_first = torch.autograd.grad(total, [*own, initial])
    got: dict[str, list[Tensor] | Tensor] = {"y": outputs, "final state": state}
    got |= {"d x": list(grads), "d initial state": summed(grad_first)}
    want = {"y": y, "final state": finals[-1:], "d x": want_grads[0], "d initial state": want_grads[1]}
    return compared(got, want, parts)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^halo-2$")
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", SHORT)
def test_the_last_tokens_pass_from_stretch_to_stretch(name: str, num_ranks: int) -> None:
    cuts = [
        *(cuts for cuts in CUTS if num_ranks < 4 or 3 not in cuts),
        *([(0, 1, 2, 3, 8, 9, 44)] if num_ranks == 1 else []),
    ]
    settings = product(ORDERS if num_ranks > 1 else ORDERS[:1], DOCUMENTS, cuts)
    check(errors_of_taps, num_ranks, [(name, *setting) for setting in settings])
