"""The cache of flash-linear-attention's layers, filled by a parallel forward, as `cache.py` fills those of Transformers.

A layer hands over all that it remembers in one call of ``update``: a state, which every rank has whole; keys and values, the last
inputs of its convolutions and the last token before a token shift, of which a rank has its own. States are laid out as the layer's
kernel returns them. The package's kernels change some of them in place, and take them for contiguous.

Shapes: B rows, N tokens of the prompt, T tokens of this rank, C channels, W taps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.errors import LayoutError
from longspan.integrations.transformers.cache import Recorder, Tail, recording
from longspan.layout import SequenceLayout


@dataclass(frozen=True)
class LastInputs:
    """The last inputs of a prompt, as far as this rank has them.

    tail: ``[B, C, up to W]``. num_taps: W, or None where it is the last token alone, ``[B, C]`` in the cache.
    """

    tail: Tail
    num_taps: int | None

    @classmethod
    def of(cls, x: Tensor, layout: SequenceLayout) -> LastInputs:
        """From those of this rank's tokens: ``[B, C, W]``, zero where there are fewer tokens, or ``[B, C]``."""
        if x.dim() == 2:
            # A view of all tokens otherwise.
            return cls(Tail.of(x.clone().unsqueeze(-1), -1, 1, layout), None)
        return cls(Tail.of(x, -1, x.shape[-1], layout), x.shape[-1])

    def whole(self, layout: SequenceLayout, targets: range) -> Tensor | None:
        """The whole prompt's, ``[B, C, W]`` or ``[B, C]``, on the ranks `targets`, and None elsewhere. Every rank calls it."""
        found = self.tail.whole(layout, targets)
        if found is None:
            return None
        return found.squeeze(-1) if self.num_taps is None else F.pad(found, (self.num_taps - found.shape[-1], 0))


class RecordingFlaCache(Recorder):
    """For ``fla.models.utils.Cache``."""

    is_used_by_layers = True
    layers_with_memory: frozenset[int]
    """Indices of the layers that must hand something over."""

    def start(self) -> None:
        """Nothing is kept yet."""
        self.memories: dict[int, dict[str, Any]] = {}

    def __getitem__(self, layer_idx: int) -> dict[str, None]:
        """Nothing is remembered before a prompt."""
        return dict.fromkeys(("recurrent_state", "attn_state", "conv_state", "ffn_state"))

    def update(
        self,
        recurrent_state: Any = None,
        attn_state: tuple[Tensor, ...] | None = None,
        conv_state: Any = None,
        ffn_state: Any = None,
        layer_idx: int = 0,
        offset: int | None = 1,
        cache_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What a layer remembers: of the prompt, `recurrent_state`; the others, with keys and values ``[B, T, ...]``, of this rank.

        Returns:
            Keys and values as they were given: those before them are none.
        """
        layout = self.prompt_layout
        memory = self.memories.setdefault(layer_idx, {})
        if recurrent_state is not None:
            memory["recurrent_state"] = recurrent_state
        if attn_state is not None:
            window = (cache_kwargs or {}).get("window_size")
            kept = layout.seq_len if window is None else window
            memory["attn_state"] = tuple(Tail.of(x, 1, kept, layout) for x in attn_state)
            memory["cache_kwargs"] = cache_kwargs
        for name, inputs in (("conv_state", conv_state), ("ffn_state", ffn_state)):
            if inputs is not None:
                memory[name] = _of_each(inputs, lambda x: LastInputs.of(x, layout))
        return {"attn_state": attn_state}

    def check(self) -> None:
        """Every layer has handed over a state, or keys and values."""
        found = {index for index, memory in self.memories.items() if not memory.keys().isdisjoint(_MEMORIES)}
        missing = sorted(self.layers_with_memory - found)
        if missing:
            raise LayoutError(
                f"layers {missing} put neither a state nor keys and values into the cache: generation would go on without the "
                "prompt. This release of flash-linear-attention is not one that longspan knows, or the model's code was changed"
            )

    def hand_over(self) -> Any:
        """Keys, values and last inputs brought together; states as every rank has them."""
        layout, targets = self.prompt_layout, self.targets
        keeps = layout.rank in targets
        for index in sorted(self.memories):
            memory = self.memories.pop(index)
            for name in ("attn_state", "conv_state", "ffn_state"):
                if name in memory:
                    memory[name] = _of_each(memory[name], lambda part: part.whole(layout, targets))
            if keeps:
                self._fill(index, {name: _of_each(value, _contiguous) for name, value in memory.items()})
        return self.fresh if keeps else None

    def _fill(self, index: int, memory: dict[str, Any]) -> None:
        num_tokens = self.prompt_layout.seq_len
        if "attn_state" in memory:
            # The package counts the keys that it is given, and here a window's layer is given the last alone.
            self.fresh.update(layer_idx=index, offset=num_tokens - memory["attn_state"][0].shape[1])
        self.fresh.update(**memory, layer_idx=index, offset=num_tokens)


_MEMORIES = ("recurrent_state", "attn_state")


def recording_fla_cache(mixers: Iterable[nn.Module], layout: SequenceLayout, targets: range) -> Any:
    """A recorder for a cache of the package, for a model with these mixers. targets: the ranks that fill one."""
    from fla.models.utils import Cache

    recorder = recording(RecordingFlaCache, Cache(), layout, targets)
    recorder.layers_with_memory = frozenset(mixer.layer_idx for mixer in mixers)
    return recorder


def _of_each(value: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of a value, or of each in a tuple."""
    return tuple(map(function, value)) if isinstance(value, tuple) else function(value)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value
