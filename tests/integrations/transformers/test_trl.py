"""TRL's SFTTrainer on ranks that share sequences logs what it logs in one process: losses, norms, entropy, accuracy, counts."""

from __future__ import annotations

import contextlib
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import VOCABULARY, build
from tests.integrations.transformers.reference import Wide
from tests.integrations.transformers.training import environment
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
"""TRL's head computes log-probabilities and entropy in float32."""

MODES: dict[str, dict[str, Any]] = {
    "padded on the right": {"max_length": 48},
    "packed": {"packing": True, "packing_strategy": "bfd", "max_length": 64, "per_device_train_batch_size": 1},
    "packed, several rows": {
        "packing": True,
        "packing_strategy": "bfd",
        "max_length": 64,
        "per_device_train_batch_size": 2,
    },
    "padding_free": {"padding_free": True, "max_length": None},
    "adapters": {"max_length": 48},
    "balance loss": {"max_length": 48, "router_aux_loss_coef": 0.1},
    "balance loss, accumulated": {"max_length": 48, "router_aux_loss_coef": 0.1, "gradient_accumulation_steps": 2},
}
LOGGED = (
    *("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"),
    *("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_aux_loss"),
)


MORE_LOGGED = {
    "padded on the right": {"entropy", "mean_token_accuracy", "num_tokens", "eval_entropy", "eval_mean_token_accuracy"},
    "balance loss": {"aux_loss", "eval_aux_loss"},
}


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fine_tune(family: str, mode: str, folder: str, cp_size: int) -> dict[str, list[float]]:
    """What SFTTrainer logs; 0 is without longspan."""
    with environment(), Wide(), contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return _fine_tune(family, mode, folder, cp_size)


def _fine_tune(family: str, mode: str, folder: str, cp_size: int) -> dict[str, list[float]]:
    import peft
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from longspan.integrations.transformers import SequenceParallelConfig, prepare_trainer

    disable_progress_bars()
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(9, 40, (29,), generator=generator).tolist()
    rows = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    options: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 3e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "seed": 1,
        "data_seed": 1,
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "ddp_backend": "gloo" if dist.is_initialized() else None,
    } | MODES[mode]
    if cp_size:
        options["parallelism_config"] = SequenceParallelConfig(cp_size=cp_size)
    trainer = SFTTrainer(
        model=build(family),
        args=SFTConfig(**options),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:7]}),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=3, target_modules="all-linear") if mode == "adapters" else None,
    )
    trainer.remove_callback(PrinterCallback)
    if cp_size:
        prepare_trainer(trainer)
    elif "pack" in mode or mode == "padding_free":
        run_document_by_document(trainer)
    trainer.train()
    log = {name: [row[name] for row in trainer.state.log_history if name in row] for name in LOGGED}
    weights = {name: parameter.detach().flatten().tolist() for name, parameter in trainer.model.named_parameters()}
    return {name: values for name, values in log.items() if values} | weights


def run_document_by_document(trainer: Any) -> None:
    """Transformers' own packed forward mixes documents in linear layers."""

    def compute_loss(model: Any, given: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        ids, labels, positions = given["input_ids"], given["labels"], given["position_ids"]
        if num_items_in_batch is None:
            num_items_in_batch = (labels[:, 1:] != -100).sum()
        losses = []
        for row in range(len(ids)):
            bounds = [*(positions[row] == 0).nonzero().flatten().tolist(), ids.shape[1]]
            for start, stop in pairwise(bounds):
                part = {"input_ids": ids[row : row + 1, start:stop], "labels": labels[row : row + 1, start:stop]}
                if bool((part["labels"][:, 1:] != -100).any()):
                    losses.append(model(**part, num_items_in_batch=num_items_in_batch, use_cache=False).loss)
        loss = torch.stack(losses).sum()
        return (loss, None) if return_outputs else loss

    trainer.compute_loss = compute_loss


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        ("olmo_hybrid", "padded on the right"),
        ("olmo_hybrid", "packed"),
        ("bamba", "packed, several rows"),
        ("bamba", "padding_free"),
        ("olmo_hybrid", "adapters"),
        ("qwen3_next", "balance loss"),
        ("qwen3_next", "balance loss, accumulated"),
    ],
)
def test_sft_on_two_ranks_is_one_process(family: str, mode: str, tmp_path: Path) -> None:
    want = fine_tune(family, mode, str(tmp_path / "alone"), 0)
    for found in run_on_ranks(2, fine_tune, family, mode, str(tmp_path / "ranks"), 2, timeout=240.0, checked=False):
        assert found.keys() >= want.keys() >= {"loss", "grad_norm", "eval_loss"} | MORE_LOGGED.get(mode, set())
        errors = {name: relative_error(_numbers(found[name]), _numbers(want[name])) for name in want}
        error, what = worst_of(errors)
        assert error < TOLERANCE, f"{what} is off by {error:.1e}: {found[what]}, {want[what]}"
