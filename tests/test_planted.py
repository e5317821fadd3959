"""The default selection of tests sees each of the planted faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted import FAULTS, PROJECT_ROOT, Fault, NotPlantedError, outcome


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


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_tests_see_a_planted_fault(name: str, tmp_path: Path) -> None:
    done = outcome(FAULTS[name], tmp_path)
    # 1: tests ran, and some failed. A copy that cannot be imported or tests that do not exist end otherwise.
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 failed" in done.stdout.splitlines()[-1], done.stdout[-4000:]
    assert " error" not in done.stdout.splitlines()[-1], done.stdout[-4000:]
