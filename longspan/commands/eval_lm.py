"""``longspan eval lm``: tasks of lm-eval on the model of a run."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longspan.commands.evaluation import check_counts
from longspan.commands.inference import is_beyond_training, say
from longspan.commands.options import parse_options, refuse
from longspan.errors import ConfigError, LongspanError
from longspan.launch import EXIT_DONE, num_cores, place_of_this_process

_DESCRIPTION = """Tasks of EleutherAI's lm-eval on the model of a run, through its Hugging Face form, in one process.

  longspan eval lm --run runs/my-run --tasks hellaswag lambada_openai --limit 100
  longspan eval lm --run runs/my-run --tasks my_task --include tasks/

Needs pip install 'longspan[eval]'. The results are on stdout.

Exit codes: 0 done, 1 failed, 2 refused (the message says how to mend it).
"""


@dataclass(frozen=True)
class EvalLm:
    """Which model, and which tasks."""

    run: str
    """The run folder."""
    tasks: tuple[str, ...]
    """Names of tasks, groups or tags of lm-eval (lm-eval ls tasks lists them)."""
    checkpoint: str = "newest"
    """newest: the newest complete checkpoint, or else the weights file; weights: the weights file; the number of a step that has a
    checkpoint; or the path of a safetensors file."""
    data: str | None = None
    """The folder of prepared data whose tokenizer it is; None is where the run had it."""
    include: str | None = None
    """A folder of more tasks, YAML files as lm-eval takes them."""
    limit: int | None = None
    """Take so many examples of each task; None is all."""
    num_fewshot: int | None = None
    """Examples in front of each; None is as the task says."""
    batch_size: int = 1
    """Examples at once."""
    max_length: int | None = None
    """Tokens of a prompt, of which the last are taken where it has more; None is train.seq_len."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and layers; auto is what the run was trained in."""
    device: str = "cpu"
    """Where to compute, such as cuda:0."""
    threads: int | None = None
    """CPU threads; None is all cores."""
    json: str | None = None
    """Write the harness's results to this file, too, as JSON."""

    def check(self) -> None:
        """Raise ConfigError for options that do not fit."""
        from longspan.evaluation.harness import check_installed

        if not self.tasks:
            raise ConfigError("tasks is empty; give at least one task of lm-eval")
        for name in ("limit", "batch_size", "max_length", "threads"):
            value = getattr(self, name)
            if value is not None:
                check_counts(name, (value,))
        if self.num_fewshot is not None:
            check_counts("num_fewshot", (self.num_fewshot,), 0)
        if self.include is not None and not Path(self.include).is_dir():
            raise ConfigError(f"include is {self.include!r}, which is no folder. Give a folder of tasks")
        place = place_of_this_process()
        if place is not None and place.world_size > 1:
            raise ConfigError(f"eval lm runs in one process; got {place.world_size} ranks. Start it without torchrun")
        check_installed()


def run(arguments: Sequence[str]) -> int:
    """Evaluate as the arguments ask, and return the exit code."""
    options = parse_options(EvalLm, "eval lm", _DESCRIPTION, arguments, use_underscores=True)
    try:
        options.check()
        _evaluate(options)
    except LongspanError as error:
        return refuse(error)
    return EXIT_DONE


def _evaluate(options: EvalLm) -> None:
    import torch

    from longspan.commands.table import columns
    from longspan.evaluation.harness import evaluate_tasks, rows_of
    from longspan.train.hugging_face import export_model
    from longspan.train.trained import open_trained

    torch.set_num_threads(options.threads or num_cores())
    data = None if options.data is None else Path(options.data)
    trained = open_trained(Path(options.run), options.checkpoint, data)
    dtype = trained.config.train.dtype if options.dtype == "auto" else options.dtype
    max_length = options.max_length or trained.config.train.seq_len
    say(f"{trained.source}, {dtype}")
    if is_beyond_training(trained, max_length):
        say(
            f"warning: {max_length:,} tokens are more than the {trained.config.train.seq_len:,} of a sequence that softmax layers "
            "were trained for: what comes behind may be poor"
        )
    # The harness says how far it is on stdout, which is for results.
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder, contextlib.redirect_stdout(sys.stderr):
        export_model(trained, Path(folder))
        found = evaluate_tasks(
            Path(folder),
            options.tasks,
            include=None if options.include is None else Path(options.include),
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            max_length=max_length,
            dtype=dtype,
            device=options.device,
        )
    rows = [
        [task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"]
        for task, metric, value, error in rows_of(found)
    ]
    sys.stdout.write(columns(["task", "metric", "value", "standard error"], rows))
    sys.stdout.flush()
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"json {options.json!r} could not be written: {error}. Give another file") from error
