"""``longspan convert``: a Llama as a Linear-Llama3, in a run folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from longspan.commands.inference import InferenceParallel, say
from longspan.commands.options import parse_options, refuse
from longspan.errors import LongspanError
from longspan.launch import EXIT_DONE, Place, StopRequest, place_of_this_process, run_local_ranks, run_rank
from longspan.train.conversion import ConvertedRun, convert_llama
from longspan.train.conversion_options import Convert, check_options

_DESCRIPTION = """Make a Linear-Llama3 of a Llama: a local folder with config.json and weights in safetensors.

  longspan convert my-llama --to runs/converted --pattern LLLN --operator gla
  longspan convert my-llama --to runs/converted --operator gated_deltanet --transfer.steps 500 --data.source my-text
  longspan convert my-llama --to runs/converted --transfer.steps 500 --data.source my-text --parallel.sp 4
  longspan train --config runs/converted/config.toml --run.dir runs/further --train.seq_len 8192 --train.batch_tokens 65536

N layers are the Llama's own. Of L layers what the Llama has is copied, and the rest begins as docs/conversion.md says. With
transfer.steps these layers are first trained to give what the softmax layers gave; with parallel.sp each sequence is split over
ranks of this machine, or those of torchrun. The run folder has a list of all tensors and what they were made of, conversion.md and
conversion.json.

Refused are other architectures, biases, rotary embeddings of another scaling than Llama 3.1's, and pickled weights; and missing,
extra or misshapen tensors, all of them listed.
"""


@dataclass(frozen=True)
class ConvertParallel(InferenceParallel):
    """On how many ranks, and on which, attention transfer runs."""

    order: Literal["contiguous", "zigzag"] = "zigzag"
    """Which tokens of a sequence a rank holds: one run of them, or two that balance softmax layers (zigzag)."""


@dataclass(frozen=True)
class ConvertOnRanks(Convert):
    """Which Llama, what its layers become, how they begin, and where they learn."""

    parallel: ConvertParallel = field(default_factory=ConvertParallel)


def run(arguments: Sequence[str]) -> int:
    """Convert as the arguments ask, and return the exit code."""
    import tyro

    options = parse_options(
        *(ConvertOnRanks, "convert", _DESCRIPTION, arguments),
        use_underscores=True,
        # --transfer.calibrate False, as in longspan train.
        config=(tyro.conf.FlagConversionOff,),
    )
    parallel, num_ranks = options.parallel, options.parallel.sp or 1
    try:
        place = place_of_this_process()
        parallel.check()
        check_options(options, num_ranks)
        if place is None and num_ranks > 1:
            command = [sys.executable, "-m", "longspan", "convert", *arguments]
            return run_local_ranks(command, num_ranks, parallel.local_threads(num_ranks))
    except LongspanError as error:
        return refuse(error)

    def as_rank(place: Place, stop: StopRequest) -> int:
        ranks = parallel.start(place)
        ranks.agree({name: repr(value) for name, value in vars(options).items()})
        told = _Told(options.transfer.steps if ranks.is_first else 0)
        converted = convert_llama(options, told.step, ranks, parallel.order)
        if ranks.is_first:
            _report(converted)
        ranks.close()
        return EXIT_DONE

    return run_rank(place or Place(), as_rank)


@dataclass(frozen=True)
class _Told:
    """Who says how attention transfer goes, in a line for about every twentieth of `steps`; 0 says nothing."""

    steps: int

    def step(self, step: int, error: float) -> None:
        """After a step."""
        if self.steps and (step in (1, self.steps) or step % max(1, self.steps // 20) == 0):
            say(f"attention transfer, step {step} of {self.steps}: error {error:.4f}")


def _report(converted: ConvertedRun) -> None:
    folder = converted.run
    written = [folder.config, folder.weights, folder.tokenizer, folder.conversion_text, folder.conversion_json]
    lines = [*converted.report.summary(), *(f"  {path}" for path in written if path.is_file())]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()
