"""``longspan verify``: are files what was written, and does a config compute over ranks what one process computes?"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from longspan.commands.options import parse_options, refuse
from longspan.errors import CheckpointError, ConfigError, LongspanError
from longspan.launch import (
    EXIT_DONE,
    EXIT_REFUSED,
    Place,
    StopRequest,
    end_with_first_rank,
    num_cores,
    place_of_this_process,
    run_local_ranks,
    run_rank,
)

if TYPE_CHECKING:
    from longspan.train.config import Config
    from longspan.train.ranks import Ranks
    from longspan.train.selfcheck import SelfCheck

_DESCRIPTION = """Verify checkpoints, prepared data, or that a config computes over ranks what one process computes.

  longspan verify runs/my-run                     every byte of its checkpoints, and of data prepared in it, against their digests
  longspan verify runs/my-run/checkpoints/step-00000100
  longspan verify data/                           every byte that longspan prepare has written there
  longspan verify --config my.toml                one batch's loss and gradients on the config's ranks and on one process

Exit codes: 0 all is as it should be, 2 something is not, or cannot be read.
"""


@dataclass(frozen=True)
class Verify:
    """What to verify: files, a config, or both."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders, checkpoints, or folders of prepared data."""
    config: str | None = None
    """A TOML file as longspan train takes it; an empty file is the defaults."""


def run(arguments: Sequence[str]) -> int:
    """Verify what the arguments ask for, and return the exit code."""
    options = parse_options(Verify, "verify", _DESCRIPTION, arguments)
    try:
        place = place_of_this_process()
        if not options.paths and options.config is None:
            raise ConfigError(
                "verify takes run folders, checkpoints and folders of prepared data, or --config FILE.toml; got none"
            )
        code = EXIT_DONE
        for line, code_of_line in itertools.chain.from_iterable(_verify_files(Path(path)) for path in options.paths):
            code = max(code, code_of_line)
            if place is None or place.rank == 0:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
        if options.config is None:
            if code != EXIT_DONE:
                end_with_first_rank(place or Place())
            return code
        config = _read_config(options.config)
        return max(code, _on_ranks(config, place, ["verify", "--config", options.config]))
    except LongspanError as error:
        return refuse(error)


def _verify_files(path: Path) -> Iterator[tuple[str, int]]:
    """Lines about what there is in a folder, each with its exit code."""
    from longspan.data.prepared import is_prepared
    from longspan.train.run_folder import RunFolder

    if is_prepared(path):
        yield from _verify_data(path)
        return
    yield from _verify_checkpoints(checkpoints_in(path))
    if is_prepared(RunFolder(path).data):
        yield from _verify_data(RunFolder(path).data)


def _verify_data(folder: Path) -> Iterator[tuple[str, int]]:
    from longspan.data.prepared import MANIFEST
    from longspan.data.verify import verify_prepared

    found = verify_prepared(folder)
    whole = f"{found.num_files} files, {found.num_bytes / 2**20:,.1f} MiB"
    if not found.faults:
        yield f"ok       {folder}: {whole}, every byte as written", EXIT_DONE
        return
    for fault in found.faults:
        yield f"DAMAGED  {fault}", EXIT_REFUSED
    damaged = f"{len(found.faults)} file{'s' * (len(found.faults) > 1)}"
    yield (
        f"DAMAGED  {folder}: {damaged}; {whole} as written. To mend it, remove {folder / MANIFEST} and run the longspan prepare "
        "that made it again: shards that are whole are kept",
        EXIT_REFUSED,
    )


def checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints of a run folder, or the one that `path` is.

    Raises:
        ConfigError: if there is none.
    """
    from longspan.train.checkpoint import MANIFEST, all_checkpoints

    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        return [path]
    for folder in (path / "checkpoints", path):
        # Also one that lacks a file: it had all of them once.
        if found := all_checkpoints(folder):
            return found
    raise ConfigError(
        f"{str(path)!r} has no complete checkpoint, and no prepared data. Give a run folder, a checkpoint in it, or a folder that "
        "longspan prepare has written"
    )


def _verify_checkpoints(paths: list[Path]) -> Iterator[tuple[str, int]]:
    from longspan.train.checkpoint import verify_checkpoint
    from longspan.train.loading import open_checkpoint

    for path in paths:
        try:
            files = verify_checkpoint(path)
            # Do the files of all ranks make up each tensor?
            open_checkpoint(path)
        except CheckpointError as error:
            yield f"DAMAGED  {path}: {error}", EXIT_REFUSED
        else:
            num_bytes = sum(file.stat().st_size for file in files)
            yield f"ok       {path}: {len(files)} files, {num_bytes / 2**20:,.1f} MiB, every byte as written", EXIT_DONE


def _read_config(file: str) -> Config:
    from longspan.train.config import read_toml
    from longspan.train.config_checks import check

    config = read_toml(Path(file))
    check(config)
    if not config.train.check_tokens:
        raise ConfigError(
            f"{file}: train.check_tokens is 0, the tokens to compare with one process. Give as many as one process can hold, such "
            "as 8192, or leave it out for 65536"
        )
    return config


def _on_ranks(config: Config, place: Place | None, command: list[str]) -> int:
    from longspan.train.config_checks import num_ranks_asked_for

    if place is None and (num_ranks := num_ranks_asked_for(config)) > 1:
        threads = config.parallel.threads or max(1, num_cores() // num_ranks)
        return run_local_ranks([sys.executable, "-m", "longspan", *command], num_ranks, threads)

    def as_rank(place: Place, stop: StopRequest) -> int:
        import torch

        from longspan.train.ranks import Ranks
        from longspan.train.verify import verify_config

        torch.set_num_threads(config.parallel.threads or max(1, num_cores() // place.local_world_size))
        ranks = Ranks.start(place, config.parallel.device, config.parallel.timeout_seconds)
        found = verify_config(config, ranks)
        if ranks.is_first:
            sys.stdout.write(_report(found, ranks, in_segments=config.train.segment_tokens is not None))
            sys.stdout.flush()
        ranks.close()
        return EXIT_DONE if found.agrees else EXIT_REFUSED

    return run_rank(place or Place(), as_rank)


def _report(found: SelfCheck, ranks: Ranks, in_segments: bool) -> str:
    loss, norm, gradients = found.differences
    degrees, how = ranks.degrees, " in segments of time" * in_segments
    return (
        f"{'ok      ' if found.agrees else 'DIFFERS '} {ranks.world_size} ranks (dp_replicate {degrees.dp_replicate} x dp_shard "
        f"{degrees.dp_shard} x sp {degrees.sp}){how} against one process, {found.num_tokens:,} tokens:\n"
        f"         loss          {found.loss:.7f} and {found.loss_alone:.7f}, relative difference {loss:.1e}\n"
        f"         gradient norm {found.norm:.7f} and {found.norm_alone:.7f}, {norm:.1e}\n"
        f"         gradients     {gradients:.1e}, most in {found.worst}\n"
    )
