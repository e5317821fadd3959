"""The seam between a model and what mixes its tokens: `SequenceMixer`, and the `Context` that it is called with.

Training, prefill over ranks, decoding and training in segments of time are one call with other contexts:

    whole sequences          no layout, or a local one; nothing remembered
    over ranks               the layout of this rank's tokens
    prefill                  either of them, and the memory is asked for
    decoding                 one token, after what is remembered of those before
    segments of time         some tokens, after what is remembered, with or without its gradients

Shapes: B batch rows, T tokens of this rank, C channels of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from longspan.attention.softmax import EarlierKeys, SoftmaxMethod
from longspan.checks import described
from longspan.errors import InputError, LayoutError
from longspan.exchange import Exchanger
from longspan.layout import SequenceLayout
from longspan.models.initial import InitialWeights
from longspan.models.mixers.growing import Grown
from longspan.models.rotary import Rotation


@dataclass(frozen=True)
class LayerMemory:
    """What a layer remembers of the tokens so far, by name; empty before the first.

    tensors: such as the memory state of linear attention, ``{"state": [B, H, K, V]}``, the last taps of a convolution,
    ``{"taps": [B, W-1, C]}``, keys and values, ``{"keys": [B, L, H_kv, D], "values": ...}``, or several of them. The same on
    every rank. They carry gradients: to what they were computed from, and from what is computed of them.

    earlier: in segments of time, keys and values of earlier segments, each on the rank that holds them, which gather the gradients
    that later segments send by themselves. grown: of tensors that lie in memory with room for more tokens, where they end.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    earlier: EarlierKeys | None = None
    grown: Mapping[str, Grown] = field(default_factory=dict)

    def detach(self) -> LayerMemory:
        """The same numbers without their graph: where a segment's gradients end."""
        earlier = None if self.earlier is None else self.earlier.detach()
        return LayerMemory({name: x.detach() for name, x in self.tensors.items()}, earlier)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors here."""
        earlier = 0 if self.earlier is None else self.earlier.num_bytes
        return sum(x.numel() * x.element_size() for x in self.tensors.values()) + earlier


@dataclass(frozen=True)
class Context:
    """Which tokens a layer is given, and what came before them.

    layout: which tokens of the sequence these are; None is whole sequences. positions: int64 ``[T]``, of each token in its
    document, earlier tokens counted. rotation: of these positions, where a mixer of the model `rotates`. memory: what this layer
    remembers of earlier tokens; None is nothing. outputs_memory: whether to return what it remembers afterwards. shared: what
    layers of a kind have together, by the name of their mixer. in_segments: whether this is a segment of time of a longer sequence.
    outputs_tokens: whether anybody reads what the layer computes for its tokens; where not, its memory is all that is wanted, and
    a mixer may return any tokens.

    With packed documents the memory is of the first of them, which goes on, and what is returned is of the last: the layout
    `continues`.
    """

    layout: SequenceLayout | None
    positions: Tensor
    rotation: Rotation | None = None
    memory: LayerMemory | None = None
    outputs_memory: bool = False
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    in_segments: bool = False
    outputs_tokens: bool = True

    def remembered(self, name: str) -> Tensor | None:
        """A tensor of this layer's memory, or None before the first token."""
        return None if self.memory is None else self.memory.tensors.get(name)

    def of_its_own(self, final_state: Tensor) -> Tensor:
        """An operator's final state, as it is remembered.

        In segments of time no view: it is kept longer than what it would be a view of, and FSDP2 wants none.
        """
        return final_state.clone() if self.in_segments and final_state._base is not None else final_state

    def after(self, memory: LayerMemory) -> Context:
        """This context with what another layer remembers."""
        return replace(self, memory=memory)

    def for_memory_alone(self) -> Context:
        """This context for a layer whose tokens nobody reads."""
        return replace(self, outputs_tokens=False)


@dataclass(frozen=True)
class ParallelOptions:
    """How layers exchange what they need of other ranks: a mixer takes what concerns it.

    exchange: of states, as in the operators. softmax_method: of keys and values, as in `softmax_attention`.
    """

    exchange: str | Exchanger = "auto"
    softmax_method: SoftmaxMethod = "auto"

    def for_another_layer(self) -> ParallelOptions:
        """The same options for another layer: a codec that remembers a layer's errors remembers none yet."""
        if isinstance(self.exchange, str) or not self.exchange.remembers_errors:
            return self
        return replace(self, exchange=self.exchange.for_another_layer())


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


Mixed = tuple[Tensor, LayerMemory | None, *tuple[Tensor, ...]]
"""What a mixer returns: the mixed tokens, what it remembers, and of one that `hands_on` a tensor more."""


class SequenceMixer(nn.Module, ABC):
    """The interface between a model and a layer that mixes tokens: attention of any kind, a convolution, a recurrence.

    A model of any kind whose token-mixing layers are such modules can be given to `longspan.parallelize`.
    """

    rotates: bool = False
    """Whether it turns queries and keys by `Context.rotation`."""
    reads_future: bool = False
    """Whether a token reads later ones, as in bidirectional attention: such a layer cannot run in segments of time."""
    hands_on: bool = False
    """Whether it returns a tensor of its tokens for the later layers of its kind, as the first of them."""
    takes_on: bool = False
    """Whether it is called with that tensor of the first layer of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.parallel = ParallelOptions()
        self.sequence_parallel: SequenceParallel | None = None

    def forward(self, x: Tensor, context: Context, handed: Tensor | None = None) -> Mixed:
        """Mix the tokens.

        Args:
            x: ``[B, T, C]``.
            context: which tokens these are, and what is remembered of earlier ones.
            handed: what the first layer of this kind has handed on of these tokens, if the mixer `takes_on`.

        Returns:
            ``[B, T, C]``, and what the layer remembers afterwards, on every rank: None unless ``context.outputs_memory``; and what
            it hands on, if it does.

        Raises:
            LayoutError: where the mixer was parallelized and the layout is none of that group's.
        """
        check_layout_of_model(context.layout, self.sequence_parallel)
        return self.mix(x, context) if handed is None else self.mix_with(x, context, handed)

    def empty_memory(self, offload: bool) -> LayerMemory:
        """What the layer remembers where a sequence of segments of time begins; offload: keep keys and values in host memory."""
        return LayerMemory()

    def whole_memory(self, memory: LayerMemory, layout: SequenceLayout) -> LayerMemory:
        """What the layer remembers behind the last of some segments, the same on every rank, as tokens behind them are given it.

        layout: of any of the segments. Called on every rank, without gradients.
        """
        return memory

    @abstractmethod
    def mix(self, x: Tensor, context: Context) -> Mixed:
        """`forward`, of a context that has been checked."""

    def mix_with(self, x: Tensor, context: Context, handed: Tensor) -> Mixed:
        """`mix`, with what the first layer of this kind has handed on."""
        raise AssertionError(f"{type(self).__name__} takes nothing on")

    @abstractmethod
    def init_weights(self, initial: InitialWeights) -> None:
        """Set the initial weights."""

    @abstractmethod
    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `seq_len`.

        Six for each number of a matrix, and the two products of forward and four of backward of each channel with what it mixes.
        Recomputation is not counted.
        """

    def set_parallel(self, options: ParallelOptions, place: SequenceParallel | None) -> None:
        """Take the options of a parallel run, and the group whose layouts the mixer is called with from now on, or None."""
        self.parallel, self.sequence_parallel = options.for_another_layer(), place


def operations_of_matrices(module: nn.Module) -> float:
    """Six operations for each number of the linear maps of a module, forward and backward, a token."""
    return 6.0 * sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def check_layout_of_model(layout: object, place: SequenceParallel | None) -> None:
    """Raise unless a layout is one that a model may be called with that was parallelized for `place`, or was not (None).

    Raises:
        InputError: for what is no layout.
        LayoutError: for a layout of another group, none where one is needed, or one of several ranks where the model was not
            parallelized.
    """
    if layout is not None and not isinstance(layout, SequenceLayout):
        raise InputError(
            f"the model: layout must be a SequenceLayout or None; got {described(layout)}. Build one as "
            "SequenceLayout(seq_len, group)"
        )
    if place is None:
        if layout is not None and layout.num_ranks > 1:
            raise LayoutError(
                f"the layout splits the sequence over {layout.num_ranks} ranks, and the model is not parallelized. "
                "Call longspan.parallelize(model, group) first"
            )
    elif layout is None:
        if place.num_ranks > 1:
            raise LayoutError(
                f"the model is parallelized over {place.num_ranks} ranks and needs a layout: without one, each rank "
                "would take its tokens for the whole sequence. Call model(layout.shard(tokens), layout=layout)"
            )
    elif layout.num_ranks == 1 and layout.group is None:
        # SequenceLayout.local(): the caller says that these are whole sequences.
        return
    elif layout.group is not place.group:
        raise LayoutError(
            f"the layout is of another group, of {layout.num_ranks} ranks, than the model, parallelized over "
            f"{place.num_ranks}. Build the layout with the group that was given to longspan.parallelize()"
        )
