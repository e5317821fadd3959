"""A second call makes the host wait for no device: it reads nothing back, and copies no numbers there.

Without a GPU the device is ``meta``, whose tensors have no numbers to read: what looks at them raises. Copies to it are seen by a
dispatch mode. With a GPU, PyTorch itself refuses to wait.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan import SequenceLayout, tracing
from longspan.ops.variants import VARIANTS
from tests.tracing.calls import CALLS, inputs_of
from tests.variants import NUM_SLOTS, make_inputs

DOCUMENTS = [0, 3, 14, 90, 104, 130]
aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Records operations that make the host wait: numbers read back, masks as indices, and copies between devices."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default):
            self.found.append(str(func))
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or index.device != args[0].device):
                    self.found.append(f"{func} by {index.dtype} on {index.device}")
        result = func(*args, **kwargs)
        if func is aten._to_copy.default and args[0].device != result.device and not kwargs.get("non_blocking"):
            self.found.append(f"{func} from {args[0].device} to {result.device}")
        if func is aten.copy_.default and args[0].device != args[1].device and not any(args[2:]):
            self.found.append(f"{func} from {args[1].device} to {args[0].device}")
        return result


@contextmanager
def waits() -> Iterator[list[str]]:
    """What makes the host wait, as it is found: by operations, and by lists that PyTorch turns into indices unseen."""
    found: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(Tensor, name)

        def call(x: Tensor, index: Any, *value: Any) -> Any:
            indices = index if isinstance(index, tuple) else (index,)
            if x.device.type != "cpu" and any(isinstance(i, list) for i in indices):
                found.append(f"{name} by a list")
            return function(x, index, *value)

        return call

    def tensor(*arguments: Any, **options: Any) -> Tensor:
        made = make(*arguments, **options)
        if made.device.type != "cpu":
            found.append(f"torch.tensor on {made.device}")
        return made

    make = torch.tensor
    with pytest.MonkeyPatch.context() as patch, Operations(found):
        for name in ("__getitem__", "__setitem__"):
            patch.setattr(Tensor, name, watched(name))
        patch.setattr(torch, "tensor", tensor)
        yield found


@contextmanager
def as_if_with_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Computes on meta tensors as on those of a GPU, operation by operation."""
    asked = tracing.has_no_values
    with monkeypatch.context() as patch:
        for module in list(sys.modules.values()):
            if getattr(module, "has_no_values", None) is asked:
                patch.setattr(module, "has_no_values", lambda x: False)
        yield


def waits_of_a_second_call(call: Any, layout: SequenceLayout, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`call` takes nothing, and runs forward and backward."""
    with as_if_with_values(monkeypatch):
        call()
        kept = set(layout._cache)
        with waits() as found:
            call()
    assert set(layout._cache) == kept
    return found


def on_device(tensors: Sequence[Tensor], device: str, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(device, dtype).requires_grad_(x.requires_grad) for x in tensors]


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x[[0, 2]],
        lambda x: x.__setitem__([0, 2], 0.0),
        lambda x: x[torch.tensor([0, 2])],
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device="meta"),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to("meta"),
        lambda x: x[x > 0],
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
    ],
)
def test_what_makes_the_host_wait_is_seen(look: Any) -> None:
    with waits() as found:
        try:
            look(torch.zeros(3, device="meta"))
        except (RuntimeError, NotImplementedError) as error:
            found.append(str(error))
    assert found


# Of those that share their code another one is here.
@pytest.mark.slow_rows(r"^(retention|comba|delta_rule|gated_delta_rule)-")
@pytest.mark.slow_rows(r"^(?!simple_gla-).*-documents1$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(
    r"^(dplr_delta_rule|gated_delta_product|hgrn2|retention of both sides)-", r"^(selective scan|softmax of a window)-"
)
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("name", CALLS)
def test_no_operator_waits_in_a_second_call(
    name: str, documents: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, layout = CALLS[name], SequenceLayout.local(130, documents)
    tensors = on_device(inputs_of(call, 130, documents), "meta", torch.float32)

    def function() -> None:
        outputs = call.function(layout, *tensors)
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])

    assert not waits_of_a_second_call(function, layout, monkeypatch)


# Of those that share their code another one is here.
@pytest.mark.slow_rows(r"^(retention|gla_with_bonus|comba|delta_rule|gated_delta_rule)-")
@pytest.mark.slow_rows(r"^(?!simple_gla-).*-documents1$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(kda|gla|gated_slot_attention)-")
@pytest.mark.parametrize(("order", "documents"), [("contiguous", None), ("zigzag", DOCUMENTS)])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_form_waits_where_states_come_from_other_ranks(
    name: str, order: Any, documents: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = SequenceLayout.for_rank(130, 3, 1, order, documents)
    inputs = make_inputs(name, layout.num_local_tokens, heads=2, dtype=torch.float32)
    pieces = layout.pieces
    q, k, v, *given = on_device([inputs.q, inputs.k, inputs.v, *inputs.gates.values()], "meta", torch.float32)
    gates = dict(zip(inputs.gates, given, strict=True))
    shape = (1, 2, *VARIANTS[name].state_size(k.shape[-1], v.shape[-1], NUM_SLOTS))
    starts = sum(piece.starts_document for piece in pieces)
    start_states = torch.empty(starts, *shape, device="meta", requires_grad=True)
    incoming = torch.empty(layout.num_segments, *shape, device="meta", requires_grad=True)
    last = [max(n for n, piece in enumerate(pieces) if piece.segment == s) for s in range(layout.num_segments)]
    final = [n for n, piece in enumerate(pieces) if piece.ends_document]
    asked = sorted({*last, *final})
    lengths = [stop - start for start, stop in layout.segments]
    ranges = [(sum(lengths[:s]), sum(lengths[: s + 1])) for s in range(layout.num_segments)]

    def function() -> None:
        form = VARIANTS[name].prepare(k, v, gates, layout, 16, "torch")
        ends = form.write(k, v, start_states, asked, last)
        cut = [
            any(piece.starts_document and piece.segment == s for piece in pieces) for s in range(layout.num_segments)
        ]
        form.transition(ranges).cut(cut).apply(incoming)
        o = form.read(q, lambda: incoming, 0.5, False)
        finals = form.final_states(final, [asked.index(n) for n in final], incoming)
        torch.autograd.backward([o, ends, finals], [torch.empty_like(x) for x in (o, ends, finals)])

    assert not waits_of_a_second_call(function, layout, monkeypatch)


@pytest.mark.slow_rows(r"^(?!simple_gla-).*-documents1$")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("name", CALLS)
def test_no_operator_waits_for_a_gpu_in_a_second_call(name: str, documents: list[int] | None) -> None:
    call, layout = CALLS[name], SequenceLayout.local(130, documents)
    tensors = on_device(inputs_of(call, 130, documents), "cuda", torch.float32)
    leaves = [x for x in tensors if x.requires_grad]
    outputs = call.function(layout, *tensors)
    grads = [torch.ones_like(x) for x in outputs]
    torch.autograd.grad(outputs, leaves, grads)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call.function(layout, *tensors), leaves, grads)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
