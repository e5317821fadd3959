"""``longspan generate``: text that the model of a run writes behind a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longspan.commands.inference import InferenceParallel, compute_dtype_of, for_ranks, is_beyond_training, say
from longspan.commands.options import parse_options, refuse
from longspan.errors import ConfigError, LongspanError
from longspan.launch import (
    EXIT_DONE,
    Place,
    StopRequest,
    place_of_this_process,
    run_local_ranks,
    run_rank,
)

if TYPE_CHECKING:
    from longspan.models import Sampling
    from longspan.train.sample import WrittenText
    from longspan.train.trained import Trained

_DESCRIPTION = """Write text behind a prompt, by the model of a run.

  longspan generate --run runs/my-run --prompt "def main("
  longspan generate --run runs/my-run --prompt_file book.txt --parallel.sp 2 --temperature 0.8 --top_p 0.95
  cat book.txt | longspan generate --run runs/my-run > more.txt

The prompt is read over ranks, and the first of them writes: linear layers carry a state of constant size. Starts its own ranks on
this machine, or uses those of torchrun. The text alone is on stdout, as it comes; the rest is on stderr. It ends where the model
ends a document.

Exit codes: 0 done, 1 failed, 2 refused (the message says how to mend it), 128 + n by a signal n.
"""


@dataclass(frozen=True)
class Generate:
    """Which model, behind which prompt, and how tokens are chosen."""

    run: str
    """The run folder."""
    prompt: str | None = None
    """The prompt. Without it, and without a file, it is read from stdin."""
    prompt_file: str | None = None
    """A file with the prompt, in UTF-8, taken as it is; - is stdin."""
    checkpoint: str = "newest"
    """newest: the newest complete checkpoint, or else the weights file; weights: the weights file; the number of a step that has a
    checkpoint; or the path of a safetensors file."""
    data: str | None = None
    """The folder of prepared data whose tokenizer it is; None is where the run had it."""
    segment_tokens: int | None = None
    """Read the prompt in segments of so many tokens, to hold the activations of one at a time; None reads it at once."""
    max_new_tokens: int = 200
    """End after this many tokens."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Choose among this many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that have this probability together; 1 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there before are less likely; 1 changes nothing."""
    seed: int = 0
    """Of the random choices."""
    stop: tuple[str, ...] = ()
    """End before one of these strings, which is not printed."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What layers compute in; auto is what the run was trained in."""
    parallel: InferenceParallel = field(default_factory=InferenceParallel)


def run(arguments: Sequence[str]) -> int:
    """Generate as the arguments ask, and return the exit code."""
    options = parse_options(Generate, "generate", _DESCRIPTION, arguments, use_underscores=True)
    try:
        place = place_of_this_process()
        _check(options)
        num_ranks = options.parallel.sp or 1
        if place is None and num_ranks > 1:
            threads = options.parallel.local_threads(num_ranks)
            with _prompt_for_ranks(options) as more:
                return run_local_ranks(
                    [sys.executable, "-m", "longspan", "generate", *arguments, *more], num_ranks, threads
                )
    except LongspanError as error:
        return refuse(error)

    def as_rank(place: Place, stop: StopRequest) -> int:
        return _generate(options, place)

    return run_rank(place or Place(), as_rank)


def _check(options: Generate) -> None:
    """Raise LongspanError for options that do not fit, before any rank starts."""
    if options.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {options.max_new_tokens}; it must be at least 1")
    options.parallel.check()
    least = options.parallel.sp or 1
    if options.segment_tokens is not None and options.segment_tokens < least:
        raise ConfigError(
            f"segment_tokens is {options.segment_tokens}; it must be at least {least}, a token for each rank. A few thousand keep "
            "a device busy"
        )
    if options.prompt is not None and options.prompt_file is not None:
        raise ConfigError("prompt and prompt_file exclude each other: a text has one beginning. Leave one out")
    if "" in options.stop:
        raise ConfigError("stop has an empty string, which stands everywhere. Leave it out")
    _sampling(options)


def _sampling(options: Generate) -> Sampling:
    from longspan.models import Sampling

    names = [entry.name for entry in dataclasses.fields(Sampling)]
    return Sampling(**{name: getattr(options, name) for name in names})


@contextlib.contextmanager
def _prompt_for_ranks(options: Generate) -> Iterator[list[str]]:
    """What local ranks are told of a prompt on stdin, which is this command's: it is in a file inside this context."""
    if options.prompt is not None or options.prompt_file not in (None, "-"):
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="longspan-") as folder:
        path = Path(folder) / "prompt.txt"
        path.write_bytes(_read_stdin())
        # The last one counts.
        yield ["--prompt_file", str(path)]


def _read_prompt(options: Generate) -> str:
    """The prompt, on the rank that is asked for it.

    Raises:
        ConfigError: for one that cannot be read, is not UTF-8, or is empty.
    """
    source = "prompt"
    try:
        if options.prompt is not None:
            # What the system could not decode of an argument is no text.
            text = options.prompt.encode().decode()
        elif options.prompt_file in (None, "-"):
            source = "stdin"
            text = _read_stdin().decode()
        else:
            source = str(options.prompt_file)
            text = Path(source).read_bytes().decode()
    except UnicodeError as error:
        raise ConfigError(f"the prompt ({source}) is not UTF-8: {error}. Give text in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"the prompt cannot be read from {source}: {error}. Give a file of text") from error
    if not text:
        raise ConfigError(f"the prompt ({source}) is empty: there is nothing to go on from. Give some text")
    return text


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("no prompt is given. Give --prompt TEXT, --prompt_file FILE, or text on stdin")
    return sys.stdin.buffer.read()


def _generate(options: Generate, place: Place) -> int:
    """As one rank: read the prompt together, and write on the first."""
    import torch

    from longspan.models import decode, prefill
    from longspan.train.memory import Releases
    from longspan.train.sample import WrittenText, prompt_tokens
    from longspan.train.trained import open_trained

    ranks = options.parallel.start(place)
    told = {entry.name: repr(getattr(options, entry.name)) for entry in dataclasses.fields(options)}
    # Under torchrun each rank may have a stdin of its own.
    ranks.agree(told)
    text = ranks.from_first(lambda: _read_prompt(options))
    data = None if options.data is None else Path(options.data)
    trained = ranks.together(lambda: open_trained(Path(options.run), options.checkpoint, data))
    dtype = ranks.together(lambda: compute_dtype_of(options.dtype, trained.config, ranks.device))
    model = for_ranks(trained, ranks, dtype)
    given = prompt_tokens(trained.tokenizer, text, trained.config.data.documents)
    if ranks.is_first:
        say(f"{trained.source}, {dtype or torch.float32}".replace("torch.", ""))
        _warn_of_length(trained, len(given), options.max_new_tokens)
    tokens = torch.tensor(given, device=ranks.device)
    begun = time.perf_counter()
    memory = prefill(
        model,
        tokens,
        order=trained.config.parallel.order,
        segment_tokens=options.segment_tokens,
        between=Releases(),
    )
    read = time.perf_counter()
    # The others have done their part, however long the text becomes.
    ranks.close()
    if not ranks.is_first:
        return EXIT_DONE
    written = WrittenText(
        trained.tokenizer,
        given,
        decode(
            model,
            tokens,
            memory,
            sampling=_sampling(options),
            max_new_tokens=options.max_new_tokens,
            end=trained.tokenizer.end_of_document,
        ),
        options.stop,
    )
    try:
        _print(written)
    except BrokenPipeError:
        # Who reads has enough, such as head. Nothing must try to write there as this process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    seconds = time.perf_counter() - read
    on = f"on {ranks.world_size} ranks" if ranks.world_size > 1 else "on 1 process"
    say(
        f"prompt of {len(given):,} tokens read in {read - begun:.2f} s {on}; {written.num_tokens:,} tokens written in "
        f"{seconds:.2f} s, "
        f"{written.num_tokens / seconds:,.1f} a second; ended {_why(written, options)}"
    )
    return EXIT_DONE


def _why(written: WrittenText, options: Generate) -> str:
    if written.stopped_by is not None:
        return f"before the stop string {written.stopped_by!r}"
    if written.num_tokens == options.max_new_tokens:
        return f"after max_new_tokens {options.max_new_tokens}"
    return "where the model ended the document"


def _warn_of_length(trained: Trained, num_prompt: int, num_new: int) -> None:
    if is_beyond_training(trained, num_prompt + num_new):
        say(
            f"warning: {num_prompt:,} tokens of the prompt and up to {num_new:,} new ones are more than the "
            f"{trained.config.train.seq_len:,} tokens of a sequence that softmax layers were trained for: what comes behind may be "
            "poor"
        )


def _print(written: WrittenText) -> None:
    from longspan.train.sample import printable

    is_terminal = sys.stdout.isatty()
    for piece in written:
        sys.stdout.write(printable(piece) if is_terminal else piece)
        sys.stdout.flush()
    if is_terminal:
        sys.stdout.write("\n")
        sys.stdout.flush()
