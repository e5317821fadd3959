"""Under torch.autocast operators take their inputs as a matrix product does; outside it mixed dtypes are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan import InputError, SequenceLayout
from longspan.ops.variants import VARIANTS
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.variants import LOW_RANK, operator_of

TOKENS = 21
PRODUCTS = {"q", "k", "v", "x", "u", "B", "C", "weight", "bias", "past_k", "past_v"}
"""What autocast casts; gates, steps and states stay in float32."""
PER_TOKEN = {"q", "k", "v", "x", "u", "B", "C", "s", "g", "beta", "dt", "delta", "f", *LOW_RANK}


@dataclass(frozen=True)
class Call:
    """A call of an operator: shapes of its inputs by name, without rows and tokens for what is in PER_TOKEN."""

    function: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]


def softmax_after_a_past(past_k: Tensor, past_v: Tensor, **inputs: Any) -> Any:
    return longspan.softmax_attention(initial_state=(past_k, past_v), output_final_state=True, **inputs)


def written_and_read(k: Tensor, v: Tensor, g: Tensor, q: Tensor, layout: Any) -> Tensor:
    return longspan.write("simple_gla", k, v, g=g, layout=layout).read(q)


def softmax_written_and_read(k: Tensor, v: Tensor, q: Tensor, layout: Any) -> Tensor:
    return longspan.write("softmax", k, v, layout=layout).read(q, softcap=2.0, sinks=torch.ones(4))


def both_ways(operator: str) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        return getattr(longspan, operator)(causal=False, **inputs)

    return call


def gla_with_bonus(bonus: Tensor, **inputs: Any) -> Any:
    return longspan.gla(u=bonus, **inputs)


def hgrn2(q: Tensor, f: Tensor, v: Tensor, layout: Any) -> Any:
    return longspan.hgrn2(q, f, v, layout=layout)


def normalized(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Any:
    return longspan.normalized_linear_attention(q.abs(), k.abs(), v, layout=layout)


def operators() -> dict[str, Call]:
    heads = dict.fromkeys(("q", "k", "v"), (4, 8))
    sizes = {"N": 2, "H": 4, "K": 8, "M": 3}
    found = {}
    for name, variant in VARIANTS.items():
        gates = {gate.name: tuple(sizes[dim] for dim in gate.dims if dim in sizes) for gate in variant.gates}
        steps = dict.fromkeys(("k", "v"), (2, 4, 8)) if variant.has_steps else {}
        found[name] = Call(operator_of(name), {**heads, **steps, **gates})
    # Of heads alone, and not of tokens, as the u of Mamba is.
    found["gla_with_bonus"] = Call(gla_with_bonus, {**heads, "g": (4, 8), "bonus": (4, 8)})
    past = {"past_k": (1, 3, 4, 8), "past_v": (1, 3, 4, 8)}
    state_space = {"x": (4, 8), "dt": (4,), "A": (4,), "B": (2, 8), "C": (2, 8)}
    return {
        **found,
        "linear_attention, both ways": Call(both_ways("linear_attention"), heads),
        "retention, both ways": Call(both_ways("retention"), {**heads, "log_decay": (4,)}),
        "write and read": Call(written_and_read, {**heads, "g": (4,)}),
        "softmax": Call(longspan.softmax_attention, heads),
        "softmax after a past": Call(softmax_after_a_past, {**heads, **past}),
        "softmax, write and read": Call(softmax_written_and_read, heads),
        "convolution": Call(longspan.causal_conv1d, {"x": (6,), "weight": (6, 4), "bias": (6,)}),
        "mamba2": Call(longspan.mamba2, state_space),
        "selective_scan": Call(
            longspan.selective_scan, {"u": (6,), "delta": (6,), "A": (6, 8), "B": (2, 8), "C": (2, 8)}
        ),
        "hgrn2": Call(hgrn2, {"q": (4, 8), "f": (4, 8), "v": (4, 8)}),
        "normalized": Call(normalized, heads),
    }


CALLS = operators()


def inputs_of(call: Call, seed: int = 0) -> dict[str, Tensor]:
    """float32, but for v, x and B, which are bfloat16, as where norms and rotary embeddings have made the others wider."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in call.shapes.items():
        x = torch.randn((1, TOKENS, *shape) if name in PER_TOKEN else shape, generator=generator)
        if name in ("g", "log_decay", "A"):
            x = -x.abs()
        elif name in ("beta", "dt", "delta"):
            x = x.sigmoid()
        elif name in LOW_RANK:
            x = LOW_RANK[name] * torch.nn.functional.normalize(x, dim=-1)
        elif name == "k":
            x = torch.nn.functional.normalize(x, dim=-1)
        tensors[name] = x.bfloat16() if name in ("v", "x", "u", "B") else x
    return tensors


def outcome(call: Call, tensors: dict[str, Tensor], layout: Any, autocast: bool) -> list[Tensor]:
    """Outputs and gradients; without autocast, of inputs that are cast by hand."""
    leaves = {name: x.clone().requires_grad_(name != "log_decay") for name, x in tensors.items()}
    given = leaves
    if not autocast:
        given = {name: x.bfloat16() if name in PRODUCTS else x for name, x in leaves.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = call.function(**given, layout=layout)
    outputs = [found] if isinstance(found, Tensor) else [found[0], *found[1]]
    assert all(x.dtype == torch.bfloat16 for x in outputs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs]
    wanted = [x for x in leaves.values() if x.requires_grad]
    got = torch.autograd.grad(outputs, wanted, grads)
    assert [x.dtype for x in got] == [x.dtype for x in wanted]
    return [*outputs, *got]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_under_autocast_is_that_of_inputs_cast_by_hand(name: str) -> None:
    """To the last bit, outputs and gradients: what is computed inside keeps its own dtype."""
    tensors = inputs_of(CALLS[name])
    pairs = zip(outcome(CALLS[name], tensors, None, True), outcome(CALLS[name], tensors, None, False), strict=True)
    for number, (got, want) in enumerate(pairs):
        assert torch.isfinite(want).all()
        assert torch.equal(got, want), number


@pytest.mark.parametrize("name", CALLS)
def test_mixed_dtypes_outside_autocast_and_float64_inside_are_refused(name: str) -> None:
    tensors = inputs_of(CALLS[name])
    if name == "hgrn2":
        tensors["q"] = tensors["q"].half()
    with pytest.raises(InputError, match=r"dtype|Convert|Cast"):
        CALLS[name].function(**tensors, layout=None)
    wide = {x: tensors[x].double() if x in ("v", "x", "u") else tensors[x] for x in tensors}
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match=r"dtype|Convert|Cast"):
        CALLS[name].function(**wide, layout=None)


def test_queries_take_the_dtype_of_what_was_written_before() -> None:
    tensors = {name: x.float() for name, x in inputs_of(CALLS["simple_gla"]).items()}
    for written in (
        longspan.write("simple_gla", tensors["k"], tensors["v"], g=tensors["g"]),
        longspan.write("softmax", tensors["k"], tensors["v"]),
    ):
        want = written.read(tensors["q"].bfloat16().float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(written.read(tensors["q"].bfloat16()), want)


def on_ranks(name: str) -> float:
    call = CALLS[name]
    tensors = inputs_of(call)
    layout = SequenceLayout(TOKENS, order="zigzag")
    own = {key: layout.shard(x) if key in PER_TOKEN else x for key, x in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        got, want = call.function(**own, layout=layout), call.function(**tensors, layout=SequenceLayout.local(TOKENS))
    if isinstance(got, tuple):
        got, want = got[0], want[0]
    return relative_error(got, layout.shard(want))


@pytest.mark.slow_rows(r"^kda")
@pytest.mark.parametrize(
    "name", ["kda", "linear_attention, both ways", "softmax after a past", "convolution", "mamba2", "selective_scan"]
)
def test_ranks_give_the_same(name: str) -> None:
    assert worst(run_on_ranks(2, on_ranks, name)) <= 2e-2


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gated_delta_rule$")
@pytest.mark.parametrize(
    "name", ["gated_delta_rule", "softmax after a past", "convolution", "mamba2", "selective_scan"]
)
def test_a_compiled_call_gives_the_same(name: str) -> None:
    call = CALLS[name]
    tensors = inputs_of(call)

    def compute(inputs: dict[str, Tensor]) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call.function(**inputs, layout=None)

    want, got = compute(tensors), torch.compile(compute, backend="aot_eager", fullgraph=True)(tensors)
    torch.testing.assert_close(got, want)
