"""`conversion`: a small Llama trained on the spot, converted and trained for N steps, beside a model from scratch."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.harness import Table
from longspan.data.prepare import prepare_corpus
from longspan.data.recipe import Recipe
from longspan.launch import Place, StopRequest
from longspan.models.conversion.llama import llama_name
from longspan.train.config import Config, DataConfig, from_mapping
from longspan.train.config_checks import check
from longspan.train.conversion import convert_llama
from longspan.train.conversion_options import Convert, TransferData
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.trained import open_trained
from longspan.train.transfer import Transfer

VOCABULARY, SEQ_LEN, BATCH_TOKENS = 512, 256, 1024
MODEL: dict[str, Any] = {"dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 176}
SHAPE = "4 layers, width 64, 4 heads, 2 of keys and values, vocabulary 512, 4 sequences of 256 tokens a step"


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each part."""

    llama: int
    transfer: int
    after: int


def prepared(folder: Path, max_bytes: int) -> Path:
    """Text of Python's standard library, as tokens."""
    asked = DataConfig(max_bytes=max_bytes, vocab_size=VOCABULARY)
    prepare_corpus(Recipe.of(asked, 0), folder)
    return folder


def trained(data: Path, run: Path, steps: int, layers: Mapping[str, Any], seed: int, init: Path | None = None) -> float:
    """Train on one process; the loss on held-out text afterwards, nats a token. No steps: that of the weights it begins with."""
    values: dict[str, Any] = {
        "data": {"prepared": str(data)},
        "model": {**MODEL, **layers},
        "parallel": {"sp": 1, "device": "cpu"},
        "optim": {"lr": 3e-3 if steps else 1e-30, "warmup_steps": 10, "weight_decay": 0.0},
        "train": {"steps": max(1, steps), "seq_len": SEQ_LEN, "batch_tokens": BATCH_TOKENS, "seed": seed},
        "validation": {"every": 0, "sequences": 16},
        "checkpoint": {"every": 0},
        "sample": {"tokens": 0},
        "run": {"dir": str(run), "measure_alone": False, "print_every": 10**6},
    }
    if init is not None:
        values["train"]["init"] = str(init)
    config: Config = from_mapping(values)
    check(config)
    with contextlib.redirect_stdout(io.StringIO()):
        code = train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest())
    if code:
        raise SystemExit(f"a training in {run} ended with {code}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return float([record["validation_loss"] for record in records if "validation_loss" in record][-1])


def write_llama(run: Path, folder: Path) -> None:
    """The model of a run whose layers are softmax attention, in the form of a Llama of Transformers."""
    model = open_trained(run).model
    config = model.config
    folder.mkdir()
    weights = {llama_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.hidden_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": SEQ_LEN,
    }
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


def compare(data: Path, steps: Steps, operator: str, pattern: str, seed: int) -> dict[str, float]:
    """Losses on held-out text, nats a token; and of attention transfer the mean error of a layer before and after."""
    torch.set_num_threads(1)
    layers = {"pattern": [pattern], "operator": [operator]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"the Llama": trained(data, folder / "softmax", steps.llama, {"pattern": ["N"]}, seed)}
        write_llama(folder / "softmax", folder / "llama")
        for stage, transfer_steps in (("", 0), (" + transfer", steps.transfer)):
            begun = folder / f"begun-{transfer_steps}"
            options = Convert(
                str(folder / "llama"),
                str(begun),
                pattern=(pattern,),
                operator=(operator,),
                seed=seed,
                data=TransferData(prepared=str(data)),
                transfer=Transfer(transfer_steps, SEQ_LEN, BATCH_TOKENS),
            )
            report = convert_llama(options, lambda step, error: None).report
            for after in (0, steps.after):
                run = folder / f"run-{transfer_steps}-{after}"
                found[f"converted{stage}, {after} steps"] = trained(data, run, after, layers, seed, begun)
        assert report.transferred is not None
        found["error before"] = statistics.mean(report.transferred.before.values())
        found["error after"] = statistics.mean(report.transferred.after.values())
        found[f"from scratch, {steps.after} steps"] = trained(data, folder / "scratch", steps.after, layers, seed)
    return found


def conversion(quick: bool) -> Table:
    """Several mixers, three seeds."""
    steps = Steps(20, 5, 5) if quick else Steps(300, 60, 60)
    table = Table(
        "conversion",
        f"From a small Llama: {SHAPE}; the Llama trained for {steps.llama} steps, transfer {steps.transfer}, then {steps.after}",
        "converted and trained for N steps ahead of one from scratch trained for as many, three seeds",
        [
            *("mixer", "pattern", "the Llama", "converted", f"converted, {steps.after} steps", "transferred"),
            *(
                f"transferred, {steps.after} steps",
                f"from scratch, {steps.after} steps",
                "error of a layer, before and after",
            ),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(Path(folder) / "data", 100_000 if quick else 2_000_000)
        for operator, pattern in (("gla", "LLLN"), ("gated_deltanet", "LN")):
            by_seed = [compare(data, steps, operator, pattern, seed) for seed in ((0,) if quick else (0, 1, 2))]
            cells = {key: [found[key] for found in by_seed] for key in by_seed[0]}
            n = steps.after
            keys = [
                *("the Llama", "converted, 0 steps", f"converted, {n} steps", "converted + transfer, 0 steps"),
                *(f"converted + transfer, {n} steps", f"from scratch, {n} steps"),
            ]
            errors = " to ".join(_spread(cells[f"error {when}"]) for when in ("before", "after"))
            table.add(operator, pattern, *(_spread(cells[key]) for key in keys), errors)
    return table


def _spread(values: list[float]) -> str:
    """The mean, and the least and the most of seeds."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


TABLES = {"conversion": conversion}
