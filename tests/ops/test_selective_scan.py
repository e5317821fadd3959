"""The selective scan on one device equals its recurrence: outputs, states and every gradient, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longspan
from longspan import InputError, SequenceLayout
from longspan.ops.selective_scan import plan
from tests import unwritten
from tests.compare import relative_error, worst
from tests.scans import PER_TOKEN, Tensors, call, make_scan, reference


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    with unwritten.unwritten_memory_is_nan():
        yield


def errors(
    values: Tensors, grads: Tensors, softplus: bool = True, documents: list[int] | None = None, **options: Any
) -> dict[str, float]:
    """Of outputs and gradients, against the recurrence in float64."""
    if documents is not None:
        options["layout"] = SequenceLayout.local(values["u"].shape[1], documents)
    want = reference(values, softplus, documents)
    got = call(values, softplus, **options)
    assert got[0].dtype == values["u"].dtype and got[1].dtype == values["initial_state"].dtype
    leaves = list(values.values())

    def gradients(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        loss = (found[0] * grads["o"]).sum() + (found[1] * grads["final"]).sum()
        return torch.autograd.grad(loss, leaves)

    found = {"o": relative_error(got[0], want[0]), "final": relative_error(got[1], want[1])}
    for name, ours, theirs in zip(values, gradients(got), gradients(want), strict=True):
        assert ours.dtype == values[name].dtype
        found[name] = relative_error(ours, theirs)
    return found


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("softplus", [True, False])
def test_it_equals_the_recurrence(seq_len: int, softplus: bool) -> None:
    for groups in (None, 1, 2):
        values, grads = make_scan(seq_len, batch=2, groups=groups, softplus=softplus)
        assert worst(errors(values, grads, softplus, chunk_size=8)) < 1e-12


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias", "initial_state"])
def test_what_is_left_out_changes_nothing_else(missing: str) -> None:
    values, grads = make_scan(19, batch=2)
    whole = {**values, missing: torch.zeros_like(values[missing])}
    if missing == "z":
        # silu of it is 1.
        whole["z"] = torch.full_like(values["z"], 1.2784645427610738)
    del values[missing]
    o = longspan.selective_scan(**values, delta_softplus=True, chunk_size=8)
    want, _ = reference(whole)
    assert relative_error(o, want) < 1e-12
    leaves = list(values.values())
    got, expected = (torch.autograd.grad((x * grads["o"]).sum(), leaves) for x in (o, want))
    assert worst(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-12


@pytest.mark.parametrize(
    "documents",
    [[0, 50], [0, 1, 50], [0, 49, 50], [0, 8, 16, 50], [0, 7, 9, 20, 21, 22, 23, 50], list(range(51))],
    ids=str,
)
def test_packed_documents_equal_separate_ones(documents: list[int]) -> None:
    values, grads = make_scan(50, documents=documents)
    assert worst(errors(values, grads, documents=documents, chunk_size=8)) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 1000, None])
def test_the_chunk_size_changes_nothing(chunk_size: int | None) -> None:
    values, grads = make_scan(70)
    assert worst(errors(values, grads, chunk_size=chunk_size)) < 1e-12


@pytest.mark.parametrize("numbers", [1, 7, 12, 40])
def test_blocks_of_rows_and_channels_change_nothing(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_TOKEN_NUMBERS_CPU", numbers)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    values, grads = make_scan(11, batch=3, channels=10, groups=2)
    assert len(plan.blocks_of(values["u"], 2, 3, 4)) > 3
    assert worst(errors(values, grads, chunk_size=4)) < 1e-12


@pytest.mark.parametrize("step", [1e-6, 5.0, 30.0, 1000.0])
def test_no_step_is_too_short_or_too_long(step: float) -> None:
    for softplus in (True, False):
        values, grads = make_scan(40, step=step, softplus=softplus)
        assert worst(errors(values, grads, softplus)) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision_stays_close_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    values, grads = make_scan(200, channels=16, state_size=8, dtype=dtype)
    assert worst(errors(values, grads)) < tolerance


def test_a_state_carries_from_one_call_to_the_next_with_its_gradient() -> None:
    values, grads = make_scan(45, batch=2)

    def part(start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
        own = {name: x[:, start:stop] if name in PER_TOKEN else x for name, x in values.items()}
        return call({**own, "initial_state": state}, chunk_size=8)

    first, state = part(0, 19, values["initial_state"])
    second, final = part(19, 45, state)
    got = torch.cat([first, second], dim=1), final
    want = reference(values)
    leaves = list(values.values())
    pairs = [
        torch.autograd.grad((o * grads["o"]).sum() + (state * grads["final"]).sum(), leaves) for o, state in (got, want)
    ]
    compared = [*zip(got, want, strict=True), *zip(*pairs, strict=True)]
    assert worst(relative_error(a, b) for a, b in compared) < 1e-12


def test_gradcheck() -> None:
    values, _ = make_scan(6, channels=2, state_size=2)
    names = list(values)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(dict(zip(names, tensors, strict=True)), chunk_size=4)

    assert torch.autograd.gradcheck(function, tuple(values.values()), fast_mode=False)


def test_a_later_token_changes_no_bit_of_an_earlier_output() -> None:
    values, _ = make_scan(40, dtype=torch.float32)
    before, _ = call(values, chunk_size=8)
    for name in PER_TOKEN:
        changed = values[name].detach().clone()
        changed[:, 21] += 100.0
        after, _ = call({**values, name: changed}, chunk_size=8)
        assert torch.equal(after[:, :21], before[:, :21]) and not torch.equal(after[:, 21:], before[:, 21:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_what_is_not_finite_stays_behind_its_token_and_in_its_document(name: str, value: float) -> None:
    documents = [0, 9, 30, 40]
    values, grads = make_scan(40, documents=documents)
    layout = SequenceLayout.local(40, documents)
    clean = call(values, layout=layout, chunk_size=8)
    leaves = list(values.values())
    before = torch.autograd.grad((clean[0] * grads["o"]).sum(), leaves)
    bad = values[name].detach().clone()
    bad[:, 17] = value
    given = {**values, name: bad.requires_grad_()}
    o, final = call(given, layout=layout, chunk_size=8)
    assert torch.equal(o[:, :17], clean[0][:, :17]) and torch.equal(o[:, 30:], clean[0][:, 30:])
    assert torch.equal(final[[0, 2]], clean[1][[0, 2]])
    assert not o[:, 17].isfinite().all()
    after = torch.autograd.grad((o * grads["o"]).sum(), list(given.values()))
    for key, ours, theirs in zip(values, after, before, strict=True):
        if key in PER_TOKEN:
            assert torch.equal(ours[:, :9], theirs[:, :9]) and torch.equal(ours[:, 30:], theirs[:, 30:])


def test_what_is_not_finite_in_a_gradient_reaches_no_later_token_and_no_other_document() -> None:
    documents = [0, 9, 30, 40]
    values, grads = make_scan(40, documents=documents)
    layout = SequenceLayout.local(40, documents)
    leaves = list(values.values())
    before = torch.autograd.grad((call(values, layout=layout)[0] * grads["o"]).sum(), leaves)
    bad = grads["o"].clone()
    bad[:, 17] = float("nan")
    after = torch.autograd.grad(call(values, layout=layout)[0], leaves, bad)
    for key, ours, theirs in zip(values, after, before, strict=True):
        if key in PER_TOKEN:
            assert torch.equal(ours[:, :9], theirs[:, :9]) and torch.equal(ours[:, 18:], theirs[:, 18:])
            assert ours[:, 17].isnan().any()


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_no_tensor_holds_every_state_and_backward_keeps_inputs_and_a_state_per_chunk() -> None:
    seq_len, channels, state_size, chunk_size = 1024, 16, 8, 32
    values, grads = make_scan(seq_len, channels=channels, state_size=state_size, dtype=torch.float32)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with Largest() as largest:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            o, _ = call(values, chunk_size=chunk_size)
        torch.autograd.grad(o, list(values.values()), grads["o"])
    of_tokens = seq_len * channels
    assert largest.numbers <= max(of_tokens, (chunk_size + 1) * channels * state_size)
    inputs = sum(x.numel() for x in values.values())
    assert sum(kept.values()) <= inputs + of_tokens * state_size // chunk_size + channels * state_size


def test_tokens_may_lie_behind_channels_in_memory() -> None:
    values, grads = make_scan(23, batch=2)
    turned = {
        name: x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() if name in PER_TOKEN else x
        for name, x in values.items()
    }
    assert worst(errors(turned, grads)) < 1e-12


def test_softplus_is_that_of_pytorch_on_either_side_of_its_threshold() -> None:
    values, grads = make_scan(30, channels=2)
    with torch.no_grad():
        values["delta"].copy_(torch.linspace(15, 25, 60, dtype=torch.float64).view(1, 30, 2))
        values["delta_bias"].zero_()
        values["A"].mul_(0.01)
    assert worst(errors(values, grads)) < 1e-13


def test_bad_values_are_refused_with_the_way_out() -> None:
    values, _ = make_scan(12, batch=2, softplus=False)

    def refuses(message: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=message):
            longspan.selective_scan(**{**values, **changes})

    refuses(
        r"A holds rates of decay and must not exceed 0; its largest value is 0.5. Use for example -torch.exp",
        A=values["A"] * 0 + 0.5,
    )
    refuses(
        r"must be at least 0; the smallest of all ranks is -1. .* delta_softplus=True",
        delta=values["delta"] * 0 - 1,
    )
    refuses(
        r"at least 0 with delta_bias; the smallest of all ranks is -",
        delta_bias=torch.full((4,), -9.0, dtype=torch.float64),
    )
    refuses(r"u \[B, T, E\], tokens before channels; got shape \(2, 12, 4, 1\)", u=values["u"].unsqueeze(-1))
    refuses(r"delta must be \[B, T, E\] = \(2, 12, 4\); got shape \(2, 4, 12\)", delta=values["delta"].transpose(1, 2))
    refuses(r"A must be \[E, N\] = \(4, 3\); got shape \(3, 4\)", A=values["A"].t())
    refuses(r"B must be \[B, T, N\] or \[B, T, G, N\] with B and T \(2, 12\)", B=values["B"].transpose(1, 2))
    refuses("multiple of the 3 groups of B", B=torch.zeros(2, 12, 3, 3, dtype=torch.float64))
    refuses("B and C must have one shape", B=torch.zeros(2, 12, 2, 3, dtype=torch.float64))
    refuses("one dtype out of float64, float32, bfloat16", u=values["u"].float())
    refuses(r"initial_state must be \[B, E, N\] = \(2, 4, 3\)", initial_state=values["initial_state"].mT)
    refuses(
        "u of float64, float32, bfloat16 with backend='torch'; got torch.float16",
        **{name: values[name].half() for name in ("u", "B", "C")},
    )
    values["delta"] = values["delta"] - 5
    longspan.selective_scan(**values, delta_softplus=True)


@pytest.mark.parametrize("softplus", [True, False])
def test_a_step_that_is_nan_is_nan_in_the_output(softplus: bool) -> None:
    values, _ = make_scan(9, softplus=softplus)
    with torch.no_grad():
        values["delta"][0, 4] = torch.nan
    o, _ = call(values, softplus)
    assert o[:, :4].isfinite().all() and o[:, 4:].isnan().all()


def test_it_is_gla_with_a_head_per_channel() -> None:
    values, _ = make_scan(40, batch=2)
    steps = F.softplus(values["delta"] + values["delta_bias"])
    o, state = longspan.gla(
        values["C"].unsqueeze(2),
        values["B"].unsqueeze(2),
        (values["u"] * steps).unsqueeze(-1),
        steps.unsqueeze(-1) * values["A"],
        scale=1.0,
        initial_state=values["initial_state"].unsqueeze(-1),
        output_final_state=True,
    )
    want = (o.squeeze(-1) + values["D"] * values["u"]) * F.silu(values["z"])
    got, final = call(values)
    assert relative_error(got, want) < 1e-12
    assert relative_error(final, state.squeeze(-1)) < 1e-12


@pytest.mark.slow_rows(r"^None$")
@pytest.mark.parametrize("documents", [None, [0, 5, 21]])
def test_the_kernels_of_gla_compute_it_too(documents: list[int] | None) -> None:
    pytest.importorskip("triton")
    values, grads = make_scan(21, channels=2, state_size=4, groups=2, documents=documents, dtype=torch.float32)
    assert worst(errors(values, grads, documents=documents, backend="triton", chunk_size=16)) < 1e-4
