"""The cache that a parallel forward fills: what each layer remembers of the whole prompt, brought to where decoding goes on.

Layers hand their memory to a cache of Transformers while the forward runs. `RecordingCache` takes it: states are whole on every
rank already; of keys, values and convolution inputs a rank has its own tokens, which `hand_over` brings together, in a fresh cache
of the class that Transformers itself would make. Nothing but methods of that class fills it. flash-linear-attention's models have
a cache of their own (`fla_cache.py`).

Shapes: B rows, N tokens of the prompt, T tokens of this rank, H heads, D their size, C channels, W taps or the tokens of a window.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.comm.all_to_all import start_all_to_all
from longspan.errors import LayoutError
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.layout import SequenceLayout, group_of


@dataclass(frozen=True)
class Tail:
    """The last tokens of the prompt that a layer needs, as far as this rank has them.

    x: this rank's tokens from global position `first` on, in dimension `dim`.
    """

    x: Tensor
    dim: int
    first: int

    @classmethod
    def of(cls, x: Tensor, dim: int, num_tokens: int, layout: SequenceLayout) -> Tail:
        """This rank's part of the last `num_tokens` tokens of ``[..., T, ...]``; shares no memory with `x` where it is not all."""
        first = max(0, layout.seq_len - num_tokens)
        own = _tokens_from(first, layout.rank, layout)
        part = x.narrow(dim, x.shape[dim] - own, own)
        return cls(part if own == x.shape[dim] else part.clone(), dim, first)

    def whole(self, layout: SequenceLayout, targets: range) -> Tensor | None:
        """All ranks' tokens from `first` on, in order, on the ranks `targets`, and None elsewhere. Every rank calls it."""
        if layout.num_ranks == 1:
            return self.x
        rows = self.x.movedim(self.dim, 0).contiguous()
        counts = [_tokens_from(self.first, rank, layout) for rank in range(layout.num_ranks)]
        receives = layout.rank in targets
        flight = start_all_to_all(
            rows.repeat(len(targets), *(1,) * (rows.dim() - 1)) if len(targets) > 1 else rows,
            [counts[layout.rank] if rank in targets else 0 for rank in range(layout.num_ranks)],
            counts if receives else [0] * layout.num_ranks,
            group_of(layout),
            "prefill",
        )
        received = flight.wait()
        if not receives:
            return None
        return received.index_select(0, _order_from(self.first, layout).to(received.device)).movedim(0, self.dim)


class Tails:
    """The last `num_tokens` tokens of a prompt that a layer needs (None: all), which comes in one call or segment by segment."""

    def __init__(self, num_tokens: int | None) -> None:
        self.num_tokens = num_tokens
        self._of_segments: list[tuple[SequenceLayout, Tail]] = []

    def add(self, x: Tensor, dim: int, layout: SequenceLayout) -> None:
        """This rank's tokens ``[..., T, ...]`` of a segment; what nobody needs any more is let go."""
        kept = layout.seq_len if self.num_tokens is None else self.num_tokens
        self._of_segments.append((layout, Tail.of(x, dim, kept, layout)))
        while self.num_tokens is not None and sum(of.seq_len for of, _ in self._of_segments[1:]) >= self.num_tokens:
            self._of_segments.pop(0)

    def whole(self, targets: range) -> Tensor | None:
        """All ranks' tokens, in order, on the ranks `targets`, and None elsewhere. Every rank calls it."""
        found = [tail.whole(layout, targets) for layout, tail in self._of_segments]
        parts = [x for x in found if x is not None]
        if not parts:
            return None
        dim = self._of_segments[0][1].dim
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        if self.num_tokens is None or joined.shape[dim] <= self.num_tokens:
            return joined
        return joined.narrow(dim, joined.shape[dim] - self.num_tokens, self.num_tokens).contiguous()


class Recorder(ABC):
    """Stands where a cache does in a parallel forward; combined with the class of the fresh cache by `recording`.

    It gives out nothing, so that every layer takes the way of a first call, and keeps what layers hand to it.
    """

    is_used_by_layers = False
    """Whether layers fill a cache only where they are told to use it (``use_cache``)."""
    fresh: Any
    """The cache to fill."""
    prompt_layout: SequenceLayout
    """Of the prompt, or of the segment of it that runs now."""
    targets: range
    """The ranks that fill one."""

    @abstractmethod
    def start(self) -> None:
        """Nothing is kept yet."""

    def begin_segment(self, layout: SequenceLayout) -> None:
        """Layers hand over what belongs to the tokens of `layout`, which follow those so far; called before each forward."""
        self.prompt_layout = layout

    @abstractmethod
    def check(self) -> None:
        """Every layer has handed something over; the same on every rank."""

    @abstractmethod
    def hand_over(self) -> Any:
        """The filled cache on the ranks that fill one, None on the others. Every rank calls it; what was kept is let go."""


class RecordingCache(Recorder):
    """For the caches of Transformers itself."""

    def start(self) -> None:
        """Nothing is kept yet."""
        self.keys: dict[int, tuple[Tails, Tails]] = {}
        self.taps: dict[tuple[int, int], tuple[Tails, int]] = {}
        self.states: dict[tuple[int, int], Tensor] = {}
        self.lightning: dict[int, Tensor] = {}
        self.taps_of_modules: dict[nn.Module, tuple[Tails, int]] = {}
        self.num_tokens = 0

    def begin_segment(self, layout: SequenceLayout) -> None:
        super().begin_segment(layout)
        self.num_tokens += layout.seq_len

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Keys and values ``[B, H, T, D]`` of this rank's tokens, or latents; a window's layer keeps what decoding will see."""
        window = _window_of(self.fresh, layer_idx)
        kept = None if window is None else window - 1
        of_layer = self.keys.setdefault(layer_idx, (Tails(kept), Tails(kept)))
        for tails, x in zip(of_layer, (key_states, value_states), strict=True):
            tails.add(x, -2, self.prompt_layout)
        return key_states, value_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing is remembered before a prompt."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Nothing is remembered before a prompt."""

    def get_linear_cache(self, layer_idx: int) -> None:
        """Nothing is remembered before a prompt."""

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> Tensor:
        """Inputs of a convolution, ``[B, C, T]``; the last W of the prompt are kept."""
        if conv_kernel_size is None:
            raise LayoutError(
                f"the convolution of layer {layer_idx} does not say how many inputs its cache holds (conv_kernel_size), so that "
                "the last of the prompt cannot be handed over. This release of Transformers is not one that longspan knows"
            )
        of_layer = self.taps.setdefault((layer_idx, state_idx), (Tails(conv_kernel_size), conv_kernel_size))
        of_layer[0].add(conv_states, -1, self.prompt_layout)
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """The state after the last token of the prompt, which every rank has."""
        self.states[layer_idx, state_idx] = recurrent_states
        return recurrent_states

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """MiniMax's name for `update_recurrent_state`."""
        self.lightning[layer_idx] = linear_cache

    def keep_on_module(self, module: nn.Module, x: Tensor, num_taps: int) -> None:
        """For a layer that keeps the inputs ``[B, C, T]`` of its convolution on itself, as ``conv1d_state``."""
        of_module = self.taps_of_modules.setdefault(module, (Tails(num_taps), num_taps))
        of_module[0].add(x, -1, self.prompt_layout)

    def check(self) -> None:
        """Every layer that the fresh cache has room for has handed something over."""
        from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

        with_taps = {layer for layer, _ in self.taps}
        missing = [
            index
            for index, layer in enumerate(self.fresh.layers)
            if (isinstance(layer, CacheLayerMixin) and index not in self.keys)
            or (
                isinstance(layer, LinearAttentionCacheLayerMixin)
                and index not in with_taps
                and not self.taps_of_modules
            )
        ]
        if missing:
            raise LayoutError(
                f"layers {missing} put nothing into the cache: generation would go on without the prompt. This release of "
                "Transformers is not one that longspan knows, or the model's code was changed"
            )

    def hand_over(self) -> Any:
        """Keys, values, latents and convolution inputs brought together; states as every rank has them."""
        targets = self.targets
        keeps = self.prompt_layout.rank in targets
        for index in sorted(self.keys):
            keys, values = (tails.whole(targets) for tails in self.keys.pop(index))
            if keeps:
                self.fresh.update(keys, values, index)
                if _window_of(self.fresh, index) is not None:
                    self.fresh.layers[index].cumulative_length = self.num_tokens
        for (index, state), (tails, num_taps) in sorted(self.taps.items(), key=lambda item: item[0]):
            taps = tails.whole(targets)
            if keeps:
                self.fresh.update_conv_state(taps, index, state, conv_kernel_size=num_taps)
        for module, (tails, num_taps) in self.taps_of_modules.items():
            taps = tails.whole(targets)
            block: Any = module
            block.conv1d_state = None if taps is None else F.pad(taps, (num_taps - taps.shape[-1], 0))
            if not keeps:
                block.rg_lru.recurrent_states = None
        if not keeps:
            return None
        for (index, state), memory in self.states.items():
            self.fresh.update_recurrent_state(memory, index, state)
        for index, memory in self.lightning.items():
            self.fresh.set_linear_cache(index, memory)
        return self.fresh


def recording(kind: type[Recorder], fresh: Any, layout: SequenceLayout, targets: range) -> Any:
    """A recorder for `fresh`, an instance of its class too: models ask what they are given. targets: the ranks that fill one."""
    recorder: Any = object.__new__(type(kind.__name__, (kind, type(fresh)), {}))
    # What a model asks of a cache before its layers run is answered as by an empty one.
    recorder.__dict__.update(fresh.__dict__)
    recorder.fresh, recorder.prompt_layout, recorder.targets = fresh, layout, targets
    recorder.start()
    return recorder


def fresh_cache(backbone: nn.Module) -> Any:
    """The empty cache that Transformers would make for a model: the modeling file's own class, if it has one."""
    from transformers.cache_utils import Cache, DynamicCache

    file = sys.modules[type(backbone).__module__]
    own = [
        kind
        for kind in vars(file).values()
        if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ == file.__name__
    ]
    return own[0]() if own else DynamicCache(config=backbone.config)


def rank_of_last_token(layout: SequenceLayout) -> int:
    """Which rank has the prompt's last token."""
    return next(s.rank for s in layout.all_segments if s.stop == layout.seq_len and s.num_tokens > 0)


def of_last_token(x: Tensor, layout: SequenceLayout) -> Tensor:
    """What the rank that has the prompt's last token gives, on every rank."""
    return sum_over_ranks(x if layout.rank == rank_of_last_token(layout) else torch.zeros_like(x), layout)


def _window_of(cache: Any, layer_idx: int) -> int | None:
    """How many tokens the layer's attention sees, where its cache forgets the others; None where it keeps all."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not getattr(layer, "is_sliding", False):
        return None
    window: int = layer.sliding_window  # type: ignore[union-attr]
    # With a window of one token Transformers' layer keeps all of them.
    return window if window > 1 else None


def _tokens_from(first: int, rank: int, layout: SequenceLayout) -> int:
    """How many tokens from position `first` on a rank has: the last of its local ones."""
    return sum(max(0, stop - max(start, first)) for start, stop in layout.segments_of(rank))


def _order_from(first: int, layout: SequenceLayout) -> Tensor:
    """Where the tokens from position `first` on lie, in order, when those of all ranks stand one rank after another."""

    def build() -> Tensor:
        runs = [
            torch.arange(max(start, first), stop)
            for rank in range(layout.num_ranks)
            for start, stop in layout.segments_of(rank)
            if stop > first
        ]
        return torch.cat(runs).argsort()

    return layout.cached(("tail order", first), build)
