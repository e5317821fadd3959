"""The delta rule by flash-linear-attention's functions equals the recurrent form, and asks nothing of them that they do not have.

Their kernels need a GPU. A stand-in with their signatures computes by the recurrent form, in float64, so that everything around
them is checked: the pair of a stretch from widened values, documents, layouts, states, and every gradient.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import longspan
from longspan.errors import InputError
from longspan.ops import backends
from longspan.ops.variants import VARIANTS
from tests.attention.test_conformance import documents_of, errors_on_rank
from tests.compare import relative_error, worst, worst_of
from tests.ops.test_variants import run, unwritten_memory_is_nan, worst_error
from tests.ranks import run_on_ranks
from tests.variants import make_inputs

__all__ = ["unwritten_memory_is_nan"]

NAMES = ["delta_rule", "gated_delta_rule", "kda"]
MODULES = {"delta_rule": "fla.ops.delta_rule", "gated_delta_rule": "fla.ops.gated_delta_rule", "kda": "fla.ops.kda"}
CHUNK_SIZES = {"delta_rule": (16, 32, 64), "gated_delta_rule": (16, 32, 64), "kda": (32, 64)}

# Of flash-linear-attention 0.6.0, in the order of its functions; those that are used here.
SHARED = ("scale", "initial_state", "output_final_state", "cu_seqlens", "cu_seqlens_cpu", "kwargs")
PARAMETERS = {
    "delta_rule": ("q", "k", "v", "beta", *SHARED),
    "gated_delta_rule": ("q", "k", "v", "g", "beta", *SHARED),
    "kda": ("q", "k", "v", "g", "beta", *SHARED),
}


def _computed(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: dict[str, Tensor],
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    cu_seqlens_cpu: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    assert set(options) <= {"chunk_size"} and options.get("chunk_size", 64) in CHUNK_SIZES[name]
    assert q.shape == k.shape and q.dtype == k.dtype == v.dtype
    heads, wide = v.shape[2], q.dtype == torch.float64
    assert heads % k.shape[2] == 0 and (name != "delta_rule" or (heads == k.shape[2] and q.dtype != torch.float32))
    assert gates["beta"].shape == v.shape[:3]
    if name != "delta_rule":
        assert gates["g"].shape == (*v.shape[:3], *([k.shape[3]] if name == "kda" else []))
    dtype = q.dtype
    q, k = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (q, k))
    scale = k.shape[3] ** -0.5 if scale is None else scale
    num_sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = v.new_zeros(
            num_sequences, heads, k.shape[3], v.shape[3], dtype=q.dtype if wide else torch.float32
        )
    assert initial_state.shape == (num_sequences, heads, k.shape[3], v.shape[3])
    assert initial_state.dtype == (torch.float64 if wide else torch.float32)
    form = VARIANTS[name].recurrent
    q, k, v = (x.to(initial_state.dtype) for x in (q, k, v))
    if cu_seqlens is None:
        o, final = form(q, k, v, gates, scale, initial_state)
    else:
        assert cu_seqlens_cpu is not None and cu_seqlens_cpu.device.type == "cpu" and q.shape[0] == 1
        assert cu_seqlens.dtype == torch.int64 and torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu)
        assert int(cu_seqlens[-1]) == q.shape[1]
        outputs, finals = [], []
        for number, (start, stop) in enumerate(pairwise(cu_seqlens_cpu.tolist())):
            rows = slice(start, stop)
            own = {key: gate[:, rows] for key, gate in gates.items()}
            state = initial_state[number : number + 1]
            o, final = form(q[:, rows], k[:, rows], v[:, rows], own, scale, state)
            outputs.append(o)
            finals.append(final)
        o, final = torch.cat(outputs, dim=1), torch.cat(finals)
    return o.to(dtype), final if output_final_state else None


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    gates = {"beta": beta}
    return _computed(
        "delta_rule", q, k, v, gates, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, kwargs
    )


def _gated(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def function(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        gates = {"g": g, "beta": beta}
        return _computed(
            name, q, k, v, gates, scale, initial_state, output_final_state, cu_seqlens, cu_seqlens_cpu, kwargs
        )

    return function


FUNCTIONS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "delta_rule": chunk_delta_rule,
    "gated_delta_rule": _gated("gated_delta_rule"),
    "kda": _gated("kda"),
}


@contextmanager
def stand_in() -> Iterator[list[dict[str, Any]]]:
    """The functions above in place of the package, which then takes float64; yields the arguments of every call."""
    calls: list[dict[str, Any]] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            calls.append(arguments)
            return function(**arguments)

        return call

    names = ["fla", "fla.ops", *MODULES.values()]
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
    for variant, name in MODULES.items():
        setattr(modules[name], f"chunk_{variant}", noted(FUNCTIONS[variant]))
    before = {name: sys.modules.get(name) for name in names}
    dtypes = backends.DTYPES["fla"]
    sys.modules.update(modules)
    backends.DTYPES["fla"] = (*dtypes, torch.float64)
    try:
        yield calls
    finally:
        backends.DTYPES["fla"] = dtypes
        for name, earlier in before.items():
            if earlier is None:
                del sys.modules[name]
            else:
                sys.modules[name] = earlier


def test_the_stand_in_has_the_parameters_that_the_functions_have() -> None:
    for name, function in FUNCTIONS.items():
        assert tuple(inspect.signature(function).parameters) == PARAMETERS[name]


# It warns where there is no GPU.
needs_fla = pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed")
warns = pytest.mark.filterwarnings("ignore")


@needs_fla
@warns
def test_the_installed_functions_have_these_parameters() -> None:
    for name, module in MODULES.items():
        function = getattr(import_module(module), f"chunk_{name}")
        assert set(PARAMETERS[name]) <= set(inspect.signature(function).parameters)


def test_the_delta_family_has_the_backend() -> None:
    assert [name for name, variant in VARIANTS.items() if "fla" in variant.backends] == NAMES


@pytest.mark.parametrize("form", ["fused", "overlapped"])
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_recurrent_form_with_every_gradient(name: str, form: str) -> None:
    for seq_len, documents, batch in [(1, None, 2), (13, None, 2), (13, [0, 1, 6, 13], 1), (5, [0, 5], 1)]:
        inputs = make_inputs(name, seq_len, documents=documents, batch=batch, heads=4, key_heads=2)
        with stand_in():
            assert worst_error(*run(name, inputs, form, chunk_size=32, backend="fla")) < 1e-12


def test_one_rank_makes_one_call_with_the_values_as_they_are() -> None:
    for documents in (None, [0, 4, 13]):
        inputs = make_inputs("kda", 13, documents=documents)
        with stand_in() as calls:
            run("kda", inputs, chunk_size=None, backend="fla")
        (call,) = calls
        assert call["v"].shape == inputs.v.shape and "chunk_size" not in call


def test_layers_share_the_bounds_of_documents() -> None:
    """What the package keeps for bounds that it has seen it finds again: after the first layer nothing waits for the device."""
    inputs = make_inputs("gated_delta_rule", 12, documents=[0, 5, 12])
    layout = longspan.SequenceLayout.local(12, inputs.documents)
    with stand_in() as calls:
        for _ in range(2):
            longspan.gated_delta_rule(inputs.q, inputs.k, inputs.v, **inputs.gates, layout=layout, backend="fla")
    first, second = calls
    assert first["cu_seqlens"] is second["cu_seqlens"] and first["cu_seqlens_cpu"] is second["cu_seqlens_cpu"]


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_is_read_twice_and_its_final_state_without_reading(name: str) -> None:
    inputs = make_inputs(name, 9, documents=[0, 2, 9])
    arguments: dict[str, Any] = {"initial_state": inputs.initial_state, "output_final_state": True, "chunk_size": 32}
    layout = longspan.SequenceLayout.local(9, inputs.documents)
    results = []
    for backend in ("fla", "torch"):
        with stand_in():
            memory = longspan.write(
                name, inputs.k, inputs.v, **inputs.gates, layout=layout, backend=backend, **arguments
            )
            final = memory.final_state()
            o = memory.read(inputs.q, 0.7) + memory.read(2.0 * inputs.q, 0.1)
        loss = (o * inputs.grad_o).sum() + (final * inputs.grad_final).sum()
        results.append([o, final, *torch.autograd.grad(loss, inputs.leaves())])
    for got, expected in zip(*results, strict=True):
        assert relative_error(got, expected) < 1e-10


def test_a_decay_to_nothing_is_finite_when_it_gets_there() -> None:
    """It takes differences of sums of log decays, which must not be NaN; e^-128 is zero in float32."""
    inputs = make_inputs("kda", 12)
    values = inputs.gates["g"].detach().clone()
    values.view(-1)[::7] = -torch.inf
    inputs.gates["g"] = values.requires_grad_()
    with stand_in() as calls:
        got, expected = run("kda", inputs, chunk_size=32, backend="fla")
    assert calls[0]["g"].min() == -128
    assert worst_error(got, expected) < 1e-12


def test_half_precision_keeps_states_in_single() -> None:
    inputs = make_inputs("gated_delta_rule", 11, documents=[0, 3, 11], dtype=torch.bfloat16)
    with stand_in():
        got, expected = run("gated_delta_rule", inputs, chunk_size=16, backend="fla")
    assert worst_error(got, expected) < 3e-2


def worst_over_ranks(name: str, order: str, packing: str) -> tuple[float, str]:
    """This rank's largest error over lengths and forms, and what it is of."""
    errors: dict[str, float] = {}
    for seq_len, form in itertools.product((7, 23), ("fused", "overlapped")):
        documents = documents_of(packing, seq_len)
        options = {"batch": 2 if documents is None else 1, "heads": 2, "key_heads": 1, "seed": seq_len}
        with stand_in():
            found = errors_on_rank(
                name, "all_gather", order, documents, seq_len, form, options, backend="fla", chunk_size=32
            )
        errors |= {f"{key} of {seq_len} tokens, {form}": error for key, error in found.items()}
    return worst_of(errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(kda|gated_delta_rule)-one document-2$", r"^delta_rule-packed-2$")
@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("packing", ["one document", "packed", pytest.param("short documents", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_over_ranks_it_equals_the_recurrent_form_with_every_gradient(name: str, packing: str, num_ranks: int) -> None:
    for order in ("contiguous", "zigzag"):
        for error, what in run_on_ranks(num_ranks, worst_over_ranks, name, order, packing):
            assert error < 1e-10, (order, what, error)


def calls_on_rank(order: Any, documents: list[int] | None) -> list[tuple[int, ...]]:
    """Tokens and columns of the values of each call that one layer makes."""
    inputs = make_inputs("kda", 24, documents=documents, key_size=3, value_size=5)
    layout = longspan.SequenceLayout(24, order=order, documents=documents)
    tensors = [layout.shard(x) for x in (inputs.q, inputs.k, inputs.v, inputs.gates["g"], inputs.gates["beta"])]
    with stand_in() as calls:
        longspan.kda(*tensors, layout=layout, exchange="all_gather", backend="fla")
    return [tuple(call["v"].shape[i] for i in (1, 3)) for call in calls]


def test_values_are_widened_only_where_another_rank_waits_for_a_transition() -> None:
    # A document that starts where the segment does has a zero transition, and the last rank's state goes nowhere.
    assert run_on_ranks(3, calls_on_rank, "contiguous", None) == [[(8, 5), (8, 5)], [(8, 8), (8, 5)], [(8, 5)]]
    # Of the first rank's two segments one is the sequence's last; both of the other's are one call.
    assert run_on_ranks(2, calls_on_rank, "zigzag", None) == [[(6, 5), (12, 5)], [(12, 8), (12, 5)]]
    # Of a segment only the last document is sent.
    assert run_on_ranks(2, calls_on_rank, "contiguous", [0, 5, 12, 24]) == [[(7, 5), (12, 5)], [(12, 5)]]


def run_its_kernels_on_the_cpu() -> None:
    """Two things that the package's kernels do not find in Triton's interpreter: a driver to time on, and counters with a dtype."""
    autotuner: Any = import_module("triton.runtime.autotuner").Autotuner
    convert = import_module("triton.runtime.interpreter")._implicit_cvt
    # Any of a kernel's configurations does.
    autotuner._bench = lambda *args, **kwargs: [0.0, 0.0, 0.0]
    for module in MODULES.values():
        import_module(module)

    def counters(*bounds: Any) -> Iterator[Any]:
        return map(convert, range(*(bound.__index__() for bound in bounds)))

    for name, module_of_kernels in list(sys.modules.items()):
        if name.startswith("fla.ops.") and any(hasattr(x, "arg_names") for x in vars(module_of_kernels).values()):
            vars(module_of_kernels)["range"] = counters


def errors_of_its_kernels(name: str, order: str, documents: list[int] | None, form: str) -> dict[str, float]:
    run_its_kernels_on_the_cpu()
    options = {"heads": 2, "key_heads": 1, "key_size": 16, "value_size": 16, "dtype": torch.float16}
    return errors_on_rank(name, "all_gather", order, documents, 44, form, options, backend="fla", chunk_size=32)


@needs_fla
@warns
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_its_own_kernels_equal_the_recurrent_form_with_every_gradient(name: str, num_ranks: int) -> None:
    for order, documents, form in [("contiguous", None, "fused"), ("zigzag", [0, 5, 30, 44], "overlapped")]:
        for errors in run_on_ranks(num_ranks, errors_of_its_kernels, name, order, documents, form, timeout=300.0):
            assert worst(errors) < 3e-3, (order, errors)


def _inputs(dtype: torch.dtype = torch.bfloat16, key_size: int = 8) -> dict[str, Any]:
    return {
        "q": torch.zeros(1, 4, 1, key_size, dtype=dtype),
        "k": torch.zeros(1, 4, 1, key_size, dtype=dtype),
        "v": torch.zeros(1, 4, 1, 8, dtype=dtype),
        "beta": torch.zeros(1, 4, 1),
    }


@pytest.mark.skipif(find_spec("fla") is not None, reason="fla is installed")
def test_without_the_package_the_error_says_how_to_install_it() -> None:
    with pytest.raises(InputError, match=r"needs the package 'fla'.*longspan\[fla\]"):
        longspan.delta_rule(**_inputs(), backend="fla")


@pytest.mark.parametrize(
    ("inputs", "chunk_size", "message"),
    [
        (_inputs(torch.float32), None, "takes bfloat16 or float16; got float32"),
        (_inputs(key_size=257), None, "keys of size up to 256; got K = 257"),
        (_inputs(), 48, "a chunk_size of 16, 32, 64; got 48"),
    ],
)
def test_what_the_package_does_not_take_is_refused(
    inputs: dict[str, Any], chunk_size: int | None, message: str
) -> None:
    with stand_in(), pytest.raises(InputError, match=message):
        longspan.delta_rule(**inputs, backend="fla", chunk_size=chunk_size)


def test_the_package_computes_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.ops.triton import launch

    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with stand_in(), pytest.raises(InputError, match="backend='fla' runs on NVIDIA GPUs; the tensors are on cpu"):
        longspan.delta_rule(**_inputs(), backend="fla")


def test_operators_without_it_say_which_backends_they_have() -> None:
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(InputError, match="backend must be None or one of"):
        longspan.linear_attention(x, x, x, backend="fla")
