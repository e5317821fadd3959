"""What every test shares: the ranks end with the session."""

from __future__ import annotations

import pytest

from tests.ranks import stop_ranks


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    stop_ranks()
