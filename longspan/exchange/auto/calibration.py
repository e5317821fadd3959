"""Measuring what the cost model needs to know of a process group: its links, and how fast its ranks fold states.

Once per group and kind of device, in a fraction of a second (about one on links of 100 Mbit/s), on the process groups that
exchanges use. One pair of ranks stands for all links of a kind: ranks 0 and 1 for those inside a node, the first ranks of the
first two nodes for those between nodes. The figures are the same on every rank, so that all decide alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.background import run_beside
from longspan.comm.collectives import all_gather_single
from longspan.comm.groups import keep, peek
from longspan.comm.hosts import nodes_of
from longspan.comm.traffic import unrecorded
from longspan.errors import LayoutError
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.chain import Chain
from longspan.layout import SequenceLayout, group_of
from longspan.plan import Cluster, Link, LinkMatrix
from longspan.state import ChannelDecay, Dense, Pair, Transition, exclusive_scan

_log = logging.getLogger("longspan")

# Payloads grow fourfold until one takes this long: long beside what a message costs whatever its size, and short for a start.
_ENOUGH_SECONDS = 0.03
_SMALLEST, _LARGEST = 2**16, 2**22
# All ranks at once then send what takes about this long, up to a state of common size: networks that let a burst pass before they
# slow down would show a rate that no exchange of states has.
_AT_ONCE_SECONDS = 0.05
_LARGEST_AT_ONCE = 2**20
# Of what an all-gather leaves on a rank.
_LARGEST_GATHERED = 2**26
_WORD_REPEATS, _ROW_REPEATS, _PAYLOAD_REPEATS = 15, 3, 2
_TOGETHER_REPEATS, _FOLD_REPEATS = 3, 5
_MESSAGES_IN_A_ROW = 16
_BLOCKS = 8


def measured_cluster(layout: SequenceLayout, device: torch.device, ranks_per_node: int) -> Cluster:
    """The `Cluster` that the ranks of a layout make, measured now; equal on all ranks.

    Collective: every rank of the group calls this, in the same order among its exchanges.
    """
    # Exchanges that are still under way are counted.
    run_beside(group_of(layout), device, lambda _: None).wait()
    with unrecorded():
        return _measure(layout, device, ranks_per_node)


def measured_links(layout: SequenceLayout, device: torch.device | str = "cpu") -> LinkMatrix:
    """The latency and bandwidth of a message from every rank of a layout to every other, measured pair by pair; equal on all ranks.

    layout: of two ranks or more; its tokens do not matter. P · (P − 1) pairs one after another, while all other ranks are silent;
    each takes about 0.1 s, on slow links some times as long as 64 KiB do. ``Auto(measure=True)`` knows them from then on.

    Collective: every rank of the group calls this, in the same order among its exchanges.
    """
    ranks = RankClock(layout, torch.device(device))
    num_ranks = layout.num_ranks
    # Of a rank to itself nothing is asked.
    latency, bandwidth = ([[1.0] * num_ranks for _ in range(num_ranks)] for _ in range(2))
    # Exchanges that are still under way are counted.
    run_beside(group_of(layout), ranks.device, lambda _: None).wait()
    with unrecorded():
        for source, target in permutations(range(num_ranks), 2):
            found, _, payload, seconds = ranks.messages(_pair(ranks, source, target))
            latency[source][target], bandwidth[source][target] = found, payload / _rest(seconds, found)
    links = LinkMatrix(tuple(map(tuple, latency)), tuple(map(tuple, bandwidth)))
    take_links(layout, ranks.device, links)
    if layout.rank == 0:
        _log.info("measured the links of %d ranks pair by pair: %s", num_ranks, links)
    return links


def known_links(layout: SequenceLayout, device: torch.device) -> LinkMatrix | None:
    """The links of a layout's process group if they have been measured, or taken; numbered as its ranks are. Measures nothing."""
    links: LinkMatrix | None = peek(group_of(layout), ("links", device.type))
    return links


def take_links(layout: SequenceLayout, device: torch.device, links: LinkMatrix) -> None:
    """Give a process group its links, which `Auto(measure=True)` then counts by; every rank gives the same."""
    keep(group_of(layout), ("links", device.type), links)


def ranks_per_node_of(layout: SequenceLayout) -> int:
    """As in `nodes_of`; 1 where hosts make no equal nodes: then every link is taken for one between nodes."""
    if layout.ranks_per_node is not None:
        return layout.ranks_per_node
    try:
        return nodes_of(group_of(layout)).ranks_per_node
    except LayoutError:
        return 1


def _measure(layout: SequenceLayout, device: torch.device, ranks_per_node: int) -> Cluster:
    begun = time.perf_counter()
    if layout.rank == 0:
        _log.info(
            "measures the links of %d ranks and how fast they fold states, once for the process group", layout.num_ranks
        )
    ranks = RankClock(layout, device)
    num_ranks, rank = layout.num_ranks, layout.rank
    links: list[Link] = []
    if ranks_per_node > 1:
        first = rank - rank % ranks_per_node
        around_node = first + (rank + 1) % ranks_per_node, first + (rank - 1) % ranks_per_node
        links.append(_measure_link(ranks, 1, *around_node))
    if ranks_per_node < num_ranks:
        along_rail = (rank + ranks_per_node) % num_ranks, (rank - ranks_per_node) % num_ranks
        links.append(_measure_link(ranks, ranks_per_node, *along_rail))
    gather, swap = _measure_collectives(ranks, links[-1])
    hop, block = _measure_chain(ranks, ranks_per_node)
    folds = _measure_folds(ranks)
    # A kind of link that the ranks do not have is never asked for.
    cluster = Cluster(
        num_ranks,
        ranks_per_node,
        intra=links[0],
        inter=links[-1],
        fold_latency=folds.latency,
        fold_bandwidth=folds.bandwidth,
        matmul_rate=folds.matmul_rate,
        fold_sharing=folds.sharing,
        gather=gather,
        swap=swap,
        hop=hop,
        block=block,
    )
    if rank == 0:
        _log.info("measured the ranks in %.2f s: %s", time.perf_counter() - begun, cluster)
    return cluster


def _measure_link(ranks: RankClock, distance: int, target: int, source: int) -> Link:
    """The kind of link between ranks 0 and `distance`; `target`, `source`: whom this rank sends to and hears at once with all."""
    latency, gap, payload, payload_seconds = ranks.messages(_pair(ranks, 0, distance))
    bandwidth = payload / _rest(payload_seconds, latency)
    size = _size_at_once(bandwidth)

    sent, received = _bytes(size, ranks.device), _bytes(size, ranks.device)

    def pass_on(group: dist.ProcessGroup) -> None:
        operations = [
            dist.P2POp(dist.irecv, received, group=group, group_peer=source),
            dist.P2POp(dist.isend, sent, group=group, group_peer=target),
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    seconds = ranks.beside(pass_on, _TOGETHER_REPEATS, "messages")
    return Link(latency, bandwidth, gap, sharing=max(1.0, (seconds - latency) * bandwidth / size))


def _pair(ranks: RankClock, source: int, target: int) -> Callable[[dist.ProcessGroup], list[float]]:
    """What every rank does while two of them measure the link from one to the other: what `_lead` returns, or zeros."""

    def work(group: dist.ProcessGroup) -> list[float]:
        if ranks.layout.rank == source:
            return _lead(ranks, group, target)
        if ranks.layout.rank == target:
            _follow(ranks, group, source)
        return [0.0] * 4

    return work


def _lead(ranks: RankClock, group: dist.ProcessGroup, other: int) -> list[float]:
    """Latency, gap, and a payload with its seconds, as measured by the one of two ranks that starts; `_follow` is the other."""
    word = _bytes(4, ranks.device)

    def there_and_back(x: Tensor, times: int = 1) -> None:
        for work in [dist.isend(x, group=group, group_dst=other) for _ in range(times)]:
            _finish(work)
        dist.recv(word, group=group, group_src=other)

    latency = ranks.alone(partial(there_and_back, word), _WORD_REPEATS) / 2
    row = ranks.alone(partial(there_and_back, word, _MESSAGES_IN_A_ROW), _ROW_REPEATS)
    gap = min(max(0.0, row - 2 * latency) / (_MESSAGES_IN_A_ROW - 1), latency)
    size = _SMALLEST
    while True:
        payload = _bytes(size, ranks.device)
        seconds = ranks.alone(partial(there_and_back, payload), _PAYLOAD_REPEATS) - latency
        is_last = seconds >= _ENOUGH_SECONDS or size >= _LARGEST
        dist.send(torch.tensor([float(not is_last)], device=ranks.device), group=group, group_dst=other)
        if is_last:
            return [latency, gap, float(size), seconds]
        size *= 4


def _follow(ranks: RankClock, group: dist.ProcessGroup, leader: int) -> None:
    word = _bytes(4, ranks.device)

    def answer(x: Tensor, exchanges: int, times: int = 1) -> None:
        for _ in range(exchanges):
            for work in [dist.irecv(torch.empty_like(x), group=group, group_src=leader) for _ in range(times)]:
                _finish(work)
            dist.send(word, group=group, group_dst=leader)

    answer(word, 1 + _WORD_REPEATS)
    answer(word, 1 + _ROW_REPEATS, _MESSAGES_IN_A_ROW)
    size, goes_on = _SMALLEST, torch.ones(1, device=ranks.device)
    while bool(goes_on):
        answer(_bytes(size, ranks.device), 1 + _PAYLOAD_REPEATS)
        dist.recv(goes_on, group=group, group_src=leader)
        size *= 4


def _size_at_once(bandwidth: float) -> int:
    return int(min(max(bandwidth * _AT_ONCE_SECONDS, _SMALLEST), _LARGEST_AT_ONCE))


def _finish(work: dist.Work | None) -> None:
    # None is what a rank outside the group gets.
    assert work is not None
    work.wait()


def _bytes(size: int, device: torch.device) -> Tensor:
    return torch.zeros(size // 4, device=device)


def _measure_collectives(ranks: RankClock, link: Link) -> tuple[Link, Link]:
    """A step of an all-gather, and an all-to-all, of all ranks; `link` tells how large a payload takes long enough."""
    num_ranks = ranks.layout.num_ranks
    others = num_ranks - 1
    # To each other rank: in an all-to-all a part of what a rank sends, in a step of an all-gather all of it.
    part = max(4, _size_at_once(link.bandwidth) // others)
    whole = int(
        min(max(link.bandwidth * _AT_ONCE_SECONDS / others, part), _LARGEST_AT_ONCE, _LARGEST_GATHERED / others)
    )

    def gather(words: int) -> float:
        own = torch.zeros(words, device=ranks.device)
        all_of_them = own.new_empty(words * num_ranks)
        return ranks.beside(lambda group: all_gather_single(all_of_them, own, group), _TOGETHER_REPEATS)

    def swap(words: int) -> float:
        sent = torch.zeros(words * num_ranks, device=ranks.device)
        received = torch.empty_like(sent)
        return ranks.beside(lambda group: dist.all_to_all_single(received, sent, group=group), _TOGETHER_REPEATS)

    small_gather, large_gather, small_swap, large_swap = gather(1), gather(whole // 4), swap(1), swap(part // 4)
    return (
        Link(small_gather / others, whole * others / _rest(large_gather, small_gather)),
        Link(small_swap, part * others / _rest(large_swap, small_swap)),
    )


def _measure_chain(ranks: RankClock, ranks_per_node: int) -> tuple[float, float]:
    """Seconds of a hop, and seconds between blocks that follow each other, for states so small that their size does not matter."""
    num_ranks = ranks.layout.num_ranks
    layout = SequenceLayout(num_ranks, ranks.layout.group, ranks_per_node=ranks_per_node)
    states = torch.zeros(1, 1, 1, 4, _BLOCKS, device=ranks.device)
    pair = Pair(ChannelDecay(torch.zeros(1, 1, 1, 4, device=ranks.device)), states)

    def seconds(num_blocks: int) -> float:
        chain = Chain("measurement", None, num_blocks)
        # All begin together; the last rank is done when the chain is.
        return ranks.together(lambda: chain.start(pair, layout).wait(), _TOGETHER_REPEATS)

    whole, blocks = seconds(1), seconds(_BLOCKS)
    return whole / (num_ranks - 1), max(0.0, blocks - whole) / (_BLOCKS - 1)


@dataclass(frozen=True)
class _Folds:
    """As the fields of `Cluster`."""

    latency: float
    bandwidth: float
    matmul_rate: float
    sharing: float


def _measure_folds(ranks: RankClock) -> _Folds:
    small, decay, dense = (4, 1, 1, 4, 4), (4, 1, 16, 128, 128), (4, 1, 4, 128, 128)

    def alone(group: dist.ProcessGroup) -> list[float]:
        if ranks.layout.rank != 0:
            return [0.0] * 3
        return [_fold_seconds(ranks, *fold) for fold in ((ChannelDecay, small), (ChannelDecay, decay), (Dense, dense))]

    latency, decay_seconds, dense_seconds = ranks.collectives(alone)
    at_once = ranks.together(_folds_of(ranks, ChannelDecay, decay), _FOLD_REPEATS) / (decay[0] - 1)
    bandwidth = 4 * prod(decay[1:]) / _rest(decay_seconds, latency)
    flops = 2 * prod(dense[1:]) * dense[3]
    products = _rest(dense_seconds, latency + 4 * prod(dense[1:]) / bandwidth)
    return _Folds(latency, bandwidth, flops / products, max(1.0, at_once / decay_seconds))


def _fold_seconds(ranks: RankClock, kind: type[Transition], shape: tuple[int, ...]) -> float:
    """Seconds of one fold of states ``[n, B, H, K, V]``, in a scan of n, on this rank."""
    return ranks.alone(_folds_of(ranks, kind, shape), _FOLD_REPEATS) / (shape[0] - 1)


def _folds_of(ranks: RankClock, kind: type[Transition], shape: tuple[int, ...]) -> Callable[[], object]:
    """A scan of states ``[n, B, H, K, V]``, which takes n − 1 folds."""
    states = torch.zeros(shape, device=ranks.device)
    pair = Pair(kind(torch.zeros(kind.parameter_shape(shape), device=ranks.device)), states)
    return lambda: exclusive_scan(pair)


def _rest(seconds: float, part: float) -> float:
    """A time less a part that was measured at another, perhaps slower moment: at least a tenth of the time."""
    return max(seconds - part, 0.1 * seconds)
