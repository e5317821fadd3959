"""Linear-Llama3: Llama 3's block with linear attention in most layers and softmax attention in the others (LASP-2).

A single-device model. `longspan.parallelize` lets it run on the tokens of one rank of a group; the model itself only
hands a layout to its layers.

Shapes: B batch rows, T tokens (this rank's where a layout is given), C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.checks import check_count, check_not_empty, check_tensor, described
from longspan.dtypes import accumulation_dtype, at_least_float32
from longspan.errors import InputError, LayoutError
from longspan.layout import SequenceLayout
from longspan.layout.sequence_layout import check_layout
from longspan.models.config import LinearLlama3Config
from longspan.models.gates import ChannelDecayGate, ScalarDecayGate
from longspan.models.layers import GatedRMSNorm, RMSNorm, Rotation, SwiGLU, rotation
from longspan.models.mixers import LinearCache, LinearMixer, SoftmaxCache, SoftmaxMixer

INIT_STD = 0.02


@dataclass
class Cache:
    """What the model remembers while it decodes.

    A linear layer takes constant memory, a softmax layer a key and a value a token that is still seen.
    """

    batch_size: int
    layers: list[LinearCache | SoftmaxCache]
    num_tokens: int = 0


@dataclass(frozen=True)
class SequenceParallel:
    """The group that a model was parallelized for; `group` is a process group, or None for one process without any.

    A copy of the model in this process is of the same group. Pickled, this is None: a group belongs to its process, and what is
    loaded is a model that was not parallelized.
    """

    group: Any
    num_ranks: int

    def __copy__(self) -> SequenceParallel:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class HybridBlock(nn.Module):
    """x + mixer(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LinearLlama3Config, operator: str) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.norm_eps)
        self.mixer = SoftmaxMixer(config) if operator == "softmax" else LinearMixer(config, operator)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = SwiGLU(config.dim, config.hidden_dim)

    def forward(self, x: Tensor, layout: SequenceLayout | None, by: Rotation | None) -> Tensor:
        """x and the result are [B, T, C]; `by` turns queries and keys of softmax layers."""
        x = x + self.mixer(self.mixer_norm(x), layout, by)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def step(self, x: Tensor, cache: Any, by: Rotation | None) -> Tensor:
        """The block's output for the next token, [B, 1, C]."""
        x = x + self.mixer.step(self.mixer_norm(x), cache, by)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LinearLlama3(nn.Module):
    """A causal language model of `LinearLlama3Config`, with the weights of `init_weights(0)`."""

    def __init__(self, config: LinearLlama3Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HybridBlock(config, operator) for operator in config.layer_operators)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.sequence_parallel: SequenceParallel | None = None
        self.init_weights(0)

    def forward(self, tokens: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """Logits of the token after each of `tokens`.

        Args:
            tokens: int64 ``[B, T]``: whole sequences, or with a layout this rank's tokens of them.
            layout: which tokens these are; needed once the model is parallelized, and for packed documents (B is 1
                then). ``SequenceLayout.local`` says that they are whole sequences, parallelized or not.

        Returns:
            ``[B, T, vocab_size]``, float32 (float64 for float64 weights).

        Raises:
            InputError: for tokens of another shape or dtype.
            LayoutError: if T is not the layout's number of tokens, or the layout is not of the group that the model was
                parallelized for.

        A rank's loss is the sum over its own valid tokens divided by the number of valid tokens of all ranks; parameter
        gradients are then summed over the ranks (`longspan.sum_gradients`).
        """
        check_tensor("the model", "tokens", tokens)
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise InputError(
                f"tokens must be int64 [B, T]; got {tokens.dtype} of shape {tuple(tokens.shape)}. Pass token ids, rows.long()"
            )
        check_not_empty("the model", "tokens", tokens, "row and token")
        self._check_layout(layout)
        if layout is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            check_layout(layout, tokens.shape[1], "the model")
            positions = layout.document_positions_on(tokens.device)
        x = self.embedding(tokens)
        by = self._rotation(positions)
        for block in self.blocks:
            x = block(x, layout, by)
        return self._logits(x)

    def init_cache(self, batch_size: int) -> Cache:
        """An empty cache for decoding `batch_size` rows on one device.

        Raises:
            InputError: for a batch_size that is no int of at least 1.
        """
        check_count("init_cache()", "batch_size", batch_size)
        layers: list[LinearCache | SoftmaxCache] = []
        for operator in self.config.layer_operators:
            layers.append(SoftmaxCache(self.config.window) if operator == "softmax" else LinearCache())
        return Cache(batch_size, layers)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits after the next token of each row; the token joins the cache.

        Args:
            tokens: int64 ``[B, 1]``.
            cache: from `init_cache(B)`; changed in place.

        Returns:
            ``[B, 1, vocab_size]``: what `forward` gives at this position, on one device.

        Raises:
            InputError: for tokens of another shape or dtype.
        """
        check_tensor("step()", "tokens", tokens)
        if not isinstance(cache, Cache):
            raise InputError(
                f"step() takes the cache that init_cache() made; got {described(cache)}. Make one for each sequence"
            )
        if tokens.shape != (cache.batch_size, 1) or tokens.dtype != torch.int64:
            raise InputError(
                f"step() takes one token of each row, int64 [{cache.batch_size}, 1]; "
                f"got {tokens.dtype} of shape {tuple(tokens.shape)}. Make a cache for as many rows with init_cache()"
            )
        x = self.embedding(tokens)
        by = self._rotation(torch.full((1,), cache.num_tokens, device=tokens.device))
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            assert isinstance(block, HybridBlock)
            x = block.step(x, layer_cache, by)
        cache.num_tokens += 1
        return self._logits(x)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Llama's initial weights, drawn on the CPU from `seed`: the same on every device and rank.

        Matrices are normal with deviation 0.02, those that write into the residual stream with 0.02 / √(2 ·
        num_layers).
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / (2 * self.config.num_layers) ** 0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual_std if name.endswith(("out_proj", "down_proj")) else INIT_STD
                if module is self.head and self.config.tie_embeddings:
                    continue
                drawn = torch.empty(module.weight.shape).normal_(std=std, generator=generator)
                module.weight.copy_(drawn)
            elif isinstance(module, RMSNorm | GatedRMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, ScalarDecayGate | ChannelDecayGate):
                module.reset_parameters()

    def num_parameters(self) -> int:
        """Number of trained numbers; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `seq_len`.

        Six for each number of a matrix; in a softmax layer, the two products of forward and four of backward with the
        tokens that a token sees on average, seq_len / 2 without a window; in a linear layer, the same products with one
        state a head (the recurrent form: what a chunk form computes inside its chunks comes on top). Recomputation is not
        counted.
        """
        config = self.config
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        inner = config.num_heads * config.size_of_head
        window = seq_len if config.window is None else min(config.window, seq_len)
        seen = {"L": config.size_of_head, "N": window - window**2 / (2 * seq_len)}
        mixing = sum(12 * inner * seen[kind] for kind in config.layer_kinds)
        return 6 * matrices + mixing

    def _check_layout(self, layout: SequenceLayout | None) -> None:
        ours = self.sequence_parallel
        if layout is not None and not isinstance(layout, SequenceLayout):
            raise InputError(
                f"the model: layout must be a SequenceLayout or None; got {described(layout)}. Build one as "
                "SequenceLayout(seq_len, group)"
            )
        if ours is None:
            if layout is not None and layout.num_ranks > 1:
                raise LayoutError(
                    f"the layout splits the sequence over {layout.num_ranks} ranks, and the model is not parallelized. "
                    "Call longspan.parallelize(model, group) first"
                )
        elif layout is None:
            if ours.num_ranks > 1:
                raise LayoutError(
                    f"the model is parallelized over {ours.num_ranks} ranks and needs a layout: without one, each rank "
                    "would take its tokens for the whole sequence. Call model(layout.shard(tokens), layout=layout)"
                )
        elif layout.num_ranks == 1 and layout.group is None:
            # SequenceLayout.local(): the caller says that these are whole sequences.
            return
        elif layout.group is not ours.group:
            raise LayoutError(
                f"the layout is of another group, of {layout.num_ranks} ranks, than the model, parallelized over "
                f"{ours.num_ranks}. Build the layout with the group that was given to longspan.parallelize()"
            )

    def _rotation(self, positions: Tensor) -> Rotation | None:
        if "N" not in self.config.layer_kinds:
            return None
        dtype = accumulation_dtype(self.norm.weight.dtype)
        return rotation(positions, self.config.size_of_head, self.config.rope_theta, dtype)

    def _logits(self, x: Tensor) -> Tensor:
        return at_least_float32(self.head(self.norm(x)))
