"""What several tests need and no test changes is made once, whatever the number of pytest's processes."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

Made = TypeVar("Made")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Made]) -> Made:
    """What `make` returns, JSON, given a new folder: called by the first process of this session that asks for `name`."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Each worker has a folder of its own in that of the session.
        root = root.parent
    result = root / f"{name}.json"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            made = make(Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root)))
            result.write_text(json.dumps(made))
        value: Made = json.loads(result.read_text())
        return value
