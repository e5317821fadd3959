"""``longspan export``: the model of a run as Hugging Face Transformers reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.commands.options import parse_options, print_lines_of

_DESCRIPTION = """Write the model of a run as Hugging Face Transformers reads it: config, weights in safetensors, tokenizer.

  longspan export --run runs/my-run --to my-model
  python -c "import longspan.models.hf, transformers; transformers.AutoModelForCausalLM.from_pretrained('my-model')"

Weights are the same to the bit, and longspan import takes them back. Optimizer states, metrics and data stay in the run.
"""


@dataclass(frozen=True)
class Export:
    """Which model, and where it goes."""

    run: str
    """The run folder."""
    to: str
    """The folder to make."""
    checkpoint: str = "newest"
    """newest: the newest complete checkpoint, or else the weights file; weights: the weights file; the number of a step that has a
    checkpoint; or the path of a safetensors file."""
    data: str | None = None
    """The folder of prepared data whose tokenizer it is; None is where the run had it."""
    max_shard_size: str = "50GB"
    """Weights that are larger than this are several files and an index."""


def run(arguments: Sequence[str]) -> int:
    """Export as the arguments ask, and return the exit code."""
    options = parse_options(Export, "export", _DESCRIPTION, arguments, use_underscores=True)
    return print_lines_of(lambda: _export(options))


def _export(options: Export) -> list[str]:
    from longspan.train.hugging_face import check_installed, export_model
    from longspan.train.trained import open_trained

    check_installed("export")
    data = None if options.data is None else Path(options.data)
    trained = open_trained(Path(options.run), options.checkpoint, data)
    folder = Path(options.to)
    files = export_model(trained, folder, options.max_shard_size)
    parameters = trained.model.num_parameters()
    task = trained.config.data.task
    no_text = f"no tokenizer: the run was trained with data.task {task!r}, whose tokens are no text"
    notes = [no_text] if trained.text_tokenizer is None else []
    return [f"{trained.source}: {parameters:,} parameters, float32", *(f"  {folder / name}" for name in files), *notes]
