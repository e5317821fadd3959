"""Tasks of EleutherAI's Language Model Evaluation Harness (``lm-eval``) on the model of a run, through its Hugging Face form.

The harness is imported here alone: it comes with the extra ``longspan[eval]``.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longspan.errors import ConfigError


def check_installed() -> None:
    """Raise ConfigError where the harness is not installed."""
    missing = [name for name in ("lm_eval", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"longspan eval lm needs {' and '.join(missing)}, which is not installed. Install it with pip install 'longspan[eval]'"
        )


def task_manager(tasks: Sequence[str], include: Path | None, model_args: dict[str, Any]) -> Any:
    """The harness's `TaskManager`, which knows all of the tasks.

    Args:
        tasks: names of tasks, groups or tags.
        include: a folder of more tasks, YAML files; None is none.
        model_args: what tasks that make their data on the spot are told of the model.

    Raises:
        ConfigError: for a task that it does not know; the nearest are named.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include), metadata=model_args)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ConfigError(
                f"tasks has {name!r}, which lm-eval does not know. "
                + (f"Did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all")
            )
    return manager


def evaluate_tasks(
    folder: Path,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    max_length: int,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, Any]:
    """What the model in a folder, as ``longspan export`` writes it, makes of tasks: the harness's results.

    Args:
        limit: of each task take so many examples; None is all.
        num_fewshot: examples in front of each; None is as the task says.
        max_length: tokens of a prompt, of which the last are taken where it has more.

    Raises:
        ConfigError: for a task that is not known, or whose data cannot be had.
    """
    from lm_eval import simple_evaluate

    # Registers the classes.
    import longspan.models.hf  # noqa: F401

    model_args = {"pretrained": str(folder), "backend": "causal", "dtype": dtype, "max_length": max_length}
    manager = task_manager(tasks, include, model_args)
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # whatever a task's data raises: it is of many libraries
        raise ConfigError(
            f"a task of {', '.join(tasks)} could not be loaded: {type(error).__name__}: {error}. Most tasks fetch their data from "
            "the Hugging Face Hub: give access to it, or a task whose data is here (include)"
        ) from error
    # Once: some tasks make their data as they are loaded.
    manager.load = lambda names: loaded
    found: dict[str, Any] = simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=device,
        limit=limit,
        log_samples=False,
        task_manager=manager,
    )
    return found


def rows_of(found: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """The numbers in results: task or group, metric, value, and standard error where there is one."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            rows.append((task, name, float(value), error if isinstance(error, int | float) else None))
    return rows
