"""Runs that were not made: what the tests of a study's report and of its order of work share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longspan.study.grid import Cell
from longspan.study.results import folder_of


def write_summary(study: Path, cell: Cell, **values: Any) -> Path:
    """The summary of a run that is done; its folder."""
    folder = folder_of(study, cell)
    folder.mkdir(parents=True)
    summary = {
        "parameters": 1000,
        "validation_loss": 4.0,
        "tokens_per_second": 100.0,
        "seconds_of_this_process": 60.0,
        **values,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
