"""No test compares errors with what a NaN passes: Python's `max` drops it, and `max(size, 1)` hides what is small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# It defines the comparison.
DEFINES_IT = {"compare.py"}

NAMES_OF_ERRORS = re.compile(r"error|differ|worst|deviat", re.IGNORECASE)
# What makes a number of tensors: `max` over it may drop a NaN.
MAKES_NUMBERS = {"float", "item", "abs", "relative_error", "norm"}
LARGEST = {"max", "amax", "nanmax"}


def offences(source: str) -> list[tuple[int, str]]:
    """Line and kind of every comparison by hand in `source`.

    Three kinds: Python's `max` over errors (by a name that says so, by what makes numbers of tensors, or by a function of the file
    that returns floats or tensors, also on ranks); the largest of an absolute difference (`(a - b).abs().max()`), which
    `relative_error` is for; and a size that is not allowed to be small (`….clamp(min=1)` of a largest value).
    """
    tree = ast.parse(source)
    floats = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.returns and re.search("float|Tensor", ast.unparse(node.returns))
    }
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = set(_in_scope(tree, floats, set()))
    for function in functions:
        found |= set(_in_scope(function, floats, _names_of_numbers(function, floats)))
    return sorted(found)


def _in_scope(scope: ast.AST, floats: set[str], numbers: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(scope):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id == "max":
            if any(_speaks_of_errors(argument, floats, numbers) for argument in node.args):
                yield node.lineno, "max() over errors: use tests.compare.worst"
        elif isinstance(node.func, ast.Attribute):
            of = node.func.value
            if node.func.attr in LARGEST and _is_absolute_difference(of):
                yield node.lineno, "the largest difference: use tests.compare.relative_error"
            if node.func.attr in {"clamp", "clamp_min"} and any(
                isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr in LARGEST
                for inner in ast.walk(of)
            ):
                yield node.lineno, "a size that may not be small: give relative_error a floor"


def _speaks_of_errors(node: ast.AST, floats: set[str], numbers: set[str]) -> bool:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and (NAMES_OF_ERRORS.search(inner.id) or inner.id in floats | numbers):
            return True
        if isinstance(inner, ast.Attribute) and (NAMES_OF_ERRORS.search(inner.attr) or inner.attr in MAKES_NUMBERS):
            return True
        if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name) and inner.func.id in MAKES_NUMBERS:
            return True
    return False


def _names_of_numbers(function: ast.FunctionDef, floats: set[str]) -> set[str]:
    """Names that the function binds to errors, directly or by way of other names."""
    names: set[str] = set()
    while True:
        before = set(names)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                targets, value = node.targets, node.value
            elif isinstance(node, ast.For | ast.comprehension):
                targets, value = [node.target], node.iter
            else:
                continue
            # Of several names bound at once any may be the errors.
            if _speaks_of_errors(value, floats, names):
                names |= {x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)}
        if names == before:
            return names


def _is_absolute_difference(node: ast.expr) -> bool:
    """Whether `node` is `….abs()` of something that subtracts, perhaps with calls between."""
    inside = False
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        inside = inside or node.func.attr == "abs"
        node = node.func.value
    return inside and isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub)


def test_every_test_compares_by_the_helpers() -> None:
    files = [path for path in sorted(TESTS.rglob("*.py")) if path.name not in DEFINES_IT]
    assert len(files) > 50
    found = {
        str(path.relative_to(TESTS)): lines for path in files if (lines := offences(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "assert max(errors.values()) < 1e-10",
        "assert max(errors) < 1e-12",
        "worst = max(worst, (error, name))",
        "return max((x - y).abs().max().item() for x, y in zip(got, want))",
        "assert max(run_on_ranks(4, subgroup)) < 1e-12",
        "for rounded, exact in run_on_ranks(4, rounded_errors):\n        assert max(exact) < 1e-5",
        "found = run_on_ranks(4, subgroup)\n    again = [x for x in found]\n    assert max(again) < 1",
        "assert max(differences.values(), default=0) < 1e-10",
        "assert max(float(x) for x in values) < 1",
        "return float((got - want).abs().max() / want.abs().max())",
        "return (got.double() - want).detach().abs().amax(dim=0)",
        "assert (got - want).abs().max() < 0.04 * want.abs().max()",
        "size = want.abs().max().clamp(min=1.0)",
        "assert error <= tolerance * max(1.0, want.abs().max().item())",
    ],
)
def test_what_a_nan_passes_is_found(line: str) -> None:
    source = f"def subgroup() -> float:\n    return 0.0\n\n\ndef test() -> None:\n    {line}\n"
    assert offences(source), line


@pytest.mark.parametrize(
    "line",
    [
        "assert max(counts) - min(counts) <= 1",
        "tokens = max(lengths)",
        "document = max(bound for bound in bounds[:-1] if bound <= start)",
        "self.num_elements = max(self.num_elements, tensor.numel())",
        "timeout = max(0.0, deadline - time.monotonic())",
        "assert max(run_on_ranks(4, count)) == 3",
        "assert want.abs().max() > 0.1",
        "assert worst(errors) < 1e-10",
        "x = values.clamp(min=1e-3)",
        "assert max(saved.values()) <= scores",
    ],
)
def test_what_counts_or_measures_is_left_alone(line: str) -> None:
    source = f"def count() -> int:\n    return 0\n\n\ndef test() -> None:\n    {line}\n"
    assert offences(source) == []
