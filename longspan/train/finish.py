"""The end of a run: weights, plot, sample, summary."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import Any

import torch
from torch import Tensor

from longspan.errors import CheckpointError, NonFiniteError
from longspan.models import Sampling, generate
from longspan.train.alone import gain_lines, measure_alone
from longspan.train.metrics import plot_losses
from longspan.train.run_folder import replacing
from longspan.train.sample import WrittenText, printable, prompt_tokens
from longspan.train.trainer import Trainer
from longspan.train.weights_file import write_weights

_BASELINES = {
    "unigram": "predicting each token by its frequency",
    "chance": "naming one of the sequence's values at random",
}


def finish(trainer: Trainer, started: float) -> None:
    """Write what the run leaves, and print its results.

    Args:
        started: `time.perf_counter` at the run's start.
    """
    if trainer.validation is None:
        trainer.validate()
    trainer.phase.name = "writing the results"
    weights = trainer.whole_weights()
    if not trainer.ranks.is_first:
        return
    folder = trainer.folder
    write_weights(folder.weights, weights, trainer.model.config)
    _plot(trainer)
    text = _sample(trainer, weights)
    trainer.phase.name = "measuring one process"
    alone = measure_alone(trainer)
    summary = _summary(trainer, time.perf_counter() - started)
    if alone is not None:
        summary |= {"memory_bytes_alone": alone.memory_bytes, "tokens_per_second_alone": alone.tokens_per_second}
    with replacing(folder.summary_json) as unfinished:
        unfinished.write_text(json.dumps(summary | {"sample": text}, indent=1) + "\n", encoding="utf-8")
    with replacing(folder.summary_text) as unfinished:
        unfinished.write_text(_as_markdown(trainer, summary, text), encoding="utf-8")
    _print(trainer, summary, text)
    if alone is not None:
        for name, line in zip(("memory", "tokens/s"), gain_lines(trainer, alone), strict=True):
            trainer.report.heading(name, line)


def _plot(trainer: Trainer) -> None:
    try:
        records = trainer.metrics.read()
    except CheckpointError as error:
        # The training is done, and nothing else comes from that file.
        trainer.report.line(f"{trainer.folder.plot.name} is not drawn: {error}")
        return
    with replacing(trainer.folder.plot) as unfinished:
        plot_losses(records, trainer.data.baseline.nats_per_token, trainer.data.baseline_name, unfinished)


def _sample(trainer: Trainer, weights: dict[str, Tensor]) -> str:
    sample, tokenizer = trainer.config.sample, trainer.data.tokenizer
    if not sample.tokens or tokenizer is None:
        return ""
    prompt = prompt_tokens(tokenizer, sample.prompt, trainer.config.data.documents)
    tokens = generate(
        trainer.model_for_one_process(weights),
        torch.tensor(prompt, device=trainer.ranks.device),
        sampling=Sampling(sample.temperature, seed=trainer.config.train.seed),
        max_new_tokens=sample.tokens,
    )
    pieces: list[str] = []
    # A model that has diverged leaves a shorter text.
    with contextlib.suppress(NonFiniteError):
        for piece in WrittenText(tokenizer, prompt, tokens):
            pieces.append(piece)
    return "".join(pieces)


def _summary(trainer: Trainer, seconds: float) -> dict[str, Any]:
    assert trainer.validation is not None
    totals, data = trainer.totals, trainer.data
    return {
        "steps": trainer.step,
        "tokens": trainer.step * trainer.config.train.batch_tokens,
        "ranks": trainer.ranks.degrees.summary(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "training_loss": totals.last_loss,
        **{f"validation_{name}": _finite(value) for name, value in trainer.validation.numbers.items()},
        **{f"{data.baseline_name}_{name}": _finite(value) for name, value in data.baseline.numbers.items()},
        "tokens_per_second": totals.tokens_per_second,
        "wait_share": totals.wait_share,
        "data_wait_share": totals.data_wait_share,
        "memory_bytes": totals.memory_bytes,
        "seconds_in_steps": totals.seconds,
        "seconds_of_this_process": seconds,
        "tokens_by_document_length": totals.by_document_length,
        **({"balance": trainer.balance.as_json()} if any(trainer.balance.groups) else {}),
        **({"rank_order": trainer.rank_order.as_json()} if any(trainer.rank_order.groups) else {}),
    }


def _finite(value: float) -> float | None:
    """None, which JSON has, for what is not finite."""
    return value if math.isfinite(value) else None


def _as_markdown(trainer: Trainer, summary: dict[str, Any], text: str) -> str:
    numbers = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    rows = "\n".join(f"| {key.replace('_', ' ')} | {_with_separators(value)} |" for key, value in numbers.items())
    lengths = "\n".join(f"| {key} | {value:,} |" for key, value in summary["tokens_by_document_length"].items())
    sample = f"\n## Sample\n\n~~~~\n{trainer.config.sample.prompt}{text}\n~~~~\n" if text else ""
    return (
        f"# {trainer.folder.path.name}\n\n| | |\n|---|---|\n{rows}\n\n"
        f"| tokens of the document | tokens seen |\n|---|---|\n{lengths}\n\n![Loss](loss.png)\n{sample}"
    )


def _with_separators(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _print(trainer: Trainer, summary: dict[str, Any], text: str) -> None:
    report = trainer.report
    if text:
        shown = printable(trainer.config.sample.prompt + text)
        report.line(f"\nA sample, from {trainer.config.sample.prompt!r}:\n\n{shown}\n")
    report.heading("validation", str(trainer.validation))
    report.heading(trainer.data.baseline_name, f"{trainer.data.baseline} ({_BASELINES[trainer.data.baseline_name]})")
    report.heading(
        "speed",
        f"{trainer.totals.tokens:,} tokens in {summary['seconds_in_steps']:.0f} s: "
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['wait_share']:.1%} of the time waiting for other "
        f"ranks; {summary['memory_bytes'] / 2**30:.2f} GiB per rank at most",
    )
    folder = trainer.folder
    report.heading(
        "written", f"{folder.path}/: {folder.weights.name}, {folder.plot.name}, {folder.summary_text.name}, ..."
    )
