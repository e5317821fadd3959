"""``longspan import``: a Linear-Llama3 that Transformers has written, as a run folder."""
# ruff: noqa: N999  (each command's file has its name)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from longspan.commands.options import parse_options, print_lines_of

_DESCRIPTION = """Make a run folder of a Linear-Llama3 that Hugging Face Transformers, or longspan export, has written.

  longspan import my-model --to runs/imported
  longspan generate --run runs/imported --prompt "def main("
  longspan train --config runs/imported/config.toml --run.dir runs/further --data.source my-text

Weights are the same to the bit; bfloat16 and float16 become float32, which a run keeps them in. Pickled weights are refused, and so
are other architectures, and missing, extra or misshapen tensors, all of them listed.
"""


@dataclass(frozen=True)
class Import:
    """Which model, and where it goes."""

    folder: Annotated[str, tyro.conf.Positional]
    """The folder of the model."""
    to: str
    """The run folder to make."""


def run(arguments: Sequence[str]) -> int:
    """Import as the arguments ask, and return the exit code."""
    options = parse_options(Import, "import", _DESCRIPTION, arguments, use_underscores=True)
    return print_lines_of(lambda: _import(options))


def _import(options: Import) -> list[str]:
    from longspan.train.hugging_face import check_installed, import_model

    check_installed("import")
    imported = import_model(Path(options.folder), options.to)
    made = imported.run
    files = [path for path in (made.config, made.weights, made.tokenizer) if path.is_file()]
    return [f"{imported.num_tensors} tensors", *(f"  {path}" for path in files), *imported.notes]
