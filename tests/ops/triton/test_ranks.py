"""The kernels over several ranks: outputs, states and every gradient equal the recurrent form, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan.ops.triton import stretches
from tests.attention.test_conformance import errors_on_rank
from tests.compare import worst
from tests.ops.triton.test_decay import NAMES
from tests.ranks import run_on_ranks
from tests.unwritten import unwritten_memory_is_nan

SEQ_LEN = 75
DOCUMENTS = [0, 1, 20, 26, 60, 75]


@unwritten_memory_is_nan()
def errors_of_kernels(name: str, cases: list[tuple[Any, list[int] | None, str]]) -> list[dict[str, float]]:
    # Several stretches in every segment.
    stretches.MIN_LENGTH = 16
    results = []
    for order, documents, form in cases:
        options = {"heads": 2, "key_heads": 1, "dtype": torch.float32}
        call = (name, "all_gather", order, documents, SEQ_LEN, form, options)
        results.append(errors_on_rank(*call, backend="triton", chunk_size=16))
    return results


# The phases are the same for all: on three ranks by default the two that send decays.
# One of each kind of decay.
QUICK = {("linear_attention", 2), ("retention", 2), ("simple_gla", 3), ("gla", 2)}


@pytest.mark.slow_rows(r"^(simple_gla-3|linear_attention-2|retention-2)")
# Documents over bounds of ranks by the overlapped form, which calls all kernels of the fused one.
@pytest.mark.slow_rows(r"-one document$")
@pytest.mark.parametrize("case", ["one document", "documents"])
@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [pytest.param(name, n, marks=pytest.mark.slow if (name, n) not in QUICK else ()) for name in NAMES for n in (2, 3)],
)
def test_kernels_around_the_exchange_equal_the_recurrent_form_on_every_rank(
    name: str, num_ranks: int, case: str
) -> None:
    cases: list[tuple[Any, list[int] | None, str]] = [("zigzag", None, "fused")]
    if case == "documents":
        cases = [("contiguous", DOCUMENTS, "overlapped" if num_ranks == 2 else "fused")]
    for rank, results in enumerate(run_on_ranks(num_ranks, errors_of_kernels, name, cases)):
        for errors in results:
            assert worst(errors) < 2e-5, f"rank {rank} of {num_ranks}: {errors}"
