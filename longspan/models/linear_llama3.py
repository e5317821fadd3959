"""Linear-Llama3: Llama 3's block with linear attention in most layers and softmax attention in the others (LASP-2).

A single-device model. `longspan.parallelize` lets it run on the tokens of one rank of a group; the model itself only
hands a layout to its layers.

Shapes: B batch rows, T tokens (this rank's where a layout is given), C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Literal, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor, nn

from longspan.checks import check_flag
from longspan.dtypes import accumulation_dtype, at_least_float32
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout
from longspan.models.block import HybridBlock
from longspan.models.config import LinearLlama3Config
from longspan.models.initial import InitialWeights, Whole
from longspan.models.linear_llama3_checks import (
    check_logits_to_keep,
    check_loss,
    check_memory,
    check_token_scores,
    check_tokens,
)
from longspan.models.memory import ModelMemory
from longspan.models.mixers import MIXERS, Context, LayerMemory, SequenceParallel
from longspan.models.mixers.mixer import check_layout_of_model, operations_of_matrices
from longspan.models.norms import RMSNorm
from longspan.models.rotary import Rotation, rotation
from longspan.models.routing import Routed, Routing, auxiliary_loss, ranks_of_losses
from longspan.ops.chunked.cross_entropy import IGNORED, chunked_cross_entropy
from longspan.ops.chunked.scores import TokenScores, score_tokens


class CallOptions(TypedDict, total=False):
    """What every call of a model takes beside tokens and a layout: for the overloads of `LinearLlama3.forward`."""

    memory: ModelMemory | None
    in_segments: bool


class LossOptions(CallOptions, total=False):
    """What a call for logits or a loss takes."""

    labels: Tensor | None
    num_valid: int | Tensor | None
    routing: Routing | None
    logits_to_keep: int | None


class LinearLlama3(nn.Module):
    """A causal language model of `LinearLlama3Config`, with the weights of `init_weights(0)`."""

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HybridBlock(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        made = {name: MIXERS[name].make_shared(config) for name in dict.fromkeys(config.layer_operators)}
        self.shared = nn.ModuleDict({name: module for name, module in made.items() if module is not None})
        self.sequence_parallel: SequenceParallel | None = None
        self.loss_ranks: SequenceParallel | None = None
        self.init_weights(0)

    @overload
    def forward(
        self, tokens: Tensor, layout: SequenceLayout | None = ..., *, token_scores: Literal[False] = ...,
        output_memory: Literal[False] = ..., **options: Unpack[LossOptions],
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, layout: SequenceLayout | None = ..., *, token_scores: Literal[False] = ...,
        output_memory: Literal[True], **options: Unpack[LossOptions],
    ) -> tuple[Tensor, ModelMemory]: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, layout: SequenceLayout | None = ..., *, token_scores: Literal[False] = ...,
        output_memory: bool, **options: Unpack[LossOptions],
    ) -> Tensor | tuple[Tensor, ModelMemory]: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, layout: SequenceLayout | None = ..., *, labels: Tensor, token_scores: Literal[True],
        output_memory: Literal[False] = ..., **options: Unpack[CallOptions],
    ) -> TokenScores: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, layout: SequenceLayout | None = ..., *, labels: Tensor, token_scores: Literal[True],
        output_memory: Literal[True], **options: Unpack[CallOptions],
    ) -> tuple[TokenScores, ModelMemory]: ...  # fmt: skip
    def forward(
        self,
        tokens: Tensor,
        layout: SequenceLayout | None = None,
        *,
        memory: ModelMemory | None = None,
        labels: Tensor | None = None,
        num_valid: int | Tensor | None = None,
        routing: Routing | None = None,
        logits_to_keep: int | None = None,
        token_scores: bool = False,
        output_memory: bool = False,
        in_segments: bool = False,
    ) -> Tensor | TokenScores | tuple[Tensor | TokenScores, ModelMemory]:
        """Logits of the token after each of `tokens`, or with labels their loss.

        Args:
            tokens: int64 ``[B, T]``: whole sequences, or with a layout this rank's tokens of them.
            layout: which tokens these are; needed once the model is parallelized, and for packed documents (B is 1
                then). ``SequenceLayout.local`` says that they are whole sequences, parallelized or not.
            memory: what the model remembers of the tokens before these, from an earlier call; None is nothing. Its gradient on a
                rank is that rank's share. Of packed documents the first goes on with it.
            labels: the token after each of `tokens`, int64 ``[B, T]``, shifted before the split (`SequenceLayout.shard_labels`);
                -100 where there is none. With them the model returns the loss, by `longspan.chunked_cross_entropy`, and never holds
                the logits of all tokens.
            num_valid: with labels, what the sum of the losses is divided by: the number of valid tokens of all ranks. None is the
                number of those here.
            routing: with labels, of a model with experts: what the auxiliary losses are divided by, and where they and the routers'
                statistics are noted. With `in_segments` and without labels the choices of this segment are counted there.
            logits_to_keep: of how many of the last tokens here logits are computed, 0 for none, as a prompt needs them; None is of
                all.
            token_scores: with labels, return the loss of each token here by itself and whether its label is the likeliest word,
                without gradients, for evaluation: `TokenScores`, of ``[B, T]``.
            output_memory: also return what it remembers afterwards, on every rank: `memory` of the tokens that follow. A prompt
                over ranks, and then token by token on one of them (``SequenceLayout.local(1)``, if the model is parallelized),
                is the same call. Of packed documents it is that of the last one.
            in_segments: these are a segment of time of a longer sequence, as `longspan.stream` calls the model, beginning with
                `empty_memory`.

        Returns:
            Logits ``[B, T, vocab_size]``, or of the `logits_to_keep` last tokens, float32 (float64 for float64 weights), or with
            `labels` the loss in nats, a scalar of the same dtype, or `TokenScores`; with `output_memory`, the pair (one of these,
            memory).

        Raises:
            InputError: for tokens or labels of another shape or dtype, and for a memory of another model or batch.
            LayoutError: if T is not the layout's number of tokens, or the layout is not of the group that the model was
                parallelized for.

        A rank's loss is the sum over its own valid tokens divided by the number of valid tokens of all ranks; parameter
        gradients are then summed over the ranks (`longspan.sum_gradients`). Where a model with experts is trained, in training mode
        and with gradients, its share of the routers' losses is added (`longspan.models.routing`), by an all-reduce over the ranks
        that `longspan.parallelize` was told of; but not where no token is valid.
        """
        check_tokens(tokens)
        check_layout_of_model(layout, self.sequence_parallel)
        check_flag("the model", "output_memory", output_memory)
        check_flag("the model", "in_segments", in_segments)
        check_loss(self.config, self.head, labels, num_valid, routing, tokens, in_segments)
        check_token_scores(token_scores, labels, num_valid=num_valid, routing=routing)
        check_logits_to_keep(logits_to_keep, labels, tokens)
        check_memory(memory, layout, len(self.blocks))
        if layout is not None and layout.has_document_states and (memory is not None or output_memory):
            layout = layout.continuing(0 if memory is None else memory.num_tokens)
        if layout is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            check_layout(layout, tokens.shape[1], "the model")
            positions = layout.document_positions_on(tokens.device)
        if memory is not None and (layout is None or layout.continues is None):
            positions = positions + memory.num_tokens
        shared = {name: module() for name, module in self.shared.items()}
        context = Context(
            layout,
            positions,
            self._rotation(positions),
            outputs_memory=output_memory,
            shared=shared,
            in_segments=in_segments,
        )
        x = self.embedding(tokens)
        found: list[LayerMemory] = []
        routed: list[Routed] = []
        handed: dict[str, Tensor] = {}
        # A pass for what is remembered alone, such as a prompt's: nobody reads what the last block makes of the tokens.
        fills = output_memory and logits_to_keep == 0 and routing is None and not torch.is_grad_enabled()
        for index, block in enumerate(self._blocks()):
            given = [handed[block.mixer.name]] if block.mixer.takes_on else []
            before = context if memory is None else context.after(memory.layers[index])
            if fills and index == len(self.blocks) - 1:
                before = before.for_memory_alone()
            x, of_layer, *of_router = block(x, before, *given)
            if block.mixer.hands_on:
                handed[block.mixer.name] = of_router.pop(0)
            found += [] if of_layer is None else [of_layer]
            routed += [Routed(*of_router)] if of_router else []
        if logits_to_keep is not None:
            x = x[:, x.shape[1] - logits_to_keep :]
        x = self.norm(x)
        result: Tensor | TokenScores
        if labels is None:
            result = at_least_float32(self.head(x))
            if routing is not None:
                routing.count(routed)
        elif token_scores:
            result = score_tokens(x, self.head.weight, labels)
        else:
            result = chunked_cross_entropy(x, self.head.weight, labels, num_valid=num_valid)
            if routing is not None:
                routing.cross_entropy = routing.cross_entropy + result.detach()
            if routed and self.training and torch.is_grad_enabled():
                counted = (labels != IGNORED).sum() if num_valid is None else num_valid
                result = result + self._auxiliary_loss(routed, layout, routing) * (counted > 0)
        if not output_memory:
            return result
        return result, ModelMemory(_num_tokens_so_far(tokens, layout, memory), tuple(found))

    def init_weights(self, seed: int, whole: Whole = nullcontext) -> None:
        """Llama's initial weights, drawn on the CPU from `seed`: the same on every device and rank.

        whole: where weights are divided over ranks, what `longspan.parallel.materialise` gives.
        """
        initial = InitialWeights(seed, self.config.num_layers, whole)
        initial.fill(self.embedding)
        for block in self._blocks():
            block.init_weights(initial)
        initial.fill(self.norm)
        initial.fill(self.shared)
        if not self.config.tie_embeddings:
            initial.fill(self.head)

    def empty_memory(self, offload: bool = False) -> ModelMemory:
        """What the model remembers where a sequence of segments of time begins: ``memory`` of the first one's call.

        offload: keep keys and values of earlier segments, and their gradients, in host memory.
        """
        return ModelMemory(0, tuple(block.mixer.empty_memory(offload) for block in self._blocks()))

    @torch.no_grad()
    def whole_memory(self, memory: ModelMemory, layout: SequenceLayout) -> ModelMemory:
        """What the model remembers behind segments of time as any other call is given it: the same on every rank.

        Args:
            memory: what the last segment left (`empty_memory`), whose keys and values each rank has of its own tokens.
            layout: of any of the segments.

        To be called on every rank. Keys and values are brought together, without gradients.
        """
        pairs = zip(self._blocks(), memory.layers, strict=True)
        return ModelMemory(memory.num_tokens, tuple(block.mixer.whole_memory(x, layout) for block, x in pairs))

    def num_parameters(self) -> int:
        """Number of trained numbers; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Number of those that a token meets: all but the experts that it does not choose."""
        return self.num_parameters() - sum(block.feed_forward.num_idle_parameters() for block in self._blocks())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `seq_len`.

        Six for each number of a matrix, and what the mixers count on top of theirs. Recomputation is not counted.
        """
        return operations_of_matrices(self.head) + sum(block.flops_per_token(seq_len) for block in self._blocks())

    def _blocks(self) -> Iterator[HybridBlock]:
        return (cast(HybridBlock, block) for block in self.blocks)

    def _auxiliary_loss(self, routed: list[Routed], layout: SequenceLayout | None, routing: Routing | None) -> Tensor:
        return auxiliary_loss(
            routed,
            experts_per_token=self.config.experts_per_token,
            balance_weight=self.config.balance_loss_weight,
            z_weight=self.config.z_loss_weight,
            ranks=ranks_of_losses(layout, self.loss_ranks),
            routing=routing,
        )

    def _rotation(self, positions: Tensor) -> Rotation | None:
        if not any(block.mixer.rotates for block in self._blocks()):
            return None
        dtype = accumulation_dtype(self.norm.weight.dtype)
        config = self.config
        return rotation(positions, config.size_of_head, config.rope_theta, dtype, config.rope_scaling)


def _num_tokens_so_far(tokens: Tensor, layout: SequenceLayout | None, memory: ModelMemory | None) -> int:
    """Tokens of the last document up to here, those that are remembered from before included."""
    *_, start, stop = (0, tokens.shape[1]) if layout is None else layout.document_bounds
    if start > 0:
        return stop - start
    if layout is not None and layout.continues is not None:
        return stop + layout.continues
    return stop + (0 if memory is None else memory.num_tokens)
