"""``longspan bench exchange``: each topology's time on these ranks, beside what the cost model says.

Every result is first compared with the scan of all pairs on one process; a topology whose result is wrong is not timed: the command
ends with an error. A time runs from a moment when all ranks are ready until the last rank has what it waits for; nothing is
computed meanwhile, so that nothing hides the exchange.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.background import run_beside
from longspan.commands.bench_options import BenchExchange
from longspan.commands.bench_report import BenchFigures, Measured, print_figures, write_json
from longspan.commands.options import parse_options, refuse
from longspan.errors import LongspanError
from longspan.exchange import TOPOLOGIES, Auto, Carrier, Priced, by_cost, record_traffic
from longspan.exchange.auto.figures import figures_of
from longspan.exchange.auto.timing import RankClock
from longspan.exchange.auto.trial import exchange_seconds
from longspan.exchange.problem import problem_of
from longspan.launch import (
    EXIT_DONE,
    Place,
    StopRequest,
    place_of_this_process,
    run_local_ranks,
    run_rank,
    start_process_group,
)
from longspan.layout import SequenceLayout, group_of
from longspan.ops.variants import VARIANTS
from longspan.state import Dense, Identity, Pair, exclusive_scan, exclusive_scan_adjoint

TOLERANCES = {False: 1e-5, True: 5e-2}
"""Largest error of a state or gradient beside the largest value, in float32 and with states rounded to bfloat16 at every hop. A
missing or doubled term shows as 0.1 or more."""

_SEGMENT_TOKENS = 4


_DESCRIPTION = """Measure each topology's exchange of states, forward and backward, beside what the cost model says.

Starts its own ranks on this machine, or uses those of torchrun. Results are checked first; nothing hides the exchange.
"""


class WrongResultError(LongspanError):
    """A topology does not compute the scan."""


def run(arguments: Sequence[str]) -> int:
    """Measure as the arguments ask, on ranks that are started here or on torchrun's, and return the exit code."""
    options = parse_options(BenchExchange, "bench exchange", _DESCRIPTION, arguments)
    try:
        place = place_of_this_process()
        options.check(options.ranks if place is None else place.world_size)
    except LongspanError as error:
        return refuse(error)
    if place is None:
        command = [sys.executable, "-m", "longspan", "bench", "exchange", *arguments]
        return run_local_ranks(command, options.ranks, options.threads)

    def as_rank(place: Place, stop: StopRequest) -> int:
        return bench_exchange(options, place)

    return run_rank(place, as_rank)


def bench_exchange(options: BenchExchange, place: Place) -> int:
    """Measure as one rank and return the exit code; the first rank prints.

    Raises:
        ConfigError: for options that do not fit, on every rank.
        WrongResultError: on every rank, if a topology's result is wrong.
    """
    options.check(place.world_size)
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    start_process_group(place, "nccl" if options.device == "cuda" else "gloo", options.timeout_seconds)
    figures = measure(options, device)
    if place.rank == 0:
        print_figures(figures)
        if options.json is not None:
            write_json(figures, options.json)
    _meet(device)
    dist.destroy_process_group()
    return EXIT_DONE


@dataclass(frozen=True)
class _Case:
    """What is exchanged: pairs of this rank's segments, the gradients sent back, and the right results of both."""

    layout: SequenceLayout
    pair: Pair
    grad: Tensor
    incoming: Tensor
    outgoing: Tensor


@dataclass(frozen=True)
class _Sent:
    """Of the rank that sends most forward, and of the one that sends most backward, together."""

    bytes_sent: int
    num_messages: int


def measure(options: BenchExchange, device: torch.device) -> BenchFigures:
    """All figures, on the ranks of the default process group; see `bench_exchange`."""
    case = _make_case(options, device)
    state_dtype = torch.bfloat16 if options.bfloat16 else None
    cluster = figures_of(case.layout, device).cluster
    choice = Auto(state_dtype, measure=True).choose(case.pair, case.layout)
    problem = problem_of(case.pair, case.layout, state_dtype)

    def priced(name: str) -> Priced:
        if name == "auto":
            return choice
        return by_cost([TOPOLOGIES[name](state_dtype)], problem, cluster)[0]

    modelled = {name: priced(name) for name in dict.fromkeys(options.topologies)}
    carriers = {name: each.topology.resolve(case.pair, case.layout) for name, each in modelled.items()}
    sent = {name: _sent_if_right(name, carrier, case, options.bfloat16) for name, carrier in carriers.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in carriers}
    names = list(carriers)
    ranks = RankClock(case.layout, device)
    for repeat in range(options.repeats):
        # In another order each time, so that none always follows the same one.
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            times[name].append(exchange_seconds(carriers[name], case.pair, case.grad, ranks))
    rows = [
        Measured(
            topology=name,
            forward_seconds=statistics.median(forward for forward, _ in times[name]),
            backward_seconds=statistics.median(backward for _, backward in times[name]),
            seconds=statistics.median(map(sum, times[name])),
            low_seconds=min(map(sum, times[name])),
            high_seconds=max(map(sum, times[name])),
            bytes_sent=sent[name].bytes_sent,
            num_messages=sent[name].num_messages,
            modelled=modelled[name].cost,
        )
        for name in names
    ]
    return BenchFigures(options, dist.get_world_size(), str(cluster), choice.topology.name, rows)


def _make_case(options: BenchExchange, device: torch.device) -> _Case:
    num_ranks = dist.get_world_size()
    num_segments = num_ranks * (2 if options.order == "zigzag" else 1)
    layout = SequenceLayout(_SEGMENT_TOKENS * num_segments, order=options.order, ranks_per_node=options.ranks_per_node)
    kind = VARIANTS[options.operator].transition
    shape = (num_segments, options.batch_size, options.heads, options.key_size, options.value_size)
    # The same on every rank: each computes by itself what is right.
    random = torch.Generator().manual_seed(0)
    states, grads = (torch.randn(shape, generator=random) for _ in range(2))
    if issubclass(kind, Dense):
        # Of norm about 1, so that the products of many neither vanish nor grow.
        parameter = torch.randn(kind.parameter_shape(shape), generator=random) / options.key_size**0.5
    else:
        parameter = -torch.rand(kind.parameter_shape(shape), generator=random)
        if options.log_decay is not None and not issubclass(kind, Identity):
            parameter.fill_(options.log_decay)
    transition = kind(parameter).cut([segment.starts_document for segment in layout.all_segments])
    own = list(layout.own_segments)
    incoming = exclusive_scan(Pair(transition, states))[own]
    outgoing = exclusive_scan_adjoint(transition, grads)[own]
    own_parameter = transition.parameter if kind.is_known else transition.parameter[own]
    pair = Pair(kind(own_parameter.to(device)), states[own].to(device))
    return _Case(layout, pair, grads[own].to(device), incoming.to(device), outgoing.to(device))


def _run(carrier: Carrier, case: _Case) -> tuple[Tensor, Tensor]:
    """S_in and λ of this rank's segments."""
    arrived = carrier.start(case.pair, case.layout).wait()
    kind = type(case.pair.transition)
    return arrived.incoming, carrier.start_reverse(kind, arrived.context, case.grad, case.layout).wait()


def _sent_if_right(name: str, carrier: Carrier, case: _Case, bfloat16: bool) -> _Sent:
    """What is sent; raises WrongResultError unless the topology is right on every rank."""
    with record_traffic() as traffic:
        results = _run(carrier, case)
        # A rank that has nothing to wait for may not have sent yet.
        run_beside(group_of(case.layout), case.pair.state.device, lambda _: None).wait()
    expected = (case.incoming, case.outgoing)
    errors = [
        float((got - right).abs().max() / right.abs().max().clamp_min(1.0))
        for got, right in zip(results, expected, strict=True)
    ]
    # NaN compares with nothing, and must not pass a maximum unseen.
    wrong = [float(not error <= TOLERANCES[bfloat16]) for error in errors]
    phases = [traffic.of_phase("forward"), traffic.of_phase("backward")]
    counted = [float(count) for phase in phases for count in (phase.bytes_sent, phase.num_messages)]
    forward, backward, *most = RankClock(case.layout, case.pair.state.device).largest([*wrong, *counted])
    if forward or backward:
        raise WrongResultError(
            f"{name} does not compute the scan {'forward' if forward else 'backward'} (on this rank, errors of {errors[0]:.1e} "
            f"forward and {errors[1]:.1e} backward beside the largest value); no figure is reported. Leave it out of "
            "topologies, and please report it"
        )
    return _Sent(int(most[0] + most[2]), int(most[1] + most[3]))


def _meet(device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device))
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
