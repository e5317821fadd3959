"""Linear-Llama3: Llama 3's block with linear attention in most layers and softmax attention in the others (LASP-2).

A single-device model. `longspan.parallelize` lets it run on the tokens of one rank of a group; the model itself only
hands a layout to its layers.

Shapes: B batch rows, T tokens (this rank's where a layout is given), C channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn

from longspan.checks import check_flag, check_not_empty, check_tensor, described, is_int
from longspan.dtypes import accumulation_dtype, at_least_float32
from longspan.errors import InputError
from longspan.layout import SequenceLayout
from longspan.layout.calls import check_layout
from longspan.models.config import LinearLlama3Config
from longspan.models.experts import build_feed_forward
from longspan.models.feed_forward import FeedForward
from longspan.models.initial import InitialWeights, Whole
from longspan.models.mixers import MIXERS, Context, LayerMemory, LayerMixer, SequenceParallel, build_mixer
from longspan.models.mixers.mixer import check_layout_of_model, operations_of_matrices
from longspan.models.norms import RMSNorm
from longspan.models.rotary import Rotation, rotation
from longspan.models.routing import Routed, Routing, auxiliary_loss, ranks_of_losses
from longspan.ops.chunked.cross_entropy import IGNORED, check_labels, check_num_valid, chunked_cross_entropy
from longspan.ops.chunked.scores import TokenScores, score_tokens


@dataclass(frozen=True)
class ModelMemory:
    """What a model remembers of the tokens so far, the same on every rank; it carries gradients.

    A linear layer takes constant memory, a softmax layer a key and a value for each token that is still seen. Of packed documents
    it is what is remembered of the last one; num_tokens: of that document so far.
    """

    num_tokens: int
    layers: tuple[LayerMemory, ...]

    def detach(self) -> ModelMemory:
        """The same numbers without their graph: where a segment's gradients end."""
        return ModelMemory(self.num_tokens, tuple(layer.detach() for layer in self.layers))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of all layers, by the layer's number and their name."""
        return {f"{number}.{name}": x for number, layer in enumerate(self.layers) for name, x in layer.tensors.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ModelMemory:
        """The same with these tensors, named so, in the place of its own."""
        own: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for name, x in tensors.items():
            number, _, of_layer = name.partition(".")
            own[int(number)][of_layer] = x
        layers = (replace(layer, tensors=named) for layer, named in zip(self.layers, own, strict=True))
        return ModelMemory(self.num_tokens, tuple(layers))

    def sent_back(self, kept: ModelMemory) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values that this call has made, each with the gradient that later segments of time have sent to `kept`.

        kept: the same memory, as an earlier call left it, which later segments were given; its gradients are taken from it.
        """
        for layer, of_kept in zip(self.layers, kept.layers, strict=True):
            made = None if layer.earlier is None else layer.earlier.last
            held = None if of_kept.earlier is None else of_kept.earlier.last
            if made is not None and held is not None:
                yield from zip((made.k, made.v), held.take_grads(), strict=True)

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(layer.num_bytes for layer in self.layers)


class HybridBlock(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LinearLlama3Config, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer: LayerMixer = build_mixer(config, layer)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward: FeedForward = build_feed_forward(config)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None, *tuple[Tensor, ...]]:
        """x and the result are [B, T, C]; also what the mixer remembers, if it is asked for, and with experts what `Routed` holds.

        One by one: reentrant checkpointing finds no tensors inside of others.
        """
        mixed, memory = self.mixer(self.mixer_norm(x), context)
        x = x + mixed
        fed, routed = self.feed_forward(self.feed_forward_norm(x), context)
        return x + fed, memory, *(() if routed is None else routed)

    def init_weights(self, initial: InitialWeights) -> None:
        """Set the initial weights."""
        initial.fill(self.mixer_norm)
        self.mixer.init_weights(initial)
        initial.fill(self.feed_forward_norm)
        self.feed_forward.init_weights(initial)

    def flops_per_token(self, seq_len: int) -> float:
        """Operations of forward and backward for one token of a sequence of `seq_len`."""
        return self.mixer.flops_per_token(seq_len) + self.feed_forward.flops_per_token()


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
        self,
        tokens: Tensor,
        layout: SequenceLayout | None = ...,
        *,
        memory: ModelMemory | None = ...,
        labels: Tensor | None = ...,
        num_valid: int | Tensor | None = ...,
        routing: Routing | None = ...,
        logits_to_keep: int | None = ...,
        token_scores: Literal[False] = ...,
        output_memory: Literal[False] = ...,
        in_segments: bool = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        layout: SequenceLayout | None = ...,
        *,
        memory: ModelMemory | None = ...,
        labels: Tensor | None = ...,
        num_valid: int | Tensor | None = ...,
        routing: Routing | None = ...,
        logits_to_keep: int | None = ...,
        token_scores: Literal[False] = ...,
        output_memory: Literal[True],
        in_segments: bool = ...,
    ) -> tuple[Tensor, ModelMemory]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        layout: SequenceLayout | None = ...,
        *,
        memory: ModelMemory | None = ...,
        labels: Tensor | None = ...,
        num_valid: int | Tensor | None = ...,
        routing: Routing | None = ...,
        logits_to_keep: int | None = ...,
        token_scores: Literal[False] = ...,
        output_memory: bool,
        in_segments: bool = ...,
    ) -> Tensor | tuple[Tensor, ModelMemory]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        layout: SequenceLayout | None = ...,
        *,
        memory: ModelMemory | None = ...,
        labels: Tensor,
        token_scores: Literal[True],
        output_memory: Literal[False] = ...,
        in_segments: bool = ...,
    ) -> TokenScores: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        layout: SequenceLayout | None = ...,
        *,
        memory: ModelMemory | None = ...,
        labels: Tensor,
        token_scores: Literal[True],
        output_memory: Literal[True],
        in_segments: bool = ...,
    ) -> tuple[TokenScores, ModelMemory]: ...

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
        check_tensor("the model", "tokens", tokens)
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InputError(
                f"tokens must be int64 [B, T]; got {tokens.dtype} of shape {tuple(tokens.shape)}. Pass token ids, rows.long()"
            )
        check_not_empty("the model", "tokens", tokens, "row and token")
        check_layout_of_model(layout, self.sequence_parallel)
        check_flag("the model", "output_memory", output_memory)
        check_flag("the model", "in_segments", in_segments)
        self._check_labels(labels, num_valid, routing, tokens, in_segments)
        self._check_token_scores(token_scores, labels, num_valid=num_valid, routing=routing)
        self._check_logits_to_keep(logits_to_keep, labels, tokens)
        self._check_memory(memory, layout)
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
        for index, block in enumerate(self._blocks()):
            x, of_layer, *of_router = block(x, context if memory is None else context.after(memory.layers[index]))
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

    def _check_memory(self, memory: object, layout: SequenceLayout | None) -> None:
        if memory is None:
            if layout is not None and layout.continues:
                raise InputError(
                    f"the model: the layout continues a document of {layout.continues} earlier tokens, and nothing is remembered "
                    "of them; got memory=None. Pass what the call before returned with output_memory=True"
                )
            return
        if not isinstance(memory, ModelMemory):
            raise InputError(
                f"the model: memory must be what a call with output_memory=True returned, or None; got {described(memory)}. Leave "
                "it out where a sequence starts"
            )
        if len(memory.layers) != len(self.blocks):
            raise InputError(
                f"the model: memory must have one part for each of the {len(self.blocks)} layers; got {len(memory.layers)}. Pass "
                "what this very model returned"
            )

    def _check_labels(
        self, labels: Tensor | None, num_valid: object, routing: object, tokens: Tensor, in_segments: bool
    ) -> None:
        check_num_valid("the model", num_valid)
        if labels is None:
            for name, given in (("num_valid", num_valid), ("routing", None if in_segments else routing)):
                if given is not None:
                    raise InputError(
                        f"the model: {name} is for a loss; got {described(given)} and no labels. Pass labels=, or leave it out"
                    )
        if routing is not None and (not isinstance(routing, Routing) or not self.config.num_experts):
            raise InputError(
                f"the model: routing must be a longspan.models.Routing, for a model with experts; got {described(routing)} and "
                f"{self.config.num_experts} experts. Leave it out"
            )
        if labels is None:
            return
        check_labels("the model", labels, tokens.shape, self.config.vocab_size)
        if not isinstance(self.head, nn.Linear):
            raise InputError(
                f"the model: a loss takes the matrix of a head that is a torch.nn.Linear; got {type(self.head).__name__}. Compute "
                "it from logits: leave labels out"
            )

    def _check_token_scores(self, token_scores: object, labels: Tensor | None, **others: object) -> None:
        check_flag("the model", "token_scores", token_scores)
        given = [name for name, value in others.items() if value is not None]
        if token_scores and (labels is None or given):
            raise InputError(
                "the model: token_scores=True scores each of the labels by itself, and returns nothing else; got "
                f"{given[0] if given else 'no labels'}. Give labels alone, or leave token_scores out"
            )

    def _check_logits_to_keep(self, logits_to_keep: object, labels: Tensor | None, tokens: Tensor) -> None:
        if logits_to_keep is None:
            return
        if labels is not None:
            raise InputError(
                f"the model: logits_to_keep is for logits; got {described(logits_to_keep)} and labels. Leave one of them out"
            )
        if not is_int(logits_to_keep) or not 0 <= cast(int, logits_to_keep) <= tokens.shape[1]:
            raise InputError(
                f"the model: logits_to_keep must be an int from 0 to the number of tokens here, {tokens.shape[1]}, or None; got "
                f"{described(logits_to_keep)}. Leave it out for the logits of all"
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
