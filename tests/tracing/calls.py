"""One call of every public operator, with random inputs and gradients, for tests of compilers, checkpoints and fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import longspan
from longspan import SequenceLayout, features
from longspan.ops.chunked.swiglu import chunked_swiglu
from longspan.ops.variants import VARIANTS
from tests.variants import LOW_RANK, operator_of

HEADS, SIZE = 4, 8
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """A call of an operator: `function(layout, *tensors)` gives a tuple of tensors.

    shapes: of the tensors by name, "B" and "T" for rows and tokens, "D" for documents, or rows without documents. Names in
    `constants` take no gradient.
    """

    function: Callable[..., Outputs]
    shapes: Mapping[str, tuple[int | str, ...]]
    constants: tuple[str, ...] = ()


def _outputs(found: Any) -> Outputs:
    return found if isinstance(found, tuple) else (found,)


HEADS_OF_KEYS = ("B", "T", 2, SIZE)
HEADS_OF_VALUES = ("B", "T", HEADS, SIZE)
TOKENS = {"q": HEADS_OF_KEYS, "k": HEADS_OF_KEYS, "v": HEADS_OF_VALUES}
NUM_SLOTS = 3


def _gate_shapes(operator: str) -> dict[str, tuple[int | str, ...]]:
    sizes: dict[str, int | str] = {"B": "B", "T": "T", "N": 2, "H": HEADS, "K": SIZE, "M": NUM_SLOTS}
    return {gate.name: tuple(sizes[dim] for dim in gate.dims) for gate in VARIANTS[operator].gates}


def _one_call(operator: str) -> Call:
    names = [gate.name for gate in VARIANTS[operator].gates]

    def function(layout: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, *gates: Tensor) -> Outputs:
        call = operator_of(operator)
        options = {"initial_state": state, "output_final_state": True, "layout": layout}
        return _outputs(call(q, k, v, **dict(zip(names, gates, strict=True)), **options))

    constants = tuple(gate.name for gate in VARIANTS[operator].gates if not gate.differentiable)
    shapes: dict[str, tuple[int | str, ...]] = dict(TOKENS)
    if VARIANTS[operator].has_steps:
        shapes |= {name: (*shapes[name][:2], 2, *shapes[name][2:]) for name in ("k", "v")}
    state = ("D", HEADS, *VARIANTS[operator].state_size(SIZE, SIZE, NUM_SLOTS))
    return Call(function, {**shapes, "state": state, **_gate_shapes(operator)}, constants)


def _linear_attention_of_both_sides(layout: Any, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return _outputs(longspan.linear_attention(q, k, v, causal=False, layout=layout))


def _retention_of_both_sides(layout: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Outputs:
    return _outputs(longspan.retention(q, k, v, log_decay, causal=False, layout=layout))


def _written_and_read_twice(layout: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    memory = longspan.write("simple_gla", k, v, g=g, layout=layout, output_final_state=True)
    return memory.read(q), memory.read(q.tanh(), 0.3), memory.final_state()


def _final_state_alone(layout: Any, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    return (longspan.write("gla", k, v, g=g, layout=layout, output_final_state=True).final_state(),)


def _normalized(layout: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Outputs:
    q, k = features.elu_plus_one(q), features.elu_plus_one(k)
    return _outputs(longspan.normalized_linear_attention(q, k, v, operator="simple_gla", g=g, layout=layout))


def _mamba2(layout: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Outputs:
    options: Any = {"dt_softplus": True, "dt_limit": (0.3, 2.0), "layout": layout}
    return _outputs(longspan.mamba2(x, dt, -A.exp(), B, C, D=D, z=z, **options))


def _selective_scan(layout: Any, u: Tensor, delta: Tensor, A: Tensor, *others: Tensor) -> Outputs:
    B, C, D, z, bias, state = others
    options: Any = {"initial_state": state, "output_final_state": True, "layout": layout, "chunk_size": 16}
    return _outputs(longspan.selective_scan(u, delta, -A.exp(), B, C, D, z, bias, True, **options))


def _selective_scan_of_steps(layout: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Outputs:
    return _outputs(longspan.selective_scan(u, delta.abs(), -A.exp(), B, C, layout=layout))


def _hgrn2(layout: Any, q: Tensor, f: Tensor, i: Tensor, bound: Tensor) -> Outputs:
    return _outputs(longspan.hgrn2(q, f, i, lower_bound=bound.sigmoid(), layout=layout))


def _convolution(layout: Any, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Outputs:
    y = longspan.causal_conv1d(x, weight, bias, "silu", layout, initial_state=state, output_final_state=True)
    return _outputs(y)


def _long_convolution(layout: Any, x: Tensor, taps: Tensor, before: Tensor) -> Outputs:
    options: Any = {"initial_state": before, "output_final_state": True, "layout": layout}
    return _outputs(longspan.long_conv1d(x, taps, **options))


def _long_convolution_of_a_function(layout: Any, x: Tensor, weight: Tensor) -> Outputs:
    def taps(lags: Tensor, channels: range) -> Tensor:
        return (weight[channels.start : channels.stop] * torch.exp(-lags.double() / 20)).to(x.dtype)

    return (longspan.long_conv1d(x, longspan.FunctionKernel(taps), layout=layout),)


def _exponentials(layout: Any, x: Tensor, log_decay: Tensor, coefficients: Tensor, state: Tensor) -> Outputs:
    options: Any = {"initial_state": state, "output_final_state": True, "layout": layout}
    return _outputs(longspan.long_conv1d(x, longspan.ExponentialKernel(log_decay, coefficients), **options))


def _complex_exponentials(layout: Any, x: Tensor, log_decay: Tensor, g: Tensor, state: Tensor) -> Outputs:
    kernel = longspan.ExponentialKernel(torch.complex(log_decay, 3 * log_decay), torch.complex(g, -g))
    options: Any = {"initial_state": torch.complex(state, -state), "output_final_state": True, "layout": layout}
    y, final = longspan.long_conv1d(x, kernel, **options)
    return y, torch.view_as_real(final)


def _shift(layout: Any, x: Tensor) -> Outputs:
    return (longspan.token_shift(x, layout=layout),)


def _shift_from_a_state(layout: Any, x: Tensor, state: Tensor) -> Outputs:
    return _outputs(longspan.token_shift(x, initial_state=state, output_final_state=True, layout=layout))


def _softmax(layout: Any, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (longspan.softmax_attention(q, k, v, layout=layout),)


def _softmax_of_a_window(layout: Any, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (longspan.softmax_attention(q, k, v, causal=False, window=20, scale=0.4, layout=layout),)


def _softmax_written_and_read(layout: Any, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    memory = longspan.write("softmax", k, v, layout=layout, num_heads=HEADS)
    return (memory.read(q * 2.0),)


def _softmax_after_a_past(layout: Any, q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Outputs:
    if layout is not None and layout.is_packed:
        # Documents have no past.
        return (longspan.softmax_attention(q + 0.0 * (past_k.sum() + past_v.sum()), k, v, layout=layout),)
    o, final = longspan.softmax_attention(
        q, k, v, window=20, initial_state=(past_k, past_v), output_final_state=True, layout=layout
    )
    return o, *final


def _softmax_of_narrow_values(layout: Any, q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (longspan.softmax_attention(q, k, v[..., :3], layout=layout),)


def _softmax_with_sinks(layout: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Outputs:
    return (longspan.softmax_attention(q, k, v, softcap=1.5, sinks=sinks, layout=layout),)


def _norm(layout: Any, x: Tensor, gate: Tensor, weight: Tensor) -> Outputs:
    return (longspan.rms_norm_gated(x, gate, weight),)


def _loss(layout: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
    labels = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(x.shape[:2]) % 11
    labels = labels.masked_fill(labels < 2, -100)
    return (longspan.chunked_cross_entropy(x, weight, labels, bias=bias, chunk_size=16, softcap=2.0).view(1, 1),)


def _swiglu(layout: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Outputs:
    return (chunked_swiglu(x, gate, up, down, 16),)


def _features(layout: Any, x: Tensor, bias: Tensor) -> Outputs:
    g, k = features.hgrn2_log_decay(x, bias.sigmoid())
    return (
        *(f(x) for f in (features.elu_plus_one, features.relu, features.unit_length, features.taylor)),
        features.gla_log_decay(x),
        features.mamba2_log_decay(x, bias),
        g,
        k,
    )


SOFTMAX = {"q": HEADS_OF_VALUES, "k": HEADS_OF_KEYS, "v": HEADS_OF_KEYS}
GATE = {"g": ("B", "T", HEADS)}
CALLS = {
    **{operator: _one_call(operator) for operator in VARIANTS},
    "linear_attention of both sides": Call(_linear_attention_of_both_sides, TOKENS),
    "retention of both sides": Call(_retention_of_both_sides, {**TOKENS, "log_decay": (HEADS,)}, ("log_decay",)),
    "write and read": Call(_written_and_read_twice, {**TOKENS, **GATE}),
    "final state": Call(
        _final_state_alone,
        {"k": HEADS_OF_KEYS, "v": HEADS_OF_VALUES, "g": HEADS_OF_VALUES},
    ),
    "normalized": Call(_normalized, {**TOKENS, **GATE}),
    "mamba2": Call(
        _mamba2,
        {
            "x": HEADS_OF_VALUES,
            "dt": ("B", "T", HEADS),
            "A": (HEADS,),
            "B": HEADS_OF_KEYS,
            "C": HEADS_OF_KEYS,
            "D": (HEADS,),
            "z": HEADS_OF_VALUES,
        },
    ),
    "selective scan": Call(
        _selective_scan,
        {
            "u": ("B", "T", 6),
            "delta": ("B", "T", 6),
            "A": (6, SIZE),
            "B": ("B", "T", 2, SIZE),
            "C": ("B", "T", 2, SIZE),
            "D": (6,),
            "z": ("B", "T", 6),
            "bias": (6,),
            "state": ("D", 6, SIZE),
        },
    ),
    "selective scan of steps": Call(
        _selective_scan_of_steps,
        {"u": ("B", "T", 6), "delta": ("B", "T", 6), "A": (6, SIZE), "B": ("B", "T", SIZE), "C": ("B", "T", SIZE)},
    ),
    "hgrn2": Call(_hgrn2, {"q": HEADS_OF_VALUES, "f": HEADS_OF_VALUES, "i": HEADS_OF_VALUES, "bound": (HEADS, SIZE)}),
    "convolution": Call(_convolution, {"x": ("B", "T", 6), "weight": (6, 4), "bias": (6,), "state": ("D", 3, 6)}),
    "long convolution": Call(_long_convolution, {"x": ("B", "T", 6), "taps": (6, 40), "before": ("D", 39, 6)}),
    "long convolution of a function": Call(_long_convolution_of_a_function, {"x": ("B", "T", 6), "weight": (6, 1)}),
    "exponentials": Call(
        _exponentials, {"x": ("B", "T", 6), "log_decay": (6, 3), "coefficients": (6, 3), "state": ("D", 6, 3)}
    ),
    "complex exponentials": Call(
        _complex_exponentials, {"x": ("B", "T", 6), "log_decay": (6, 3), "g": (6, 3), "state": ("D", 6, 3)}
    ),
    "token shift": Call(_shift, {"x": ("B", "T", 6)}),
    "token shift from a state": Call(_shift_from_a_state, {"x": ("B", "T", 6), "before": ("D", 6)}),
    "softmax": Call(_softmax, SOFTMAX),
    "softmax of a window": Call(_softmax_of_a_window, SOFTMAX),
    "softmax of narrow values": Call(_softmax_of_narrow_values, SOFTMAX),
    "softmax with sinks": Call(_softmax_with_sinks, {**SOFTMAX, "sinks": (HEADS,)}),
    "softmax, write and read": Call(_softmax_written_and_read, SOFTMAX),
    "softmax after a past": Call(
        _softmax_after_a_past, {**SOFTMAX, "past_k": ("B", 5, 2, SIZE), "past_v": ("B", 5, 2, SIZE)}
    ),
    "norm": Call(_norm, {"x": HEADS_OF_VALUES, "gate": HEADS_OF_VALUES, "weight": (SIZE,)}),
    "cross-entropy": Call(_loss, {"x": ("B", "T", 6), "weight": (11, 6), "bias": (11,)}),
    "feed-forward": Call(_swiglu, {"x": ("B", "T", 6), "gate": (8, 6), "up": (8, 6), "down": (5, 8)}),
    "features": Call(_features, {"x": HEADS_OF_VALUES, "bias": (HEADS, SIZE)}),
}


def inputs_of(
    call: Call, seq_len: int, documents: Sequence[int] | None = None, *, batch: int = 2, seed: int = 0
) -> list[Tensor]:
    """Random tensors of a call in float64, for the whole sequence; log decays are at most 0, other gates between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = batch if documents is None else 1
    sizes = {"B": rows, "T": seq_len, "D": rows if documents is None else len(documents) - 1}
    tensors = []
    for name, shape in call.shapes.items():
        dims = [sizes[n] if isinstance(n, str) else n for n in shape]
        x = torch.randn(dims, generator=generator, dtype=torch.float64)
        if name in ("g", "log_decay"):
            x = F.logsigmoid(x)
        elif name == "beta":
            x = x.sigmoid()
        elif name in LOW_RANK:
            x = LOW_RANK[name] * features.unit_length(x)
        elif name == "k":
            x = features.unit_length(x)
        tensors.append(x.requires_grad_(name not in call.constants))
    return tensors


def local_inputs(call: Call, tensors: Sequence[Tensor], layout: SequenceLayout) -> list[Tensor]:
    """What the rank of `layout` holds of `inputs_of`, as leaves."""
    held = []
    for shape, x in zip(call.shapes.values(), tensors, strict=True):
        own = layout.shard(x.detach()) if "T" in shape else x.detach()
        held.append(own.clone().requires_grad_(x.requires_grad))
    return held


def results(function: Callable[..., Outputs], layout: Any, tensors: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """The outputs and the gradients of all inputs, for random gradients of the outputs."""
    outputs = function(layout, *tensors)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    leaves = [x for x in tensors if x.requires_grad]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]
