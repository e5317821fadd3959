"""The memory of a rank and the time of a step, for any mesh: arithmetic on the sizes of a model and the figures of a device."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from longspan.degrees import MeshDegrees
from longspan.plan.activations import (
    ModelSizes,
    block_bytes,
    gathered_bytes,
    loss_bytes,
    outside_bytes,
    state_bytes,
)
from longspan.plan.cluster import Cluster

_FLOAT32 = 4
_BUCKET_BYTES = 32 * 2**20


@dataclass(frozen=True)
class DeviceFigures:
    """What a process takes beside its tensors, and how fast it computes; stated, or measured by the caller.

    base_bytes: of the process before its first step. slack: what the allocator holds for a byte of activations, more than one where
    freed memory cannot be used again at once. flops: operations of a model's step a second, as its layers count them, but for the
    products of softmax attention. attention_flops: those a second.
    """

    base_bytes: int
    slack: float
    flops: float
    attention_flops: float


@dataclass(frozen=True)
class Operations:
    """Operations of one whole sequence, forward and backward, as the layers count them.

    attention: of queries with keys and of weights with values in softmax layers, which grow as the square of the length and reach
    another rate than the rest. rest: all others.
    """

    rest: float
    attention: float

    @property
    def total(self) -> float:
        return self.rest + self.attention

    def seconds(self, device: DeviceFigures) -> float:
        """Their time on one rank."""
        return self.rest / device.flops + self.attention / device.attention_flops


@dataclass(frozen=True)
class Step:
    """What a rank computes at once, and how often in a step.

    seq_len: N, of a whole sequence. rows: sequences of a micro batch. num_micro_batches: of a step. number_bytes: of what layers
    compute in, 2 or 4. recompute: whether layers keep their input alone. segments_per_rank: 2 in zigzag order over several ranks.
    largest_share: of a sequence, that of the rank that holds most; None where shares are equal. segment_tokens: of a segment of
    time, where sequences are computed in such; memory_every: of how many of them the memory that enters one is kept; offload:
    whether keys and values of earlier ones are in other memory than the device's; counts_first: whether all of them are computed
    once before any loss, for the balance of experts; reduce_each: whether gradients of divided weights are summed over ranks after
    each of them.
    """

    seq_len: int
    rows: int = 1
    num_micro_batches: int = 1
    number_bytes: int = 4
    recompute: bool = False
    segments_per_rank: int = 1
    largest_share: float | None = None
    segment_tokens: int | None = None
    memory_every: int = 1
    offload: bool = False
    counts_first: bool = False
    reduce_each: bool = False

    def tokens_of_rank(self, num_ranks: int) -> int:
        """Of the sequences of a micro batch, those of the rank that holds most; num_ranks: that share a sequence."""
        return self._share(self.seq_len, num_ranks)

    def tokens_at_once(self, num_ranks: int) -> int:
        """Of these, those whose activations are there at once."""
        return self._share(self.length_at_once, num_ranks)

    @property
    def length_at_once(self) -> int:
        """Of a sequence, the tokens of all ranks that are computed at once."""
        return self.seq_len if self.segment_tokens is None else min(self.segment_tokens, self.seq_len)

    @property
    def num_segments(self) -> int:
        """Of time."""
        return 1 if self.segment_tokens is None else ceil(self.seq_len / self.segment_tokens)

    @property
    def num_memories(self) -> int:
        """Segments of time whose entering memory is held at once, at most."""
        every = min(self.memory_every, self.num_segments)
        return self.num_segments if every == 1 else ceil(self.num_segments / every) + every

    @property
    def num_forward(self) -> float:
        """Forward passes over the tokens in a step, those of recomputed layers apart."""
        first = self.num_segments - (0 if self.counts_first else 1)
        every = min(self.memory_every, self.num_segments)
        # What enters the segments behind the last one that is kept is still there when backward begins.
        again = (ceil(self.num_segments / every) - 1) * (every - 1)
        return 1 + (first + again) / self.num_segments

    def _share(self, num_tokens: int, num_ranks: int) -> int:
        tokens = num_tokens / num_ranks if self.largest_share is None else num_tokens * self.largest_share
        return self.rows * ceil(tokens)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a rank, by kind, where they are most. `kinds` are what adds up to `total`, by name."""

    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def plan_memory(sizes: ModelSizes, mesh: MeshDegrees, step: Step, device: DeviceFigures) -> MemoryPlan:
    """The most memory of a rank in a step: as backward begins, or as the optimizer steps.

    As backward begins all activations are there and the loss is at its largest; gradients are not, unless micro batches have
    accumulated them. With recomputation the last layer's activations come on top of every layer's input, and the loss is gone. In
    segments of time activations are of one of them; what enters each is kept, and gradients are there as after a micro batch.
    """
    tokens = step.tokens_at_once(mesh.sp)
    own = ceil(sizes.num_parameters / mesh.size("shard"))
    fixed = {"process": device.base_bytes, "weights": own * _FLOAT32, "optimizer": 2 * own * _FLOAT32}
    states = [
        state_bytes(sizes, operator, tokens, step.number_bytes, step.segments_per_rank) for operator in sizes.operators
    ]
    layers = [block_bytes(sizes, operator, tokens, step.number_bytes) for operator in sizes.operators]
    outside = outside_bytes(sizes, tokens)
    # Matrices are cast once for forward and kept; FSDP2 brings those of one layer, and of the next, whole.
    copies = 0
    if mesh.shards_weights:
        copies = 2 * sizes.layer_parameters * step.number_bytes
    elif step.number_bytes < _FLOAT32:
        copies = sizes.matrix_parameters * step.number_bytes
    exchanged = 0
    if mesh.sp > 1:
        if "softmax" in sizes.operators:
            exchanged = gathered_bytes(sizes, step.length_at_once, step.rows, step.number_bytes)
        largest_state = max(mixer.state for mixer in sizes.mixers.values())
        exchanged = max(exchanged, (mesh.sp * step.segments_per_rank + 1) * step.rows * largest_state * _FLOAT32)
    loss = loss_bytes(sizes, tokens, step.number_bytes)
    # Summed over ranks, and divided, once a step: until then each rank has whole ones. Or after each segment: those of a layer.
    accumulated = sizes.num_parameters * _FLOAT32 if step.num_micro_batches * step.num_segments > 1 else 0
    if accumulated and step.reduce_each and mesh.shards_weights:
        accumulated = (own + sizes.layer_parameters) * _FLOAT32
    between = kept_between_segments(sizes, step, mesh.sp) if step.num_segments > 1 else 0

    def slack(num_bytes: int) -> int:
        return int(num_bytes * device.slack)

    kept = sum(layers) + outside
    held_states = sum(states)
    if step.recompute:
        inputs = len(layers) * sizes.dim * max(step.number_bytes, _FLOAT32) * tokens
        largest = max(range(len(layers)), key=lambda index: layers[index] + states[index])
        at_loss = inputs + outside + loss
        at_layer = inputs + outside + layers[largest] + states[largest]
        kept, held_states, loss = inputs + outside, 0, loss
        if at_layer > at_loss:
            kept, held_states, loss = inputs + outside + layers[largest], states[largest], 0
    backward = fixed | {
        "gradients": accumulated,
        "activations": slack(kept),
        "states": slack(held_states),
        "logits and loss": slack(loss),
        "exchange": slack(exchanged),
        "weights in use": copies,
        "between segments": between,
    }
    update = fixed | {
        "gradients": own * _FLOAT32,
        "activations": 0,
        "states": 0,
        "logits and loss": 0,
        "exchange": min(own * _FLOAT32, _BUCKET_BYTES) if mesh.world_size > 1 else 0,
        "weights in use": 0,
        "between segments": 0,
    }
    return max(MemoryPlan(backward), MemoryPlan(update), key=lambda plan: plan.total)


def kept_between_segments(sizes: ModelSizes, step: Step, num_ranks: int = 1) -> int:
    """Bytes of what enters segments of time, on a rank, as the last one ends.

    States and taps of the segments that are kept, which every rank has; keys and values of its own tokens of all but the last
    segment, with a window of those that it lets later ones see, and their gradients in float32, of the parts that are within reach.
    In host memory (`offload`) they are not counted but for two parts on their way.
    """
    mixers = [sizes.mixers[operator] for operator in sizes.operators]
    states = step.num_memories * sum(mixer.state * _FLOAT32 + mixer.halo * step.number_bytes for mixer in mixers)
    segment = step.seq_len if step.segment_tokens is None else step.segment_tokens
    part = ceil(segment / num_ranks if step.largest_share is None else segment * step.largest_share)
    num_parts = num_reached = step.num_segments - 1
    if sizes.window is not None:
        part, num_reached = min(part, sizes.window - 1), min(num_parts, ceil((sizes.window - 1) / segment))
    numbers = 2 * sizes.kv_heads * sizes.head_dim * part
    layers = sizes.operators.count("softmax")
    if step.offload:
        layers, num_parts, num_reached = min(layers, 1), 2, 2
    return step.rows * (states + layers * numbers * (num_parts * step.number_bytes + num_reached * _FLOAT32))


@dataclass(frozen=True)
class TimePlan:
    """Seconds of a step: computing, exchanging in layers as if nothing hid it, and summing or bringing weights and gradients."""

    compute: float
    exchange: float
    gradients: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.gradients


def layer_bytes(sizes: ModelSizes, mesh: MeshDegrees, step: Step) -> dict[str, int]:
    """Bytes that a rank sends in one layer of each kind, forward and backward, with all-gathers, for one micro batch or segment."""
    if mesh.sp == 1:
        return dict.fromkeys(sizes.operators, 0)
    tokens = step.tokens_at_once(mesh.sp)
    others = mesh.sp - 1
    keys = 2 * sizes.kv_heads * sizes.head_dim * tokens * step.number_bytes
    sent = {}
    for operator in dict.fromkeys(sizes.operators):
        # A delta rule sends its transitions, which are matrices, with its states; the others' are small or known.
        mixer = sizes.mixers[operator]
        states = others * (2 * mixer.state + mixer.transition) * _FLOAT32
        # A halo goes to the next segment, and its gradient back.
        halos = 2 * mixer.halo * step.number_bytes
        sent[operator] = 2 * others * keys
        if operator != "softmax":
            sent[operator] = (states + halos) * step.rows * step.segments_per_rank
    return sent


def plan_time(
    sizes: ModelSizes, mesh: MeshDegrees, step: Step, operations: Operations, device: DeviceFigures, cluster: Cluster
) -> TimePlan:
    """The time of a step. Shares that differ are taken for those of ranks that differ in speed, of which `device` is the fastest.

    Args:
        operations: of one whole sequence.
        cluster: of the mesh's ranks.
    """
    # A forward pass is a third of a step.
    factor = (step.num_forward + step.recompute + 2) / 3
    compute = factor * operations.seconds(device) * step.rows * step.num_micro_batches
    compute *= 1 / mesh.sp if step.largest_share is None else step.largest_share
    sent = layer_bytes(sizes, mesh, step)
    link = cluster.intra if mesh.sp <= cluster.ranks_per_node else cluster.inter
    exchange = 0.0
    if mesh.sp > 1:
        each = [2 * link.latency + link.bytes_seconds(sent[operator]) for operator in sizes.operators]
        exchange = sum(each) * step.num_micro_batches * step.num_segments * (step.num_forward + 1) / 2
    weights = sizes.num_parameters * _FLOAT32
    others = mesh.world_size - 1
    gradients = 0.0
    if others:
        share = mesh.size("shard")
        sums = step.num_segments * step.num_micro_batches if step.reduce_each and share > 1 else 1
        moved = sums * 2 * weights / share * (mesh.world_size / share - 1) / (mesh.world_size / share)
        if share > 1:
            passes = step.num_segments * (step.num_forward + 1) + (step.num_segments if step.reduce_each else 1)
            moved += passes * weights * (share - 1) / share * step.num_micro_batches
        gradients = cluster.slowest.latency + cluster.slowest.bytes_seconds(moved)
    return TimePlan(compute, exchange, gradients)
