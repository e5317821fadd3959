"""Rows of a test that only `make test-all` runs, because others of their kind run in `make test`: ``@pytest.mark.slow_rows(...)``.

Where parameters are multiplied no single one of them has the marker ``slow``. The marker stands at the test, and names such rows by
regular expressions that are searched for in the parameters' id, what stands in brackets behind the test's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

# Of all that was collected, what the default selection has.
NOT_SLOW = pytest.StashKey[list[str]]()


def mark_slow_rows(items: Sequence[pytest.Item]) -> list[str]:
    """Mark as slow what matches; the expressions that match no row of their test are returned, with its name."""
    hits: dict[tuple[str, str], bool] = {}
    for item in items:
        test, _, row = item.nodeid.partition("[")
        for expression in (found for mark in item.iter_markers("slow_rows") for found in mark.args):
            is_hit = re.search(expression, row.removesuffix("]")) is not None
            hits[test, expression] = hits.get((test, expression), False) or is_hit
            if is_hit:
                item.add_marker(pytest.mark.slow)
    return [f"{test}: {expression}" for (test, expression), is_hit in hits.items() if not is_hit]
