"""What the ``longspan eval`` commands have in common: the model of a run, on ranks, and what is given out of what was found."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from longspan.commands.inference import InferenceParallel, compute_dtype_of, for_ranks, is_beyond_training, say
from longspan.commands.options import parse_options, refuse
from longspan.errors import ConfigError, LongspanError
from longspan.launch import EXIT_DONE, Place, StopRequest, place_of_this_process, run_local_ranks, run_rank

if TYPE_CHECKING:
    from longspan.layout import Order
    from longspan.models import LinearLlama3
    from longspan.train.ranks import Ranks
    from longspan.train.step_batch import LayoutOf
    from longspan.train.trained import Trained

ENDING = """
Starts its own ranks on this machine (--parallel.sp 2), or uses those of torchrun: each sequence is split over all of them. The
table is on stdout, the rest on stderr.

Exit codes: 0 done, 1 failed, 2 refused (the message says how to mend it), 128 + n by a signal n.
"""
"""The end of every description."""

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class EvalOptions:
    """Which model, on which ranks, and where the results go."""

    run: str
    """The run folder."""
    checkpoint: str = "newest"
    """newest: the newest complete checkpoint, or else the weights file; weights: the weights file; the number of a step that has a
    checkpoint; or the path of a safetensors file."""
    data: str | None = None
    """The folder of prepared data whose tokenizer it is; None is where the run had it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What layers compute in; auto is what the run was trained in."""
    order: Literal["contiguous", "zigzag"] | None = None
    """Which tokens of a sequence a rank holds; None is as in the training."""
    json: str | None = None
    """Write the results to this file, too, as JSON."""
    plot: str | None = None
    """Draw the results: a .png, .svg or .pdf file."""
    parallel: InferenceParallel = field(default_factory=InferenceParallel)

    def check(self) -> None:
        """Raise ConfigError for options that do not fit, before any rank starts."""
        self.parallel.check()
        if self.plot is not None and Path(self.plot).suffix not in PICTURES:
            raise ConfigError(f"plot is {self.plot!r}; it must end in {', '.join(PICTURES)}")


Options = TypeVar("Options", bound=EvalOptions)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a trained model, given to this rank."""

    trained: Trained
    model: LinearLlama3
    ranks: Ranks
    order: Order
    dtype: str

    @property
    def layout_of(self) -> LayoutOf:
        from longspan.train.step_batch import layouts_over

        return layouts_over(self.ranks, self.order)

    def check_lengths(self, lengths: Sequence[int], name: str) -> None:
        """Raise ConfigError, on every rank, for a length that the ranks cannot share; warn of one that is beyond the training's."""
        for length in lengths:
            if length < self.ranks.sp:
                raise ConfigError(
                    f"{name} has {length}, fewer tokens than the {self.ranks.sp} ranks: each needs one. Take longer sequences, or "
                    "fewer ranks (parallel.sp)"
                )
        longest = max(lengths)
        if self.ranks.is_first and is_beyond_training(self.trained, longest):
            say(
                f"warning: {longest:,} tokens are more than the {self.trained.config.train.seq_len:,} of a sequence that softmax "
                "layers were trained for: what comes behind may be poor"
            )


@dataclass(frozen=True)
class Findings:
    """What an evaluation gives out: a table of text, values for JSON, and a function that draws them into a file."""

    table: str
    values: dict[str, Any]
    draw: Callable[[Path], None]


def run_evaluation(
    name: str,
    options_type: type[Options],
    description: str,
    arguments: Sequence[str],
    evaluate: Callable[[Options, Subject], Findings],
) -> int:
    """Evaluate as the arguments of ``longspan eval NAME`` ask, and return the exit code.

    evaluate: called on every rank; raises LongspanError on all of them.
    """
    options = parse_options(options_type, f"eval {name}", description + ENDING, arguments, use_underscores=True)
    try:
        place = place_of_this_process()
        options.check()
        num_ranks = options.parallel.sp or 1
        if place is None and num_ranks > 1:
            command = [sys.executable, "-m", "longspan", "eval", name, *arguments]
            return run_local_ranks(command, num_ranks, options.parallel.local_threads(num_ranks))
    except LongspanError as error:
        return refuse(error)

    def as_rank(place: Place, stop: StopRequest) -> int:
        subject = _open(options, place)
        found = evaluate(options, subject)
        subject.ranks.from_first(lambda: _give_out(name, options, subject, found))
        subject.ranks.close()
        return EXIT_DONE

    return run_rank(place or Place(), as_rank)


def _open(options: EvalOptions, place: Place) -> Subject:
    """As one rank: the model of the run."""
    from longspan.train.trained import open_trained

    ranks = options.parallel.start(place)
    ranks.agree({name: repr(value) for name, value in vars(options).items()})
    data = None if options.data is None else Path(options.data)
    trained = ranks.together(lambda: open_trained(Path(options.run), options.checkpoint, data))
    dtype = ranks.together(lambda: compute_dtype_of(options.dtype, trained.config, ranks.device))
    shown = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if ranks.is_first:
        say(f"{trained.source}, {shown}")
    order = options.order or trained.config.parallel.order
    return Subject(trained, for_ranks(trained, ranks, dtype), ranks, order, shown)


def _give_out(name: str, options: EvalOptions, subject: Subject, found: Findings) -> None:
    sys.stdout.write(found.table)
    sys.stdout.flush()
    about = {
        "evaluation": name,
        "run": options.run,
        "weights": subject.trained.source,
        "dtype": subject.dtype,
        "ranks": subject.ranks.world_size,
        "order": subject.order,
    }
    if options.json is not None:
        content = json.dumps(_finite(about | found.values), indent=1, ensure_ascii=False) + "\n"
        _written("json", Path(options.json), lambda path: path.write_text(content, encoding="utf-8"))
    if options.plot is not None:
        _written("plot", Path(options.plot), found.draw)


def _written(option: str, path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise ConfigError(f"{option} {str(path)!r} could not be written: {error}. Give another file") from error


def _finite(value: Any) -> Any:
    """None, which JSON has, for numbers that are not finite, wherever they are."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_counts(name: str, counts: Sequence[int], least: int = 1) -> None:
    """Raise ConfigError unless there are numbers, none below `least`."""
    if not counts:
        raise ConfigError(f"{name} is empty; give at least one number")
    for count in counts:
        if count < least:
            raise ConfigError(f"{name} has {count}; each must be at least {least}")
