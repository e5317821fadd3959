"""The default selection of tests sees each of the planted faults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.planted import FAULTS, PROJECT_ROOT, Fault, NotPlantedError, outcome
from tests.slow_rows import NOT_SLOW


def selected(arguments: Sequence[str], of: Iterable[str]) -> list[str]:
    """Which of these tests pytest takes of a fault's arguments: a file, a test or a row, and `-k` with words that it must have."""
    place, *rest = arguments
    words: list[str] = []
    if rest:
        option, expression = rest
        words = expression.split(" and ")
        assert option == "-k" and not {"or", "not"} & set(expression.split())
    named = (test for test in of if test == place or test.startswith((f"{place}::", f"{place}[")))
    return [test for test in named if all(word.lower() in test.partition("::")[2].lower() for word in words)]


@pytest.mark.parametrize("name", FAULTS)
def test_the_text_of_every_fault_is_in_the_package(name: str) -> None:
    fault = FAULTS[name]
    fault.planted_in((PROJECT_ROOT / fault.file).read_text(encoding="utf-8"))
    assert (PROJECT_ROOT / fault.tests[0].split("::")[0]).exists()


def test_a_fault_whose_text_is_not_there_once_is_an_error() -> None:
    fault = Fault("longspan/state.py", "a + b", "a - b", ())
    assert fault.planted_in("x = a + b\n") == "x = a - b\n"
    for source in ("x = a\n", "x = a + b + a + b\n"):
        with pytest.raises(NotPlantedError, match="must be there once"):
            fault.planted_in(source)


def test_a_row_a_test_or_a_file_may_be_named_and_words_of_it() -> None:
    tests = [
        "tests/a.py::test_x[one-2]",
        "tests/a.py::test_x[two-2]",
        "tests/a.py::test_xy",
        "tests/ab.py::test_x[one-2]",
    ]
    assert selected(["tests/a.py"], tests) == tests[:3]
    assert selected(["tests/a.py::test_x"], tests) == tests[:2]
    assert selected(["tests/a.py::test_x[one-2]"], tests) == tests[:1]
    assert selected(["tests/a.py", "-k", "test_x and Two"], tests) == tests[1:2]
    assert selected(["tests/a.py::test_x[one-3]"], tests) == selected(["tests/a.py", "-k", "three"], tests) == []


def test_every_fault_has_tests_in_the_default_selection(request: pytest.FixtureRequest) -> None:
    if request.config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        pytest.skip("not all tests are collected")
    quick = request.config.stash[NOT_SLOW]
    assert [name for name, fault in FAULTS.items() if not selected(fault.tests, quick)] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_tests_see_a_planted_fault(name: str, tmp_path: Path) -> None:
    done = outcome(FAULTS[name], tmp_path)
    # 1: tests ran, and some failed. A copy that cannot be imported or tests that do not exist end otherwise.
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout.splitlines()[-1], done.stdout[-4000:]
    assert " error" not in done.stdout.splitlines()[-1], done.stdout[-4000:]
