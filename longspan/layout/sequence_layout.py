"""Which tokens of a sequence a rank holds: `SequenceLayout` is the only object that knows.

Shapes: N is the global length, P the number of ranks, T_local the number of tokens that this rank holds.

A sequence is cut into P (contiguous) or 2P (zigzag) *segments* of nearly equal length; the first ``N mod S`` of S segments
are one token longer. Rank r holds segment r, and with zigzag also segment 2P-1-r, which balances causal softmax attention.
With *weights* a rank holds tokens in proportion to its own, in zigzag order half of them in each of its segments, so that causal
softmax attention is shared in the same proportion.
A *piece* is the part of a segment that belongs to one packed document.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.checks import check_tensor, described, is_int
from longspan.errors import InputError, LayoutError
from longspan.layout import agreement
from longspan.layout.documents import (
    bounds_of_positions,
    check_continues,
    check_documents,
    cut_bounds,
    documents_within,
)
from longspan.layout.gather import gather_tokens
from longspan.layout.groups import check_ranks_per_node, resolve_group
from longspan.layout.labels import shifted_labels
from longspan.layout.pieces import Piece, Segment, cut_in_pieces, cut_in_segments, has_any, positions_in_documents
from longspan.layout.shares import check_rank_order, check_weights, segment_lengths, tokens_of_rank
from longspan.modes import built_for_every_mode
from longspan.tracing import (
    breaks_graphs,
    has_no_values,
    makes_fakes,
    outside_graphs,
    outside_modes,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
Order = Literal["contiguous", "zigzag"]
ORDERS: tuple[Order, ...] = ("contiguous", "zigzag")


def _cached_property(build: Callable[[SequenceLayout], T]) -> T:
    """A property that is built once for a layout; `torch.compile` follows it, and would stop at the lock of functools' own."""
    getter: Any = property(lambda layout: layout.cached(build.__name__, lambda: build(layout)), doc=build.__doc__)
    result: T = getter
    return result


class SequenceLayout:
    """How one sequence of `seq_len` tokens is split over the ranks of `group`.

    Args:
        seq_len: global number of tokens N, at least one per rank; no multiple of anything.
        group: ProcessGroup; DeviceMesh of one dimension; or DeviceMesh of nodes × ranks of a node, whose first dimension is named
            ``"node"``. None is the default group, or one rank where none is initialised.
        order: ``"contiguous"`` (rank r holds the r-th of P runs) or ``"zigzag"`` (runs r and 2P-1-r of 2P).
        documents: global cu_seqlens of packed documents, ``[0, ..., seq_len]`` strictly increasing, as a list or an integer
            tensor; None is one document. Read here, once: later changes of a tensor have no effect.
        ranks_per_node: how many consecutive ranks share a node, for exchanges that care; a two-dimensional mesh says so itself.
            None leaves it to the names of the ranks' hosts.
        weights: a number of at least 0 for each rank, the same list on every rank: its share of the tokens, such as its speed.
            Shares are exact fractions rounded to whole tokens, and a rank has at least one, also one of weight 0. None gives equal
            shares.
        continues: says that these tokens are a stretch of a longer sequence, which is computed stretch by stretch, and how many
            tokens of the first document stand before them: 0 where the first token begins a document. Positions inside documents
            count on from there. There is one state then whatever the documents, ``[B, ...]`` as without them: the initial state is
            that of the first document (what is given with 0 is not looked at), the final state that of the last. None is a
            sequence by itself, whose documents have a state each.
        rank_order: every rank once, in the order in which they hold the sequence: the i-th of them the i-th run (and in zigzag
            order the i-th from the end). None is the order of their numbers. A chain of states passes through the ranks in it.

    Raises:
        LayoutError: for a length, group, order, documents, ranks_per_node, weights, continues or rank_order that do not fit.

    A layout is immutable and holds no tensors of the caller. Build one per batch and hand it to every layer.
    """

    def __init__(
        self,
        seq_len: int,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        order: Order = "contiguous",
        documents: Sequence[int] | Tensor | None = None,
        *,
        ranks_per_node: int | None = None,
        weights: Sequence[float] | Tensor | None = None,
        continues: int | None = None,
        rank_order: Sequence[int] | None = None,
    ) -> None:
        process_group, num_ranks, rank, mesh_ranks_per_node = resolve_group(group)
        if None not in (ranks_per_node, mesh_ranks_per_node) and ranks_per_node != mesh_ranks_per_node:
            raise LayoutError(
                f"ranks_per_node is {ranks_per_node!r}, but the mesh has {mesh_ranks_per_node} ranks in each node, its second "
                "dimension. Leave ranks_per_node out"
            )
        if ranks_per_node is None:
            ranks_per_node = mesh_ranks_per_node
        self._init(
            seq_len, process_group, num_ranks, rank, order, documents, ranks_per_node, weights, continues, rank_order
        )

    def _init(
        self,
        seq_len: int,
        group: dist.ProcessGroup | None,
        num_ranks: int,
        rank: int,
        order: Order,
        documents: Sequence[int] | Tensor | None,
        ranks_per_node: int | None,
        weights: Sequence[float] | Tensor | None,
        continues: int | None,
        rank_order: Sequence[int] | None,
    ) -> None:
        if isinstance(seq_len, bool) or not isinstance(seq_len, int | torch.SymInt):
            raise LayoutError(f"seq_len must be an int, the global number of tokens; got {seq_len!r}")
        if order not in ORDERS:
            raise LayoutError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
        if seq_len < num_ranks:
            raise LayoutError(
                f"seq_len {seq_len} is shorter than the number of ranks {num_ranks}: every rank needs at least one token. "
                "Use a longer sequence or a smaller sequence-parallel group"
            )
        self.seq_len = seq_len
        self.order: Order = order
        self.group = group
        self.num_ranks = num_ranks
        self.rank = rank
        self.documents = check_documents(documents, seq_len, num_ranks)
        self.ranks_per_node = check_ranks_per_node(ranks_per_node, num_ranks)
        self.weights = check_weights(weights, num_ranks)
        """Of the ranks' shares; None where all are equal."""
        self.continues = check_continues(continues)
        self.rank_order = check_rank_order(rank_order, num_ranks)
        """The ranks, in the order in which they hold the sequence."""
        self._cache: dict[Hashable, Any] = {}
        # Made here, as a compiled graph takes them as its inputs: it would take what it sees built for constants.
        self.num_local_tokens = self._count_local_tokens()
        """Number of tokens T_local that this rank holds."""
        self.is_packed = self.documents is not None
        """Whether documents were given."""
        self.num_documents = 1 if self.documents is None else len(self.documents) - 1
        """Number of packed documents; 1 without documents."""
        self.has_document_states = self.is_packed and continues is None
        """Whether every document has an initial and a final state of its own; else there is one before and one after them all."""
        self.num_states = self.num_documents if self.has_document_states else 1
        """Number of initial, and of final, states of a row."""
        self.cu_seqlens = None if self.documents is None else _plain_tensor(self.documents)
        """`documents` as an int64 tensor on the CPU, or None."""

    @classmethod
    def local(
        cls, seq_len: int, documents: Sequence[int] | Tensor | None = None, *, continues: int | None = None
    ) -> SequenceLayout:
        """A layout of one rank that holds all `seq_len` tokens, whatever process group is initialised."""
        layout = cls.__new__(cls)
        layout._init(seq_len, None, 1, 0, "contiguous", documents, None, None, continues, None)
        return layout

    @classmethod
    def for_rank(
        cls,
        seq_len: int,
        num_ranks: int,
        rank: int,
        order: Order = "contiguous",
        documents: Sequence[int] | Tensor | None = None,
        *,
        ranks_per_node: int | None = None,
        weights: Sequence[float] | Tensor | None = None,
        continues: int | None = None,
        rank_order: Sequence[int] | None = None,
    ) -> SequenceLayout:
        """The layout that `rank` of `num_ranks` would have, without a process group: for planning and data loading."""
        for name, value in (("num_ranks", num_ranks), ("rank", rank)):
            if not is_int(value):
                raise LayoutError(f"{name} must be an int, as a process group would say it; got {described(value)}")
        if not 0 <= rank < num_ranks:
            raise LayoutError(f"rank {rank} is not one of {num_ranks} ranks (0 to {num_ranks - 1})")
        layout = cls.__new__(cls)
        layout._init(seq_len, None, num_ranks, rank, order, documents, ranks_per_node, weights, continues, rank_order)
        return layout

    @classmethod
    def from_positions(
        cls,
        position_ids: Tensor,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        order: Order = "contiguous",
        *,
        ranks_per_node: int | None = None,
        weights: Sequence[float] | Tensor | None = None,
        rank_order: Sequence[int] | None = None,
    ) -> SequenceLayout:
        """The layout of packed documents whose position ids restart, as data collators of Transformers give them.

        Args:
            position_ids: integers ``[T]`` or ``[B, T]``, of all tokens and the same on every rank. A token whose position is 0, or
                not one more than its predecessor's, starts a document; so does every row.
            group, order, ranks_per_node, weights, rank_order: as in `SequenceLayout`.

        Returns:
            The layout of the tokens as one row, ``x.flatten(0, 1).unsqueeze(0)`` of ``[B, T, ...]``: seq_len is B · T, and row ends
            are document bounds. Where that is one document, it is a layout without documents.

        Raises:
            InputError: for what is no tensor. LayoutError: for position ids that are no integers, of another number of dimensions,
                empty or without values (fake tensors); and as `SequenceLayout`.

        One host read, of one byte per token.
        """
        if breaks_graphs():
            return _from_positions_outside_graphs(position_ids, group, order, ranks_per_node, weights, rank_order)
        bounds = bounds_of_positions(position_ids)
        documents = bounds if len(bounds) > 2 else None
        ranks: dict[str, Any] = {"ranks_per_node": ranks_per_node, "weights": weights, "rank_order": rank_order}
        return cls(bounds[-1], group, order, documents, **ranks)

    def stretch(self, start: int, stop: int) -> SequenceLayout:
        """The layout of the tokens ``[start, stop)`` of this sequence by themselves, split over the same ranks.

        It is the same object for as long as anybody holds it; what layers keep in it (`cached`) goes with the last of them, so that
        a sequence of many stretches has the metadata of those in use.

        Its documents are those of the sequence, cut at both ends, and its `continues` says how many tokens of the first one stand
        before it. Stretches that follow one another, each given what the one before it returned, compute what one call on the
        whole sequence computes.

        Raises:
            LayoutError: for bounds that are no ints with 0 ≤ start < stop ≤ seq_len, and for fewer tokens than ranks.
        """
        if not (is_int(start) and is_int(stop) and 0 <= start < stop <= self.seq_len):
            raise LayoutError(
                f"stretch() takes the bounds [start, stop) of tokens of the sequence, ints from 0 to seq_len {self.seq_len}; got "
                f"{described(start)} and {described(stop)}. Cut the last stretch at the end of the sequence"
            )
        kept = self._cache.get(("stretch", start, stop))
        found: SequenceLayout | None = None if kept is None else kept()
        if found is None:
            found = self._stretch(start, stop)
            self._cache["stretch", start, stop] = weakref.ref(found)
        return found

    def _stretch(self, start: int, stop: int) -> SequenceLayout:
        bounds, before = documents_within(self.document_bounds, start, stop)
        if before == start and self.continues is not None:
            before += self.continues
        return self._with_documents(bounds if self.is_packed else None, before, stop - start)

    def continuing(self, num_tokens: int) -> SequenceLayout:
        """The layout of the same tokens as a stretch whose first document has `num_tokens` tokens before it; made once.

        Raises:
            LayoutError: for what is no int of at least 0.
        """
        check_continues(num_tokens)
        return self.cached(("continuing", num_tokens), lambda: self._with_documents(self.documents, num_tokens))

    def chunked(self, size: int) -> SequenceLayout:
        """The layout of the same tokens, with every document cut at multiples of `size` tokens from its start; made once.

        Attention inside it is the chunked attention of Llama 4: a token sees those of its own chunk. A layout all of whose
        documents are short enough is returned as it is.

        Raises:
            LayoutError: for a size that is no int of at least 1.
        """
        if not is_int(size) or size < 1:
            raise LayoutError(
                f"chunked() takes the number of tokens of a chunk, an int of at least 1; got {described(size)}. Pass what the "
                "model's config has, such as attention_chunk_size"
            )
        if breaks_graphs() and self.num_ranks > 1:
            return _chunked_outside_graphs(self, size)
        return self.cached(("chunked", size), lambda: self._cut(size))

    def _cut(self, size: int) -> SequenceLayout:
        bounds = cut_bounds(self.document_bounds, size, self.continues or 0)
        continues = None if self.continues is None else self.continues % size
        if len(bounds) == len(self.document_bounds) and continues == self.continues:
            return self
        other = self._with_documents(bounds, continues)
        # Those of this layout: a mirrored one's are not those of its length.
        other._cache["all_segments"] = tuple(
            replace(segment, starts_document=has_any(bounds[:-1], segment.start, segment.stop))
            for segment in self.all_segments
        )
        return other

    def _with_documents(
        self, bounds: Sequence[int] | None, continues: int | None, seq_len: int | None = None
    ) -> SequenceLayout:
        """A layout of so many tokens (None: as here), with these documents, over the same ranks."""
        other = type(self).__new__(type(self))
        ranks = self.group, self.num_ranks, self.rank
        length = self.seq_len if seq_len is None else seq_len
        nodes, shares = self.ranks_per_node, self.weights
        other._init(length, *ranks, self.order, bounds, nodes, shares, continues, self.rank_order)
        return other

    @_cached_property
    def mirrored(self) -> SequenceLayout:
        """The layout of the reversed sequence, each rank holding the tokens that it holds here, in reverse order.

        A rank's tokens ``x.flip(1)`` are its tokens of the mirrored sequence; what comes later here comes earlier there.
        """
        if self.continues is not None:
            raise LayoutError(
                "the mirror of a stretch of a sequence would begin behind its end: a reversed sequence is computed from its last "
                f"stretch on; got continues={self.continues}. Take the stretches of the mirrored sequence, layout.mirrored of the "
                "whole"
            )
        bounds = None if self.documents is None else [self.seq_len - bound for bound in reversed(self.documents)]
        other = self._with_documents(bounds, None)
        starts = other.document_bounds[:-1]
        # Set before it is first computed: a mirrored layout differs in nothing but who holds which segment.
        other._cache["all_segments"] = tuple(
            Segment(
                start=self.seq_len - segment.stop,
                stop=self.seq_len - segment.start,
                rank=segment.rank,
                slot=self.num_segments - 1 - segment.slot,
                starts_document=has_any(starts, self.seq_len - segment.stop, self.seq_len - segment.start),
            )
            for segment in reversed(self.all_segments)
        )
        return other

    def __copy__(self) -> SequenceLayout:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceLayout:
        # Immutable, and a process group has no copy.
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise LayoutError(
                "a layout of a process group cannot be pickled: groups belong to their process. Pickle its seq_len, order and "
                "documents and build it anew, or pickle SequenceLayout.for_rank(seq_len, num_ranks, rank)"
            )
        # What is kept for layers is made again where it is needed; only that of a mirrored layout is its own.
        kept = {key: value for key, value in self._cache.items() if key == "all_segments"}
        return vars(self) | {"_cache": kept}

    def __repr__(self) -> str:
        documents = "" if self.documents is None else f", num_documents={self.num_documents}"
        weights = "" if self.weights is None else f", weights={list(self.weights)}"
        documents += "" if self.continues is None else f", continues={self.continues}"
        as_numbered = self.rank_order == tuple(range(self.num_ranks))
        ranks = "" if as_numbered else f", rank_order={list(self.rank_order)}"
        return (
            f"SequenceLayout(seq_len={self.seq_len}, order={self.order!r}, rank={self.rank} of {self.num_ranks}, "
            f"segments={list(self.segments)}{documents}{weights}{ranks})"
        )

    @property
    def document_bounds(self) -> tuple[int, ...]:
        """Global cu_seqlens, ``(0, seq_len)`` without documents."""
        return self.documents if self.documents is not None else (0, self.seq_len)

    @_cached_property
    def all_segments(self) -> tuple[Segment, ...]:
        """Every rank's segments, in global order."""
        lengths = segment_lengths(self.seq_len, self.rank_order, self.num_segments, self.weights)
        return cut_in_segments(lengths, self.rank_order, self.document_bounds[:-1])

    def segment_numbers(self, rank: int) -> tuple[int, ...]:
        """Which of `all_segments` `rank` holds, in the order of its local tokens."""
        own = [number for number, segment in enumerate(self.all_segments) if segment.rank == rank]
        return tuple(sorted(own, key=lambda number: self.all_segments[number].slot))

    @_cached_property
    def own_segments(self) -> tuple[int, ...]:
        """Which of `all_segments` this rank holds, in the order of its local tokens."""
        return self.segment_numbers(self.rank)

    def segments_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Global ``[start, stop)`` ranges that `rank` holds, in the order of its local tokens."""
        own = [self.all_segments[number] for number in self.segment_numbers(rank)]
        return tuple((segment.start, segment.stop) for segment in own)

    @_cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Global ``[start, stop)`` ranges that this rank holds, in the order of its local tokens."""
        return self.segments_of(self.rank)

    @property
    def num_segments(self) -> int:
        """Number of segments a rank holds: 1 if contiguous, 2 if zigzag (1 where a single rank holds everything)."""
        return 2 if self.order == "zigzag" and self.num_ranks > 1 else 1

    @_cached_property
    def tokens_of(self) -> tuple[int, ...]:
        """Number of tokens that each rank holds."""
        counts = [0] * self.num_ranks
        for segment in self.all_segments:
            counts[segment.rank] += segment.num_tokens
        return tuple(counts)

    def _count_local_tokens(self) -> int:
        return tokens_of_rank(self.seq_len, self.rank, self.rank_order, self.num_segments, self.weights)

    @_cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """This rank's tokens cut at segment and document boundaries, in local order."""
        return cut_in_pieces(self.segments, self.document_bounds)

    @_cached_property
    def positions(self) -> Tensor:
        """Global position of each local token, int64 ``[T_local]`` on the CPU."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.segments])

    def positions_on(self, device: torch.device | str) -> Tensor:
        """`positions` on `device`, copied once."""
        return self.on_device("positions", device, lambda: self.positions)

    def document_positions_on(self, device: torch.device | str) -> Tensor:
        """Position of each local token inside its document, int64 ``[T_local]`` on `device`: what rotary embeddings take."""
        if torch.compiler.is_compiling() and self.num_ranks == 1:
            tokens = torch.arange(self.seq_len, device=device)
            if self.cu_seqlens is None:
                return tokens if not self.continues else tokens + self.continues
            bounds = self.cu_seqlens.to(device)
            starts = bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
            return tokens - starts if not self.continues else tokens - starts + self.continues * (starts == 0)

        def build() -> Tensor:
            return positions_in_documents(self.pieces, (-(self.continues or 0), *self.document_bounds[1:]))

        return self.on_device("document_positions", device, build)

    def document_ends_on(self, device: torch.device | str) -> Tensor:
        """Global position of the last token of each document, int64 ``[num_documents]`` on `device`, copied once."""
        return self.on_device(
            "document_ends", device, lambda: torch.tensor([stop - 1 for stop in self.document_bounds[1:]])
        )

    def on_device(self, key: Hashable, device: torch.device | str, build: Callable[[], Tensor]) -> Tensor:
        """What `build` returns, on `device`: built and copied once for this layout and `key`. A compiler does not look inside."""
        if breaks_graphs():
            return _on_device_outside_graphs(self, key, device, build)
        target = torch.device(device)
        kept = self.cached((key, target), lambda: build().to(target))
        return torch.empty(kept.shape, dtype=kept.dtype, device=target) if makes_fakes() else kept

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returns, built once for this layout and `key`: layers keep per-batch metadata here.

        It serves calls of every mode, and is built as in training: see `longspan.modes.built_for_every_mode`.
        """
        if key not in self._cache:
            with outside_modes():
                self._cache[key] = built_for_every_mode(build)
        value: T = self._cache[key]
        return value

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a global tensor.

        Args:
            x: ``[..., seq_len, ...]``, the same on every rank.
            dim: the dimension of the tokens.

        Returns:
            ``[..., T_local, ...]``. Its gradient reaches the rank's own tokens of `x` alone: sum it over the ranks, like a
            replicated parameter's.

        Raises:
            LayoutError: if `x` does not have `seq_len` tokens, for instance because it is sharded already.
            InputError: if `x` is no plain tensor, or has no dimension `dim`.
        """
        length = _length("shard()", x, dim)
        if length != self.seq_len:
            hint = (
                "It has this rank's number of tokens: it looks sharded already, and would be split twice"
                if length == self.num_local_tokens
                else "Pass all of it, or build a layout of as many tokens"
            )
            raise LayoutError(
                f"shard() takes the global sequence of {self.seq_len} tokens; got {length}, in dimension {dim} of shape "
                f"{tuple(x.shape)}. {hint}"
            )
        if self.num_ranks == 1:
            return x
        if breaks_graphs():
            return _shard_outside_graphs(self, x, dim)
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in self.segments], dim=dim)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """All ranks' tokens in global order, on every rank: the inverse of `shard`.

        Args:
            x: ``[..., T_local, ...]``, this rank's tokens; the same shape otherwise and dtype on every rank.
            dim: the dimension of the tokens.

        Returns:
            ``[..., seq_len, ...]``. Backward sums over the ranks what each of them sends back for this rank's tokens, which is
            right where a rank's loss is its own share of the loss; a loss that every rank computes whole from the gathered
            tensor must be divided by the number of ranks.

        Raises:
            LayoutError: if `x` does not have this rank's number of tokens, or the layout has ranks and no process group.
            InputError: if `x` is no plain tensor, or has no dimension `dim`.
        """
        self.check_local_length(_length("gather()", x, dim), "gather()")
        if self.num_ranks == 1:
            return x
        if breaks_graphs():
            return _gather_outside_graphs(self, x, dim)
        if has_no_values(x):
            return x.narrow(dim, 0, 1).expand(
                [self.seq_len if size == dim % x.dim() else -1 for size in range(x.dim())]
            )
        self.check_group("gather()")
        return gather_tokens(self, x, dim)

    def check_local_length(self, length: int, what: str) -> None:
        """Raise LayoutError unless `length` is this rank's number of tokens; `what` names the caller."""
        if length != self.num_local_tokens:
            hint = (
                "It has the global number of tokens: take layout.shard(x) first"
                if length == self.seq_len and self.num_ranks > 1
                else "Build a layout of as many tokens, and give every rank its own"
            )
            raise LayoutError(
                f"{what} takes the {self.num_local_tokens} tokens that rank {self.rank} of {self.num_ranks} holds of "
                f"{self.seq_len} ({self.order}); got {length}. {hint}"
            )

    def check_group(self, what: str) -> None:
        """Raise LayoutError where the layout has several ranks, and no process group that still exists; `what` names the caller."""
        agreement.check_group(self, what)

    def shard_labels(self, tokens: Tensor, ignore_index: int = -100) -> Tensor:
        """Next-token labels of this rank's tokens, shifted before the split.

        Args:
            tokens: int64 ``[B, seq_len]``, or ``[B, seq_len + 1]`` where the token that follows the sequence is known.
            ignore_index: label of a token that has no next one: the last of each document, and of a sequence of `seq_len`.

        Returns:
            int64 ``[B, T_local]``.

        Raises:
            LayoutError: for another number of tokens, such as labels that were split before the shift.
            InputError: for tokens or an ignore_index that are no integers.
        """
        return self.shard(shifted_labels(self, tokens, ignore_index))

    def verify(self) -> None:
        """Compare this layout over the ranks of its group; raise LayoutError on all of them where they differ.

        One small collective and a host synchronisation: for the start of a run or for debugging, not for every batch.
        """
        agreement.verify(self)


def _length(what: str, x: Tensor, dim: int) -> int:
    """The size of dimension `dim` of x; raises InputError where x is no plain tensor or has no such dimension."""
    check_tensor(what, "x", x)
    if not is_int(dim) or not -x.dim() <= dim < x.dim():
        raise InputError(
            f"{what}: dim must be the number of the tokens' dimension, an int; got {described(dim)} for x of shape "
            f"{tuple(x.shape)}. Tokens of [B, T, ...] are dimension 1"
        )
    return x.shape[dim]


def _plain_tensor(numbers: Sequence[int]) -> Tensor:
    """`numbers` as an int64 tensor on the CPU, usable in training whatever mode the layout is made in."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.int64)
    with outside_modes(), torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int64)


def _from_positions(
    position_ids: Tensor,
    group: dist.ProcessGroup | DeviceMesh | None,
    order: Order,
    ranks_per_node: int | None,
    weights: Sequence[float] | Tensor | None,
    rank_order: Sequence[int] | None,
) -> SequenceLayout:
    # A bound method takes no mark of the compiler's.
    ranks: dict[str, Any] = {"ranks_per_node": ranks_per_node, "weights": weights, "rank_order": rank_order}
    return SequenceLayout.from_positions(position_ids, group, order, **ranks)


_shard_outside_graphs = outside_graphs(SequenceLayout.shard)
_chunked_outside_graphs = outside_graphs(SequenceLayout.chunked)
_from_positions_outside_graphs = outside_graphs(_from_positions)
_gather_outside_graphs = outside_graphs(SequenceLayout.gather)
_on_device_outside_graphs = outside_graphs(SequenceLayout.on_device)
