"""Short runs of Transformers' Trainer: on ranks that share sequences, and as it is without longspan, to be compared with.

Weights are float64, and `Wide` makes all of Transformers' float32 islands so; SGD does not magnify rounding.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from tests.compare import relative_error
from tests.integrations.transformers.families import VOCABULARY, build
from tests.integrations.transformers.reference import IGNORED, Wide

LENGTH = 37


@dataclass(frozen=True)
class Run:
    """What is trained and how.

    packed: documents of all lengths, flattened into one row by Transformers' collator. lora: PEFT's adapters, before the trainer is
    prepared. num_rows: of the data set. streamed: the data set is gone through, and has no length. arguments: of TrainingArguments.
    config: options of the model. prepare: of prepare_trainer. wide: float64 throughout.
    """

    family: str = "qwen3_next"
    packed: bool = False
    lora: bool = False
    num_rows: int = 64
    streamed: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    prepare: dict[str, Any] = field(default_factory=dict)
    wide: bool = True
    dtype: torch.dtype = torch.float64
    metrics: bool = False


@dataclass(frozen=True)
class Trained:
    """What a run logs (loss, grad_norm, eval_loss and metrics, in order), the weights afterwards, and the counts of a step."""

    log: dict[str, list[float]]
    weights: dict[str, Tensor]
    batch_size: int
    tokens: int

    def errors(self, want: Trained) -> dict[str, float]:
        """Relative errors of everything beside another run."""
        assert self.log.keys() == want.log.keys(), (self.log.keys(), want.log.keys())
        assert (self.batch_size, self.tokens) == (want.batch_size, want.tokens)
        found = {name: relative_error(_numbers(self.log[name]), _numbers(want.log[name])) for name in self.log}
        return found | {name: relative_error(self.weights[name], want.weights[name]) for name in want.weights}


def _numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """What torchrun would tell a process of its rank; Accelerate knows nothing of earlier runs in the process."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    world = dist.get_world_size() if dist.is_initialized() else 1
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", TOKENIZERS_PARALLELISM="false")
    if world > 1:
        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1")

    def forget() -> None:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()

    forget()
    try:
        with warnings.catch_warnings():
            # PEFT, TRL and Transformers ask each other for names that are to go.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        forget()
        os.environ.clear()
        os.environ.update(before)


def rows(run: Run) -> list[dict[str, list[int]]]:
    """Random ids; the first labels of each row do not count, as those of a prompt."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(run.num_rows):
        length = int(torch.randint(9, 30, (1,), generator=generator)) if run.packed else LENGTH
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // (3 + number % 5)] = IGNORED
        found.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return found


class Streamed(IterableDataset[dict[str, list[int]]]):
    """Rows that come one after another."""

    def __init__(self, data: list[dict[str, list[int]]]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        return iter(self.data)


def collate(run: Run) -> Any:
    from transformers import DataCollatorWithFlattening, default_data_collator

    return DataCollatorWithFlattening() if run.packed else default_data_collator


def trainer_of(model: nn.Module, folder: str, cp_size: int, **options: Any) -> Any:
    """A Trainer of a few rows, not prepared; options of TrainingArguments, or of Trainer where those are not."""
    from transformers import Trainer, TrainingArguments

    from longspan.integrations.transformers import SequenceParallelConfig

    of_trainer = {name: options.pop(name) for name in ("compute_metrics", "compute_loss_func") if name in options}
    args = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if dist.is_initialized() else None,
        **{"parallelism_config": SequenceParallelConfig(cp_size=cp_size), **options},
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows(Run()), eval_dataset=rows(Run())[:3], **of_trainer)
    trainer.remove_callback(_printing())
    return trainer


def with_adapters(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    """PEFT's LoRA on every linear layer, with weights that matter."""
    import peft

    torch.manual_seed(3)
    options = peft.LoraConfig(
        r=3, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        # Of patterns of PEFT's own for experts, which a model without adapters on them does not match.
        warnings.simplefilter("ignore", RuntimeWarning)
        adapted: nn.Module = peft.get_peft_model(model, options)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def accuracy(prediction: Any) -> dict[str, float]:
    """Of next tokens, by logits ``[B, N, V]`` of whole sequences."""
    guesses = torch.as_tensor(prediction.predictions)[:, :-1].argmax(-1)
    labels = torch.as_tensor(prediction.label_ids)[:, 1:]
    counted = labels != IGNORED
    return {
        "accuracy": float((guesses == labels)[counted].double().mean()),
        "mean": float(torch.as_tensor(prediction.predictions).double().abs().mean()),
        "rows": float(len(labels)),
    }


def train(run: Run, folder: str, cp_size: int, resume: str | None = None, steps: int = 6) -> Trained:
    """One run on the ranks of the default group, cp_size of which share a sequence; 0 is Trainer without longspan."""
    with environment(), Wide() if run.wide else contextlib.nullcontext():
        return _train(run, folder, cp_size, resume, steps)


def _train(run: Run, folder: str, cp_size: int, resume: str | None, steps: int) -> Trained:
    from transformers import TrainingArguments

    options: dict[str, Any] = {}
    if cp_size:
        from longspan.integrations.transformers import SequenceParallelConfig

        options["parallelism_config"] = SequenceParallelConfig(cp_size=cp_size)
    options |= {
        "learning_rate": 3e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 3 if run.packed else 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": 1,
        "data_seed": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo" if dist.is_initialized() else None,
        "include_num_input_tokens_seen": True,
    } | run.arguments
    args = TrainingArguments(output_dir=folder, max_steps=steps, **options)
    model = build(run.family, **run.config).to(run.dtype)
    if run.lora:
        model = with_adapters(model)
    data = rows(run)
    trainer = (document_by_document if run.packed and not cp_size else _trainer_class())(
        model=model,
        args=args,
        train_dataset=Streamed(data) if run.streamed else data,
        eval_dataset=data[:7],
        data_collator=collate(run),
        compute_metrics=accuracy if run.metrics else None,
    )
    trainer.remove_callback(_printing())
    if cp_size:
        from longspan.integrations.transformers import prepare_trainer

        prepare_trainer(trainer, **run.prepare)
    trainer.train(resume_from_checkpoint=resume)
    kept = ("loss", "grad_norm", "train_loss", "eval_loss", "eval_accuracy", "eval_mean", "eval_rows")
    log = {name: [row[name] for row in trainer.state.log_history if name in row] for name in kept}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Trained(
        {name: values for name, values in log.items() if values},
        weights,
        trainer.get_total_train_batch_size(args),
        trainer.state.num_input_tokens_seen,
    )


def _trainer_class() -> Any:
    from transformers import Trainer

    return Trainer


def _printing() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def document_by_document(**options: Any) -> Any:
    """A Trainer that runs packed documents one by one: Transformers' own packed forward mixes them in linear layers."""
    trainer = _trainer_class()(**options)

    def compute_loss(
        model: nn.Module, given: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        positions = given["position_ids"][0]
        bounds = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        losses = [
            model(
                input_ids=given["input_ids"][:, start:stop],
                labels=given["labels"][:, start:stop],
                num_items_in_batch=num_items_in_batch,
                use_cache=False,
            ).loss
            for start, stop in pairwise(bounds)
        ]
        loss = torch.stack(losses).sum() * trainer.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    trainer.compute_loss = compute_loss
    return trainer
