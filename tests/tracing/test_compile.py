"""`torch.compile`: every public operator gives what it gives without, in one graph on one device, for all lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longspan import SequenceLayout
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks
from tests.tracing.calls import CALLS, inputs_of, local_inputs, results

# PyTorch's own, where it loads inductor, and where it stops a graph: it hides the latter from a user, but not from an error filter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings(
        "ignore:Torchinductor does not support code generation for complex operators:UserWarning"
    ),
]
LENGTHS = (100, 130, 77, 260)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def num_compiled() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def documents_of(length: int, number: int) -> list[int]:
    """Bounds of `number` documents of different lengths, the second of one token."""
    return [0, 7, *(8 + index * index * (length - 8) // (number - 2) ** 2 for index in range(number - 2)), length]


def check_one_device(name: str, backend: str, lengths: tuple[int, ...], with_documents: bool) -> None:
    call = CALLS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call.function, backend=backend, fullgraph=True)
    for number, length in enumerate(lengths):
        documents = documents_of(length, 4 + number) if with_documents else None
        layout = SequenceLayout.local(length, documents) if with_documents else None
        tensors = inputs_of(call, length, documents)
        expected = results(call.function, layout, tensors)
        # Twice: a layout must not compile anew once metadata has been built of it.
        for _ in range(2):
            got = results(compiled, layout, tensors)
            assert worst([relative_error(x, y) for x, y in zip(got, expected, strict=True)]) < 1e-10, (name, length)
        assert num_compiled() <= min(2, number + 1), (name, length)


# One of each kind of node; the others are made of the same.
QUICK = {"simple_gla", "gated_delta_rule", "softmax", "convolution", "mamba2"}


# As a graph the gated delta rule has all that it has.
@pytest.mark.slow_rows(r"^simple_gla-True$")
@pytest.mark.slow_rows(r"simple_gla-False", r"mamba2-True", r"^(?!simple_gla-False).*-False$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^convolution-True$")
@pytest.mark.parametrize(
    ("name", "with_documents"),
    [
        pytest.param(name, packed, marks=() if name in QUICK or not packed else pytest.mark.slow)
        for name in CALLS
        for packed in (False, True)
    ],
)
def test_one_graph_serves_all_lengths(name: str, with_documents: bool) -> None:
    check_one_device(name, "aot_eager", LENGTHS, with_documents)


@pytest.mark.parametrize("name", ["gla", pytest.param("delta_rule", marks=pytest.mark.slow)])
def test_inductor_gives_the_same(name: str) -> None:
    check_one_device(name, "inductor", LENGTHS[:3], False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_inductor_gives_the_same_for_every_operator(name: str) -> None:
    check_one_device(name, "inductor", LENGTHS, True)


def compiled_on_ranks(name: str, backend: str, order: Any, documents: bool) -> tuple[float, int]:
    call = CALLS[name]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call.function, backend=backend)
    errors = []
    for number, length in enumerate(LENGTHS):
        bounds = documents_of(length, 4 + number) if documents else None
        layout = SequenceLayout(length, order=order, documents=bounds)
        tensors = local_inputs(call, inputs_of(call, length, bounds), layout)
        # Compiled first: nothing of the exchange has been made for this layout before.
        got = results(compiled, layout, tensors)
        expected = results(call.function, layout, tensors)
        errors += [relative_error(x, y) for x, y in zip(got, expected, strict=True)]
        graphs = num_compiled()
        if number == 1:
            after_two = graphs
    torch._dynamo.reset()
    return worst(errors), graphs - after_two


@pytest.mark.slow_rows(r"^(gated_delta_rule|softmax)$")
@pytest.mark.slow_rows(r"mamba2")
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_ranks_give_the_same(name: str) -> None:
    for error, later_graphs in run_on_ranks(2, compiled_on_ranks, name, "aot_eager", "zigzag", False, timeout=180.0):
        assert error < 1e-10
        assert later_graphs == 0


@pytest.mark.slow
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("name", CALLS)
def test_ranks_with_documents_give_the_same(name: str, order: str) -> None:
    for error, later_graphs in run_on_ranks(2, compiled_on_ranks, name, "aot_eager", order, True, timeout=180.0):
        assert error < 1e-10
        assert later_graphs == 0
