"""Every variant on one device: the chunk form equals the recurrent form, in outputs, states and every gradient."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.ops.variants import VARIANTS
from longspan.state import Dense
from tests import unwritten
from tests.compare import relative_error, worst
from tests.variants import Inputs, make_inputs, operator_of, reference

pytestmark = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Memory which is read before it is written shows, in every test of a module that has this fixture."""
    with unwritten.unwritten_memory_is_nan():
        yield


def run(
    name: str, inputs: Inputs, form: str = "fused", chunk_size: int | None = 8, backend: str = "torch"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the chunk form, and of the recurrent form in float64."""
    expected = by_recurrence(name, inputs)
    layout = None if inputs.documents is None else longspan.SequenceLayout.local(inputs.v.shape[1], inputs.documents)
    memory = longspan.write(
        name,
        inputs.k,
        inputs.v,
        **inputs.gates,
        initial_state=inputs.initial_state,
        output_final_state=True,
        layout=layout,
        chunk_size=chunk_size,
        backend=backend,
    )
    read = memory.read_overlapped if form == "overlapped" else memory.read
    o, final = read(inputs.q, inputs.scale), memory.final_state()
    assert o.dtype == inputs.q.dtype
    assert final.dtype == inputs.initial_state.dtype
    loss = (o * inputs.grad_o).sum() + (final * inputs.grad_final).sum()
    got = dict(zip(inputs.leaf_names(), torch.autograd.grad(loss, inputs.leaves()), strict=True))
    return {"o": o, "final": final, **got}, expected


_found: OrderedDict[tuple[str, bytes], dict[str, Tensor]] = OrderedDict()


def by_recurrence(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients of the recurrent form, kept for other forms and chunk sizes of the same call: it takes longest."""
    tensors = [*inputs.leaves(), *inputs.gates.values(), inputs.grad_o, inputs.grad_final]
    content = hashlib.sha256(repr((inputs.documents, inputs.scale, [(x.shape, x.dtype) for x in tensors])).encode())
    for x in tensors:
        content.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy())
    key = (name, content.digest())
    if key not in _found:
        o, final = reference(name, inputs)
        loss = (o * inputs.grad_o).sum() + (final * inputs.grad_final).sum()
        grads = dict(zip(inputs.leaf_names(), torch.autograd.grad(loss, inputs.leaves()), strict=True))
        _found[key] = {"o": o.detach(), "final": final.detach(), **grads}
        if len(_found) > 64:
            _found.popitem(last=False)
    return _found[key]


def worst_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return worst({key: relative_error(got[key], expected[key]) for key in expected})


# Both orders of a matrix are one: the others of their family show it.
@pytest.mark.slow_rows(r"-overlapped-(comba|dplr_delta_rule|gated_delta_product)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^100-")
@pytest.mark.parametrize("form", ["fused", "overlapped"])
@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 9, 63, 100, 257])
def test_chunk_form_equals_recurrent_form(name: str, seq_len: int, form: str) -> None:
    assert worst_error(*run(name, make_inputs(name, seq_len, batch=2), form)) < 1e-10


@pytest.mark.parametrize(("heads", "key_heads", "key_size", "value_size"), [(1, 1, 1, 1), (4, 2, 5, 3), (6, 1, 24, 40)])
def test_heads_may_share_keys_and_sizes_need_be_no_power_of_two(
    name: str, heads: int, key_heads: int, key_size: int, value_size: int
) -> None:
    inputs = make_inputs(name, 37, batch=2, heads=heads, key_heads=key_heads, key_size=key_size, value_size=value_size)
    for form in ("fused", "overlapped"):
        assert worst_error(*run(name, inputs, form)) < 1e-10


@pytest.mark.slow_rows(r"^(3|64)-", r"^1000-(comba|dplr_delta_rule)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^1-(comba|gated_delta_product|gated_delta_rule|gla_with_bonus)$")
@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000, None])
def test_the_chunk_size_changes_nothing(name: str, chunk_size: int | None) -> None:
    assert worst_error(*run(name, make_inputs(name, 130), chunk_size=chunk_size)) < 1e-10


# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^\[0, 1, 2, 3.*-(comba|gated_delta_product|gla_with_bonus|gated_delta_rule|dplr_delta_rule|retention|linear_attention)$",
)
@pytest.mark.parametrize(
    "documents",
    [[0, 50], [0, 1, 50], [0, 49, 50], [0, 8, 16, 50], [0, 7, 9, 20, 21, 22, 23, 50], list(range(51))],
    ids=str,
)
def test_packed_documents_equal_separate_ones(name: str, documents: list[int]) -> None:
    for form in ("fused", "overlapped"):
        assert worst_error(*run(name, make_inputs(name, 50, documents=documents, heads=2, key_heads=1), form)) < 1e-10


@pytest.mark.slow_rows(r"^(5|30).0-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^0\.0-(gated_delta_product|dplr_delta_rule|comba|gated_slot_attention|kda|gated_delta_rule)$")
@pytest.mark.parametrize("decay", [0.0, 5.0, 30.0, 1000.0])
def test_no_decay_is_too_strong_or_too_weak(name: str, decay: float) -> None:
    for seq_len, documents in ((100, None), (103, None), (103, [0, 5, 8, 33, 103])):
        inputs = make_inputs(name, seq_len, decay=decay, documents=documents)
        assert worst_error(*run(name, inputs, chunk_size=64)) < 1e-10
        assert worst_error(*run(name, inputs, "overlapped", chunk_size=64)) < 1e-10


def test_a_decay_to_nothing_cuts_the_sequence_without_nan(name: str) -> None:
    inputs = make_inputs(name, 40)
    for gate in VARIANTS[name].gates:
        if gate.is_log_decay:
            values = inputs.gates[gate.name].detach().clone()
            values.view(-1)[::3] = -torch.inf
            inputs.gates[gate.name] = values.requires_grad_(gate.differentiable)
    got, expected = run(name, inputs)
    for key in ("o", "final", "q", "k", "v"):
        assert relative_error(got[key], expected[key]) < 1e-9


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^0\.02-dtype1-", r"^5\.0-dtype0-")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("decay", [0.02, pytest.param(0.5, marks=pytest.mark.slow), 5.0])
def test_lower_precision_stays_close_to_float64(name: str, dtype: torch.dtype, tolerance: float, decay: float) -> None:
    inputs = make_inputs(name, 200, heads=3, key_size=32, value_size=16, dtype=dtype, decay=decay)
    got, expected = run(name, inputs, chunk_size=None)
    for key in expected:
        error = relative_error(got[key], expected[key])
        # ∂g is a small difference of large sums, and inherits the rounding of the products in bfloat16.
        assert error < tolerance * (4 if key == "g" else 1), (key, error)


def test_two_halves_through_the_state_equal_the_whole(name: str) -> None:
    inputs = make_inputs(name, 45)
    o_reference, final_reference = reference(name, inputs)

    def half(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        gates: dict[str, Any] = {
            gate.name: inputs.gates[gate.name][:, start:stop] if "T" in gate.dims else inputs.gates[gate.name]
            for gate in VARIANTS[name].gates
        }
        q, k, v = (x[:, start:stop] for x in (inputs.q, inputs.k, inputs.v))
        memory = longspan.write(name, k, v, **gates, initial_state=state, output_final_state=True, chunk_size=8)
        return memory.read(q, inputs.scale), memory.final_state()

    first, state = half(0, 19, inputs.initial_state)
    second, final = half(19, 45, state)
    assert relative_error(torch.cat([first, second], dim=1), o_reference) < 1e-12
    assert relative_error(final, final_reference) < 1e-12
    loss = (torch.cat([first, second], dim=1) * inputs.grad_o).sum() + (final * inputs.grad_final).sum()
    loss_reference = (o_reference * inputs.grad_o).sum() + (final_reference * inputs.grad_final).sum()
    got = torch.autograd.grad(loss, inputs.leaves())
    for ours, theirs in zip(got, torch.autograd.grad(loss_reference, inputs.leaves()), strict=True):
        assert relative_error(ours, theirs) < 1e-10


@pytest.mark.slow_rows(r"^fused-(?!gla$|kda$)")
@pytest.mark.slow_rows(r"^overlapped-(?!gla$|kda$|gated_slot_attention$)")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(overlapped-kda|fused-gla)$")
@pytest.mark.parametrize("form", ["fused", "overlapped"])
def test_gradcheck(name: str, form: str) -> None:
    # The checker compares whole Jacobians and needs no help with unwritten memory.
    inputs = make_inputs(name, 7, batch=1, heads=2, key_heads=1, key_size=2, value_size=2, num_slots=2)
    gates = list(inputs.gates)

    def named(values: tuple[Tensor, ...]) -> dict[str, Any]:
        return dict(zip(gates, values, strict=True))

    def function(q: Tensor, k: Tensor, v: Tensor, initial: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        memory = longspan.write(
            name,
            k,
            v,
            **named(values),
            initial_state=initial,
            output_final_state=True,
            chunk_size=3,
        )
        read = memory.read_overlapped if form == "overlapped" else memory.read
        return read(q), memory.final_state()

    arguments = (inputs.q, inputs.k, inputs.v, inputs.initial_state, *inputs.gates.values())
    assert torch.autograd.gradcheck(function, arguments, fast_mode=False)


def test_a_memory_may_be_read_twice(name: str) -> None:
    inputs = make_inputs(name, 21)
    memory = longspan.write(name, inputs.k, inputs.v, **inputs.gates, chunk_size=8)
    other = torch.randn_like(inputs.q).requires_grad_()
    both = memory.read(inputs.q) + memory.read(other)
    separate = [longspan.write(name, inputs.k, inputs.v, **inputs.gates, chunk_size=8) for _ in range(2)]
    expected = separate[0].read(inputs.q) + separate[1].read(other)
    leaves = [inputs.q, other, inputs.k, inputs.v, *(inputs.gates[key] for key in inputs.differentiable)]
    got = torch.autograd.grad((both * inputs.grad_o).sum(), leaves)
    for ours, theirs in zip(got, torch.autograd.grad((expected * inputs.grad_o).sum(), leaves), strict=True):
        assert relative_error(ours, theirs) < 1e-12


def test_backward_keeps_inputs_and_states_alone(name: str) -> None:
    seq_len, heads, size, chunk = 512, 2, 16, 64
    inputs = make_inputs(
        name, seq_len, heads=heads, key_size=size, value_size=size, num_slots=size, dtype=torch.float32
    )
    saved: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        memory = longspan.write(name, inputs.k, inputs.v, **inputs.gates, chunk_size=chunk)
        memory.read(inputs.q)
    of_inputs = sum(x.numel() * 4 for x in (inputs.q, inputs.k, inputs.v, *inputs.gates.values()))
    of_states = (seq_len // chunk + 1) * heads * size * size * 4
    of_tokens = seq_len * heads * size * 4
    scores = seq_len * chunk * heads * 4
    kept = 2 * of_states
    if VARIANTS[name].has_slots:
        # A state has both halves; keys and values beside each other, and the weights by which slots are read.
        kept += 2 * of_states + 3 * of_tokens
        assert max(saved.values()) < scores
    elif VARIANTS[name].transition is Dense:
        # The delta rule also keeps its weights, updates and factors, its triangles and their inverses. Where a token has several
        # rows that write, inverses are of rows; of `dplr_delta_rule` they are of tokens, but it keeps its rows themselves.
        rows = {"gated_delta_product": 2, "dplr_delta_rule": 2}.get(name, 1)
        kept += 3 * rows * of_tokens + (rows + rows**2) * scores
        assert max(saved.values()) <= rows**2 * scores
    else:
        if name == "gla_with_bonus":
            # Queries stand at the token before, and with keys beside u.
            kept += 2 * of_tokens
        assert max(saved.values()) < scores
    assert sum(saved.values()) <= of_inputs + kept


def test_inputs_that_do_not_fit_are_refused_with_value_expectation_and_remedy(name: str) -> None:
    inputs = make_inputs(name, 12, batch=2, heads=2, key_heads=2)
    k, v, gates = inputs.k.detach(), inputs.v.detach(), {key: x.detach() for key, x in inputs.gates.items()}
    layout = longspan.SequenceLayout.for_rank(24, 2, 0)
    packed = longspan.SequenceLayout.local(12, [0, 5, 12])

    def refuses(message: str, *args: Any, **options: Any) -> None:
        with pytest.raises(longspan.LongspanError, match=message):
            longspan.write(name, *args, **{**gates, **options})

    refuses(re.escape(f"{tuple(k.shape)} and {tuple(v[:, :11].shape)}"), k, v[:, :11])
    refuses("one dtype out of float64, float32, bfloat16; got k torch.float64 and v torch.float32", k, v.float())
    refuses("heads of v must be a multiple", torch.cat([k, k[..., :1, :]], dim=-2), v)
    refuses("B = 1, the packed sequence; got B = 2", k, v, layout=packed)
    refuses(
        r"initial_state must be \[B, H, (K, V\] = \(2, 2, 3, 5|M, K \+ V\] = \(2, 2, 4, 8)\)", k, v, initial_state=v
    )
    refuses(r"exchange must be 'auto', one of", k, v, exchange="pigeon")
    refuses(r"backend must be None or one of 'torch'", k, v, backend="abacus")
    refuses("chunk_size must be a positive int", k, v, chunk_size=0)
    with pytest.raises(longspan.LayoutError, match=r"take layout.shard\(x\) first"):
        longspan.write(name, torch.cat([k, k], dim=1), torch.cat([v, v], dim=1), layout=layout, **gates)
    memory = longspan.write(name, k, v, **gates)
    with pytest.raises(longspan.InputError, match="q must have the shape and dtype of k"):
        memory.read(k[:, :5])
    with pytest.raises(longspan.InputError, match="output_final_state=True"):
        memory.final_state()
    for gate in VARIANTS[name].gates:
        of_one_head = gates[gate.name].narrow(gate.dims.index("H"), 0, 1)
        refuses(f"{gate.name} must be a floating-point tensor", k, v, **{gate.name: of_one_head})
        if gate.is_log_decay:
            refuses(
                "must not exceed 0 or be NaN; its largest value on rank 0", k, v, **{gate.name: -gates[gate.name] + 1}
            )
            refuses("must not exceed 0 or be NaN", k, v, **{gate.name: gates[gate.name] * torch.nan})
        if not gate.differentiable:
            refuses("takes no gradient", k, v, **{gate.name: gates[gate.name].clone().requires_grad_()})
    if VARIANTS[name].gates:
        with pytest.raises(longspan.InputError, match=r"beside q, k and v; got \[\]"):
            longspan.write(name, k, v)


def test_autocast_leaves_float64_alone(name: str) -> None:
    inputs = make_inputs(name, 21, dtype=torch.float64)
    call = operator_of(name)
    directions = ({}, {"causal": False}) if name in ("linear_attention", "retention") else ({},)
    for options in directions:
        expected = call(inputs.q, inputs.k, inputs.v, **inputs.gates, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(inputs.q, inputs.k, inputs.v, **inputs.gates, **options), expected)
