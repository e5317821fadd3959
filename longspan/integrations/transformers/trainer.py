"""Transformers' Trainer, and TRL's SFTTrainer, over sequences that processes share.

Trainer multiplies its loss by the number of processes and averages gradients over all of them, after having counted the labels of
all batches and divided by the number of processes that share one. So a rank's share of the loss is what it needs (`losses.py`), and
what is left to do here is what Trainer counts once a process and should count once a sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.attention.softmax import SOFTMAX_METHODS, SoftmaxMethod
from longspan.checks import described
from longspan.comm.collectives import all_reduce
from longspan.errors import InputError
from longspan.exchange import Exchanger, exchange_named
from longspan.exchange.auto.order import RankOrderOption
from longspan.integrations.transformers.accelerate import SEQUENCE, SequenceParallelConfig
from longspan.integrations.transformers.mixers import attention_dropout_of
from longspan.integrations.transformers.model import state_of
from longspan.integrations.transformers.pretrained import parallelize_pretrained
from longspan.integrations.transformers.structure import head_of
from longspan.layout import Order
from longspan.models.mixers import ParallelOptions, SequenceParallel

_OF_THIS_RANK = ("aux_loss", "router_logits", "hidden_states", "attentions")
"""Outputs beside logits, which predictions leave out: those of this rank's tokens alone."""


def prepare_trainer(
    trainer: Any,
    *,
    order: Order | None = None,
    rank_order: RankOrderOption | None = None,
    exchange: str | Exchanger = "auto",
    softmax_method: SoftmaxMethod = "auto",
    gather_logits: bool = False,
    verify: bool | Mapping[str, Any] = False,
    verify_tokens: int | None = None,
) -> None:
    """Let a Trainer train and evaluate with sequences shared by processes, as its `SequenceParallelConfig` says.

        args = TrainingArguments(..., parallelism_config=SequenceParallelConfig(cp_size=4))
        trainer = Trainer(model, args, ...)          # or TRL's SFTTrainer
        prepare_trainer(trainer)                     # then trainer.train()

    Args:
        trainer: changed in place, and its model with it. Batches, their sizes, gradient accumulation, clipping, logging, saving
            and resuming are as they would be with one process in the place of ``cp_size``.
        order, rank_order, exchange, softmax_method: as in `longspan.parallelize`.
        gather_logits: whether evaluation gathers the logits of whole sequences, ``[B, N, V]`` on every rank, as
            ``compute_metrics`` and ``trainer.predict`` need them; ``preprocess_logits_for_metrics`` makes them small again.
        verify, verify_tokens: as in `longspan.parallelize`: compare loss and gradients of the first batch, of at most so many of
            its tokens, with those of one process. True for the first that is trained on; where the weights are divided by then
            (FSDP), the batch itself: ``verify=next(iter(trainer.get_train_dataloader()))``.

    With one process nothing is exchanged; packed documents are still kept apart in every layer.

    Raises:
        InputError: for what would be silently wrong: label smoothing or another loss than the model's own, attention dropout,
            ``compute_metrics`` without `gather_logits`, noise of embeddings, `model_init`, and others, each with the way out.
    """
    _check_kind(trainer)
    config = trainer.accelerator.parallelism_config
    num_ranks = config.cp_size
    exchange_named(exchange)
    if softmax_method not in SOFTMAX_METHODS:
        raise InputError(f"softmax_method must be one of {', '.join(SOFTMAX_METHODS)}; got {softmax_method!r}")
    if num_ranks > 1:
        _check_arguments(trainer)
        _check_dropout(trainer.model)
        if trainer.compute_metrics is not None and not gather_logits:
            raise InputError(
                "compute_metrics is given logits, and a rank has those of its own tokens alone. Call "
                "prepare_trainer(trainer, gather_logits=True), and let preprocess_logits_for_metrics keep little of them, or leave "
                "compute_metrics out"
            )
    mesh = trainer.accelerator.torch_device_mesh
    # Not the default group, where gradients are averaged (`SequenceParallelConfig`).
    group = None if mesh is None else mesh[SEQUENCE].get_group()
    place = SequenceParallel(group, num_ranks)
    options = ParallelOptions(exchange, softmax_method)
    parallelize_pretrained(
        trainer.model,
        options,
        place,
        order=order,
        rank_order=rank_order,
        loss="mean",
        verify=verify,
        verify_tokens=verify_tokens,
    )
    state = state_of(trainer.model)
    assert state is not None
    if num_ranks == 1:
        return
    state.gathers_logits = gather_logits
    # Data that has no length is handed out by one process, batch by batch, to all; each must read its own.
    trainer.accelerator.dataloader_config.dispatch_batches = False
    assert group is not None
    _count_once(trainer, group, gather_logits)


def _check_kind(trainer: Any) -> None:
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise InputError(
            f"prepare_trainer() takes a transformers.Trainer; got {described(trainer)}. Pass the trainer itself"
        )
    config = getattr(trainer.accelerator, "parallelism_config", None)
    if not isinstance(config, SequenceParallelConfig):
        raise InputError(
            f"the trainer's parallelism_config is {type(config).__name__}. Give it TrainingArguments(..., "
            "parallelism_config=SequenceParallelConfig(cp_size=...)), of longspan.integrations.transformers"
        )
    model: Any = trainer.model
    if state_of(model) is not None:
        raise InputError(
            "the trainer's model is parallelized already. Give prepare_trainer() a trainer whose model is not; it does that itself"
        )
    own_loss = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    if own_loss.__module__.startswith("trl.") and own_loss.__name__ != "SFTTrainer":
        raise InputError(
            f"{own_loss.__name__} computes its loss from the logits of whole sequences, and a rank has those of its own tokens. "
            "Trainer and SFTTrainer are supported"
        )


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    reasons = {
        "label_smoothing_factor > 0": (
            bool(args.label_smoothing_factor),
            "the smoothed loss is computed from labels of whole sequences and logits of this rank's tokens. Set it to 0",
        ),
        "compute_loss_func": (
            trainer.compute_loss_func is not None,
            "it would be given labels of whole sequences and logits of this rank's tokens. Let the model compute its loss",
        ),
        "average_tokens_across_devices=False": (
            not args.average_tokens_across_devices,
            "the ranks of a sequence have different numbers of labels. Leave it True",
        ),
        "model_init": (
            trainer.model_init is not None,
            "train() would make a new model. Make the model before the trainer",
        ),
        "use_liger_kernel=True": (args.use_liger_kernel, "its loss knows nothing of shared sequences. Leave it out"),
        "neftune_noise_alpha": (
            bool(args.neftune_noise_alpha),
            "the noise depends on the length of what a rank has, and would be larger. Leave it out",
        ),
        "eval_use_gather_object=True": (
            args.eval_use_gather_object,
            "results of evaluation are tensors, which are gathered once a sequence. Leave it out",
        ),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "it was not tested. Use DistributedDataParallel or FSDP2"),
        "dispatch_batches=True": (
            bool(trainer.accelerator.dataloader_config.dispatch_batches),
            "one process would hand out other batches to each rank of a sequence. Leave it out",
        ),
    }
    for name, (is_given, why) in reasons.items():
        if is_given:
            raise InputError(f"prepare_trainer: {name} is not supported over ranks: {why}")


def _check_dropout(model: nn.Module) -> None:
    for name, module in head_of(model).named_modules():
        dropout = attention_dropout_of(module)
        if dropout:
            raise InputError(
                f"{name} drops attention weights ({dropout}), which is not supported over ranks: set attention_dropout=0 in the "
                "model's config before it is made"
            )


def _count_once(trainer: Any, group: dist.ProcessGroup, gather_logits: bool) -> None:
    """What Trainer gathers from all processes counts once for each sequence, and not once for each process that shares it."""
    num_ranks = group.size()
    accelerator = trainer.accelerator
    gather_for_metrics = accelerator.gather_for_metrics

    def of_shards(data: Any, use_gather_object: bool = False) -> Any:
        # A sum over a rank's tokens is no sample: the end of a data set, where samples are cut off, cuts none of them off.
        if isinstance(data, Tensor) and data.dim() == 0:
            return accelerator.gather(data)
        return gather_for_metrics(data, use_gather_object)

    once = functools.partial(_gather_once, accelerator, num_ranks)
    loop: Callable[..., Any] = trainer.evaluation_loop
    step: Callable[..., Any] = trainer.prediction_step

    def evaluation_loop(
        dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        loss_only = trainer.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        if not loss_only and not gather_logits:
            raise InputError(
                f"{description} wants logits, and a rank has those of its own tokens alone. Call prepare_trainer(trainer, "
                "gather_logits=True), or set prediction_loss_only=True"
            )
        trainer.gather_function = once
        try:
            return loop(dataloader, description, prediction_loss_only, *args, **kwargs)
        finally:
            trainer.gather_function = accelerator.gather_for_metrics

    def prediction_step(
        model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        if ignore_keys is None:
            ignore_keys = list(getattr(head_of(model).config, "keys_to_ignore_at_inference", ["past_key_values"]))
        return step(model, inputs, prediction_loss_only, ignore_keys=[*ignore_keys, *_OF_THIS_RANK])

    finish: Callable[..., Any] = trainer._finalize_training

    def finish_with_whole_loss(*args: Any, **kwargs: Any) -> Any:
        # Of steps that were not logged any more Trainer takes what this process has: here the loss of its tokens.
        trainer._tr_loss = all_reduce(trainer._tr_loss, group, "forward") / num_ranks
        return finish(*args, **kwargs)

    trainer._finalize_training = finish_with_whole_loss
    accelerator.gather_for_metrics = of_shards
    trainer.evaluation_loop = evaluation_loop
    trainer.prediction_step = prediction_step
    if hasattr(trainer, "_tp_size"):
        # SFTTrainer divides its count of tokens by the number of processes that are given the same.
        trainer._tp_size *= num_ranks
    if trainer.args.include_num_input_tokens_seen != "no":
        track = trainer._track_num_input_tokens

        def track_once(inputs: Any) -> None:
            before = trainer.state.num_input_tokens_seen
            track(inputs)
            trainer.state.num_input_tokens_seen = before + (trainer.state.num_input_tokens_seen - before) // num_ranks

        trainer._track_num_input_tokens = track_once


def _gather_once(accelerator: Any, num_ranks: int, data: Any) -> Any:
    """The rows of all processes, those that ranks of a sequence share once, without what was added to fill the last batch.

    data: tensors ``[rows, ...]``, or tuples, lists and dictionaries of them.
    """
    from accelerate.utils import recursively_apply

    end = accelerator.gradient_state

    def gather(x: Tensor) -> Tensor:
        rows = x[None] if x.dim() == 0 else x
        gathered: Tensor = accelerator.gather(rows.contiguous())
        # Ranks that share a sequence follow one another.
        of_sequences = gathered.view(-1, num_ranks, *rows.shape)[:, 0].flatten(0, 1)
        is_last = end.end_of_dataloader and end.remainder > 0
        return of_sequences[: end.remainder] if is_last else of_sequences

    with torch.no_grad():
        return recursively_apply(gather, data)
