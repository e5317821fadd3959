"""The main job, from the first line it prints to the last."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import secrets
import time
from pathlib import Path

import torch

import longspan
from longspan.errors import CheckpointError
from longspan.launch import EXIT_DONE, EXIT_STOPPED, Place, StopRequest, num_cores
from longspan.train import balance, order
from longspan.train import config as configs
from longspan.train.checkpoint import (
    all_checkpoints,
    complete_checkpoints,
    newest_checkpoint,
    remove_leftovers,
    set_aside_newer,
    verify_checkpoint,
)
from longspan.train.config import Config
from longspan.train.config_checks import check_degrees
from longspan.train.data import RunData, open_data
from longspan.train.deterministic import deterministic_algorithms
from longspan.train.finish import finish
from longspan.train.init import start_from
from longspan.train.loading import SavedCheckpoint, open_checkpoint
from longspan.train.model import check_device, checked_dtype, compute_dtype
from longspan.train.phase import RunPhase
from longspan.train.ranks import Ranks
from longspan.train.rate import find_peak
from longspan.train.report import Report
from longspan.train.run_folder import RunFolder, claimed, create_run_folder, replacing
from longspan.train.selfcheck import SelfCheck
from longspan.train.trainer import Trainer
from longspan.train.watch import Watch


def train(config: Config, place: Place, stop: StopRequest, resume: RunFolder | None = None) -> int:
    """Run the main job as one rank and return the exit code.

    Args:
        config: checked already by `longspan.train.config_checks.check`.
        place: this rank.
        stop: asked for after every step.
        resume: the run to go on with; None starts a new one.

    Raises:
        LongspanError: for what the user can mend, on every rank.
    """
    phase = RunPhase()
    watch = Watch(place, phase, config.parallel.timeout_seconds)
    with watch.watching(), phase.noted(place):
        # With another number of threads sums are in another order.
        threads = 1 if config.train.deterministic else max(1, num_cores() // place.local_world_size)
        torch.set_num_threads(config.parallel.threads or threads)
        phase.name = "meeting the other ranks"
        ranks = Ranks.start(place, config.parallel.device, config.parallel.timeout_seconds)
        watch.meet(ranks.from_first(lambda: secrets.token_hex(8)))
        code = train_on(ranks, config, stop, resume, phase)
        phase.name = "ending"
        ranks.close()
        return code


def train_on(
    ranks: Ranks, config: Config, stop: StopRequest, resume: RunFolder | None = None, phase: RunPhase | None = None
) -> int:
    """`train` on ranks that have met."""
    with deterministic_algorithms(config.train.deterministic, ranks.device), contextlib.ExitStack() as claims:
        return _train_on(ranks, config, stop, resume, phase or RunPhase(), claims)


def _train_on(
    ranks: Ranks,
    config: Config,
    stop: StopRequest,
    resume: RunFolder | None,
    phase: RunPhase,
    claims: contextlib.ExitStack,
) -> int:
    start = time.perf_counter()
    torch.manual_seed(config.train.seed)
    ranks.agree(_facts(config, resume))
    ranks.together(lambda: check_device(config, ranks.device))
    ranks.arrange(check_degrees(config, ranks.world_size))
    report = Report(config.train.steps, config.run.print_every, silent=not ranks.is_first)
    report.heading("longspan", _describe_ranks(ranks, config))
    if ranks.degrees.data > 1 or ranks.degrees.shards_weights:
        # With sequence parallelism alone every rank does the same.
        report.heading("mesh", "; ".join(ranks.degrees.describe().splitlines()[1:]))

    phase.name = "opening the run folder"
    folder, saved = _open_run(config, resume, ranks, report, claims)
    report.heading("run", f"{folder.path}" + (f", going on from step {saved.step}" if saved else ""))

    phase.name = "preparing the data"
    data = open_data(config, folder, ranks)
    phase.name = "building the model"
    trainer = ranks.together(lambda: _build_trainer(config, ranks, folder, data, report, phase, saved))
    if ranks.is_first:
        report.heading("data", data.describe())
    report.heading("model", _describe_model(trainer))
    phase.name = "measuring the device"
    report.heading("device", _find_peak(trainer))
    if order.measures_links(config, ranks) and not trainer.has_saved_order:
        trainer.measure_order()
    if config.parallel.rank_order != ("given",) and ranks.sp > 1:
        report.heading("order", order.describe(trainer.rank_order, ranks, trainer.has_saved_order))
    if balance.measures_speed(config, ranks) and not trainer.has_saved_balance:
        trainer.measure_balance()
    if config.parallel.balance != ("even",) and ranks.sp > 1:
        report.heading("balance", balance.describe(trainer.balance, ranks, trainer.has_saved_balance))

    if ranks.world_size > 1 or trainer.segments is not None:
        if config.train.check_tokens:
            phase.name = "checking the first batch"
            check = trainer.check(threads_alone=num_cores())
            report.heading("check", _describe_check(check, ranks.world_size, config))
            check.raise_unless_agrees()
        else:
            report.heading("check", "none, as train.check_tokens is 0: nothing was compared with one process")
        # Else what the run takes is not known before its first step.
        if trainer.checks_itself if config.train.check_tokens else trainer.has_saved_figures:
            trainer.say_exchange()

    traced = config.run.trace_step
    if traced is not None and traced > trainer.step:
        report.heading("trace", f"of step {traced}: {folder.traces}, one file per rank")
    ranks.from_first(lambda: _write_start(trainer))
    try:
        stopped = trainer.run(stop)
        if not stopped:
            finish(trainer, start)
    except Exception:
        trainer.metrics.close(failed=True)
        raise
    phase.name = "ending"
    trainer.metrics.close()
    if stopped:
        report.line(f"Stopped after step {trainer.step}, with a checkpoint: longspan train --resume {folder.path}")
    return EXIT_STOPPED if stopped else EXIT_DONE


def _facts(config: Config, resume: RunFolder | None) -> dict[str, str]:
    """What must be the same on every rank, as text."""
    facts = {key: repr(value) for key, value in configs.flatten(config).items()}
    versions = {"longspan": longspan.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return facts | versions | {"--resume": str(resume.path) if resume else "not given"}


def _open_run(
    config: Config, resume: RunFolder | None, ranks: Ranks, report: Report, claims: contextlib.ExitStack
) -> tuple[RunFolder, SavedCheckpoint | None]:
    """A new run's folder, or that of a run to go on with and its newest checkpoint; claims: where rank 0 enters its claim on it."""
    # Rank 0 looks, before any rank writes: all of them take the same way.
    wanted, goes_on = ranks.from_first(lambda: _claimed_folder(config, resume, claims))
    folder = RunFolder(Path(wanted))
    if not goes_on:
        return folder, None
    path = _choose_checkpoint(folder, config, ranks, report)
    return folder, ranks.together(lambda: _fitting_checkpoint(path, folder, config))


def _claimed_folder(config: Config, resume: RunFolder | None, claims: contextlib.ExitStack) -> tuple[str, bool]:
    """The folder of a run, made if it is not there and claimed by this process, and whether the run goes on from a checkpoint."""
    goes_on = resume is None and config.run.go_on
    folder = resume or create_run_folder(config.run.dir, or_begun=goes_on)
    claims.enter_context(claimed(folder.path))
    return str(folder.path), resume is not None or (goes_on and bool(complete_checkpoints(folder.checkpoints)))


def _choose_checkpoint(folder: RunFolder, config: Config, ranks: Ranks, report: Report) -> Path:
    """The newest checkpoint, or with `checkpoint.allow_older` the newest that is whole; rank 0 looks for all."""
    if not config.checkpoint.allow_older:
        return Path(ranks.from_first(lambda: str(newest_checkpoint(folder.checkpoints))))
    failure: CheckpointError | None = None
    for name in reversed(ranks.from_first(lambda: [path.name for path in all_checkpoints(folder.checkpoints)])):
        path = folder.checkpoints / name
        try:
            ranks.together(lambda path=path: verify_checkpoint(path, ranks.rank, ranks.world_size))  # type: ignore[misc]
        except CheckpointError as error:
            report.heading("damaged", str(error))
            failure = failure or error
            continue
        if failure is not None:
            report.heading("older", f"going on from {name}, which is whole, as checkpoint.allow_older says")
        return path
    raise failure or CheckpointError(f"there is no checkpoint in {folder.checkpoints}. Start a new run")


def _fitting_checkpoint(path: Path, folder: RunFolder, config: Config) -> SavedCheckpoint:
    saved = open_checkpoint(path)
    before = saved.config(folder.path, or_else=", or start a new run")
    changes = configs.changes_what_is_trained(before, config)
    if changes:
        raise CheckpointError(
            f"{folder.path} was trained with another config, and cannot go on with this one:\n"
            + "\n".join(f"  {line}" for line in changes)
            + "\nLeave these keys out to resume, or start a new run"
        )
    return saved


def _build_trainer(
    config: Config,
    ranks: Ranks,
    folder: RunFolder,
    data: RunData,
    report: Report,
    phase: RunPhase,
    saved: SavedCheckpoint | None,
) -> Trainer:
    trainer = Trainer(config, ranks, folder, data, report, phase)
    if saved is not None:
        trainer.restore(saved)
    elif config.train.init is not None:
        report.heading("weights", f"at first {start_from(trainer.model, Path(config.train.init), data.tokenizer)}")
    return trainer


def _write_start(trainer: Trainer) -> None:
    """Only now, when nothing can refuse to run any more, change what an earlier part of the run has left."""
    remove_leftovers(trainer.folder.checkpoints)
    if trainer.config.checkpoint.allow_older:
        set_aside_newer(trainer.folder.checkpoints, trainer.step)
    # A run that is at its end already has nothing left to do but that.
    trainer.metrics.cut_after(trainer.step, validates_again=trainer.step == trainer.config.train.steps)
    # Without its folder, the config is that of another run as well; what is asked for once is not asked for again.
    config = dataclasses.replace(
        trainer.config,
        run=dataclasses.replace(trainer.config.run, dir=None, go_on=False),
        checkpoint=dataclasses.replace(trainer.config.checkpoint, allow_older=False),
    )
    with replacing(trainer.folder.config) as unfinished:
        unfinished.write_text(configs.to_toml(config), encoding="utf-8")


def _describe_ranks(ranks: Ranks, config: Config) -> str:
    version = f"{longspan.__version__}, torch {torch.__version__}"
    if ranks.world_size == 1:
        return f"{version}; 1 process on {ranks.device.type}, {torch.get_num_threads()} threads"
    return (
        f"{version}; {ranks.world_size} ranks on {ranks.device.type}: {ranks.degrees.summary()} "
        f"({config.parallel.order}), {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} each"
    )


def _describe_model(trainer: Trainer) -> str:
    model, train = trainer.model.config, trainer.config.train
    layers = "".join(model.layer_kinds)
    linear = ", ".join(dict.fromkeys(name for name in model.layer_operators if name != "softmax"))
    active = f" ({trainer.model.num_active_parameters() / 1e6:.1f} M active)" if model.num_experts else ""
    return (
        f"{trainer.model.num_parameters() / 1e6:.1f} M parameters{active}, width {model.dim}, layers {layers} "
        f"(L {linear or 'none'}, N softmax attention); {train.steps} steps of {trainer.config.batch_sequences} x "
        f"{train.seq_len:,} tokens"
    )


def _find_peak(trainer: Trainer) -> str:
    """Tell the trainer what all devices reach together; a line that says what each of them does."""
    config, ranks = trainer.config, trainer.ranks
    peak = find_peak(ranks.device, compute_dtype(config) or torch.float32)
    peaks = ranks.gather_numbers([peak.flops or 0.0])
    trainer.peak_flops = float(peaks.sum()) if bool((peaks > 0).all()) else None
    operations = trainer.model.flops_per_token(config.train.seq_len) * config.train.batch_tokens
    return f"{operations / 1e9:,.0f} GFLOP a step; a rank: {peak}"


def _describe_check(check: SelfCheck, world_size: int, config: Config) -> str:
    loss, norm, gradients = check.differences
    checked = str(checked_dtype(config)).removeprefix("torch.")
    in_dtype = "" if checked == config.train.dtype else f", in {checked},"
    sides = f"on {world_size} ranks | on one"
    if config.train.segment_tokens is not None:
        sides = "in segments | in one piece" if world_size == 1 else f"in segments on {world_size} ranks | whole on one"
    return (
        f"first batch{in_dtype} {sides}: loss {check.loss:.6f} | {check.loss_alone:.6f} ({loss:.0e}), "
        f"gradient norm {check.norm:.6f} | {check.norm_alone:.6f} ({norm:.0e}), gradients differ by {gradients:.0e}: "
        + ("equal" if check.agrees else "NOT EQUAL")
    )
