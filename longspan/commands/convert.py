"""``longspan convert``: a Llama as a Linear-Llama3, in a run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longspan.commands.options import parse_options, refuse
from longspan.errors import LongspanError
from longspan.launch import EXIT_DONE

if TYPE_CHECKING:
    from longspan.train.conversion import Convert

_DESCRIPTION = """Make a Linear-Llama3 of a Llama: a local folder with config.json and weights in safetensors.

  longspan convert my-llama --to runs/converted --pattern LLLN --operator gla
  longspan convert my-llama --to runs/converted --operator gated_deltanet --transfer.steps 500 --data.source my-text
  longspan train --config runs/converted/config.toml --run.dir runs/further --train.seq_len 8192 --train.batch_tokens 65536

N layers are the Llama's own. Of L layers what the Llama has is copied, and the rest begins as docs/conversion.md says. With
transfer.steps these layers are first trained to give what the softmax layers gave, on one process. The run folder has a list of all
tensors and what they were made of, conversion.md and conversion.json.

Refused are other architectures, biases, rotary embeddings of another scaling than Llama 3.1's, and pickled weights; and missing,
extra or misshapen tensors, all of them listed.
"""


def run(arguments: Sequence[str]) -> int:
    """Convert as the arguments ask, and return the exit code."""
    from longspan.train.conversion import Convert, convert_llama

    options = parse_options(Convert, "convert", _DESCRIPTION, arguments, use_underscores=True)
    try:
        converted = convert_llama(options, lambda step, error: _say(options, step, error))
    except LongspanError as error:
        return refuse(error)
    folder = converted.run
    written = [folder.config, folder.weights, folder.tokenizer, folder.conversion_text, folder.conversion_json]
    lines = [*converted.report.summary(), *(f"  {path}" for path in written if path.is_file())]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return EXIT_DONE


def _say(options: Convert, step: int, error: float) -> None:
    """A line for about every twentieth step."""
    steps = options.transfer.steps
    if step in (1, steps) or step % max(1, steps // 20) == 0:
        sys.stderr.write(f"longspan: attention transfer, step {step} of {steps}: error {error:.4f}\n")
        sys.stderr.flush()
