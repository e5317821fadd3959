"""`LinearLlama3` in segments of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from longspan.errors import InputError
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3, ModelMemory, Routing
from longspan.models.linear_llama3 import HybridBlock
from longspan.models.routing import ranks_of_losses
from longspan.ops.chunked.scores import TokenScores
from longspan.streaming.adapters import register_stream
from longspan.streaming.random_states import is_same, random_state


class StreamedLlama:
    """A `LinearLlama3` as the engine takes it.

    Raises:
        InputError: for a layer that reads later tokens.
    """

    def __init__(self, model: LinearLlama3) -> None:
        self._model = model
        for number, block in enumerate(_blocks(model)):
            if block.mixer.reads_future:
                raise InputError(
                    f"stream(): layer {number}, {type(block.mixer).__name__}, reads later tokens, which a segment of time does not "
                    "have. Train the model on whole sequences, over ranks where they are too long for one"
                )

    def sequence(self, num_valid: int, routing: Routing | None, offload: bool) -> StreamedLlamaSequence:
        return StreamedLlamaSequence(self._model, num_valid, routing, offload)


class StreamedLlamaSequence:
    """A sequence on its way through a `LinearLlama3`; choices of experts are counted first: balance is no sum over tokens.

    Where nobody draws random numbers, as the first segment shows, a first pass leaves out what the last block makes of the tokens:
    what it would have drawn there, dropout for one, must be drawn in both passes.
    """

    def __init__(self, model: LinearLlama3, num_valid: int, routing: Routing | None, offload: bool) -> None:
        self._model, self._num_valid, self._offload = model, num_valid, offload
        weights = model.config.balance_loss_weight, model.config.z_loss_weight
        # Without gradients the model adds no losses of routers.
        adds = model.training and torch.is_grad_enabled()
        self.counts_first = bool(model.config.num_experts) and adds and (routing is not None or any(weights))
        self._routing = Routing() if self.counts_first and routing is None else routing
        self._is_counting = self.counts_first
        self._draws: bool | None = None
        self.end()
        self._layout: SequenceLayout | None = None

    def start(self) -> ModelMemory:
        return self._model.empty_memory(self._offload)

    def remember(self, tokens: Tensor, layout: SequenceLayout | None, memory: ModelMemory) -> ModelMemory:
        self._layout = layout
        # A segment that is computed again for what was not kept has been counted.
        routing = self._routing if self._is_counting else None
        before = random_state(tokens.device) if self._draws is None else None
        _, behind = self._model(
            tokens,
            layout,
            memory=memory,
            routing=routing,
            logits_to_keep=0 if self._draws is False else 1,
            output_memory=True,
            in_segments=True,
        )
        if before is not None:
            self._draws = self._on_any_rank(not is_same(before, random_state(tokens.device)), tokens.device)
        return cast(ModelMemory, behind)

    def _on_any_rank(self, is_so: bool, device: torch.device) -> bool:
        """Whether the last block is computed is one decision: it may exchange."""
        layout = self._layout
        if layout is None or layout.num_ranks == 1:
            return is_so
        return bool(sum_over_ranks(torch.tensor(float(is_so), device=device), layout))

    def all_remembered(self) -> None:
        assert self._routing is not None
        self._is_counting = False
        self._routing.counted(ranks_of_losses(self._layout, self._model.loss_ranks))

    def loss(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, memory: ModelMemory, keeps: bool
    ) -> tuple[Tensor, ModelMemory | None]:
        found = self._model(
            tokens,
            layout,
            memory=memory,
            labels=labels,
            num_valid=self._num_valid,
            routing=self._routing,
            output_memory=keeps,
            in_segments=True,
        )
        return found if keeps else (found, None)

    def scores(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout | None, memory: ModelMemory, keeps: bool
    ) -> tuple[TokenScores, ModelMemory | None]:
        found = self._model(
            tokens, layout, memory=memory, labels=labels, token_scores=True, output_memory=keeps, in_segments=True
        )
        return found if keeps else (found, None)

    def end(self) -> None:
        if self._routing is not None:
            self._routing.of_sequence = None


def _blocks(model: LinearLlama3) -> Iterator[HybridBlock]:
    return (cast(HybridBlock, block) for block in model.blocks)


register_stream(LinearLlama3, StreamedLlama)
