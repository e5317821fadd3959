"""A call of a parallelized model that is a segment of time: what its layers are given of earlier tokens, and what they leave.

Stand-ins of the functions that mix tokens (`functions.py`, `methods.py`, `attention.py`) ask for a `Slot`, which holds the state
that they begin with and takes the one that they end with. Where a call is a whole sequence, slots are empty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from longspan.attention.softmax import EarlierKeys
from longspan.errors import LayoutError
from longspan.integrations.transformers.losses import BalanceInSegments


@dataclass(frozen=True)
class SegmentMemory:
    """What a model remembers behind a segment.

    tensors: states and last taps, the same on every rank, by names such as ``"3.causal_conv1d_fn.0"``: the layer's number, what it
    is of, and which of several. earlier: keys and values of softmax layers, each on the rank that holds them, by the layer's
    number. offload: whether those are kept in host memory. gathers: whether they gather gradients.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: Mapping[str, EarlierKeys] = field(default_factory=dict)
    offload: bool = False
    gathers: bool = True

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SegmentMemory:
        """The same with these tensors in the place of its own."""
        return replace(self, tensors=dict(tensors))

    def sent_back(self, kept: SegmentMemory) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values that this segment has made, each with the gradient that later segments have sent to `kept`.

        kept: what the segment left in an earlier pass, which later ones were given; its gradients are taken from it.
        """
        for layer, keys in self.earlier.items():
            made, held = keys.last, kept.earlier[layer].last
            if made is not None and held is not None:
                yield from zip((made.k, made.v), held.take_grads(), strict=True)

    def keys_of(self, layer: str) -> EarlierKeys:
        """Keys and values of a softmax layer; none yet where a document begins."""
        found = self.earlier.get(layer)
        return EarlierKeys(offload=self.offload, requires_grad=self.gathers) if found is None else found


@dataclass(frozen=True)
class Slot:
    """One state of one layer.

    before: what it begins with; None is zeros. keep: takes what it ends with; None where that is not wanted.
    """

    before: Tensor | None = None
    keep: Callable[[Tensor], None] | None = None

    @property
    def keeps(self) -> bool:
        """Whether the operator is to return its final state."""
        return self.keep is not None

    def split(self, out: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What an operator returned, as its output and its final state or None, which is kept here, too."""
        if isinstance(out, Tensor):
            return out, None
        if self.keep is not None:
            self.keep(out[1])
        return out


EMPTY = Slot()


class Segment:
    """The segment of a call.

    Args:
        before: what enters it.
        numbers: of the model's mixers, by which their memory is named.
        keeps: whether what it leaves is wanted.
        num_tokens: of the whole sequence. longest: tokens of its longest document.
        balance: the choices of experts in all segments, where the model has a balance loss.

    A recomputation of a layer (gradient checkpointing) makes the same calls; what it leaves is not kept a second time.
    """

    def __init__(
        self,
        before: SegmentMemory,
        numbers: Mapping[nn.Module, int],
        keeps: bool,
        num_tokens: int,
        longest: int,
        balance: BalanceInSegments | None = None,
    ) -> None:
        self.before, self.num_tokens, self.longest, self.balance = before, num_tokens, longest, balance
        self._numbers, self._keeps = numbers, keeps
        self._tensors: dict[str, Tensor] = {}
        self._earlier: dict[str, EarlierKeys] = {}
        self._is_over = False
        self._layer = ""
        self._asked: Counter[str] = Counter()

    def enter(self, mixer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """A mixer runs; one that stands in several layers is told which (``layer_idx``)."""
        index = arguments.get("layer_idx")
        self._layer = str(self._numbers[mixer]) if index is None else f"{self._numbers[mixer]}@{index}"
        self._asked.clear()

    def slot(self, function: str) -> Slot:
        """The state of a function that the mixer which runs now calls, in the order of its calls."""
        name = f"{self._layer}.{function}.{self._asked[function]}"
        self._asked[function] += 1
        before = self.before.tensors.get(name)
        return Slot(before, (lambda x: self._keep(self._tensors, name, x)) if self._keeps else None)

    @property
    def earlier(self) -> EarlierKeys:
        """Keys and values of earlier segments in the mixer that runs now."""
        return self.before.keys_of(self._layer)

    def keep_keys(self, keys: EarlierKeys) -> None:
        """Those that the next segment's mixer will see."""
        self._keep(self._earlier, self._layer, keys)

    @property
    def keeps(self) -> bool:
        """Whether what the segment leaves is wanted."""
        return self._keeps

    def take(self) -> SegmentMemory:
        """What the segment has left; called once, after the forward."""
        self._is_over = True
        left = replace(self.before, tensors=self._tensors, earlier=self._earlier)
        self._tensors, self._earlier = {}, {}
        return left

    def _keep(self, kept: dict[str, Any], name: str, x: Any) -> None:
        if self._is_over:
            return
        if name in kept:
            raise LayoutError(
                f"layer {self._layer} runs twice in one forward, so that its memory {name} would be another's. Such a model cannot "
                "run in segments of time: run it on whole sequences"
            )
        kept[name] = x
