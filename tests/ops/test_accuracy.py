"""No operator loses more digits than its recurrence does in the same dtype, whatever the decays."""

from __future__ import annotations

import pytest
import torch

from tests.ops.accuracy import GATES, errors

DECAYS = ["linear_attention", "retention", "simple_gla", "gla", "gated_slot_attention"]


@pytest.mark.slow_rows(r"-dtype1-")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(simple_gla|retention)-")
@pytest.mark.parametrize("backend", ["torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DECAYS)
def test_errors_are_at_most_three_times_those_of_the_recurrence(name: str, dtype: torch.dtype, backend: str) -> None:
    # Below a few units of the last place an error says nothing.
    floor = 2 * torch.finfo(dtype).eps
    for gates in GATES:
        for key, (error, of_recurrence) in errors(name, gates, dtype, backend).items():
            assert error <= 3 * of_recurrence or error <= 3 * floor, (gates, key, error, of_recurrence)
