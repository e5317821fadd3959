"""Work beside the main thread: it runs on while the caller computes, in order, and what goes wrong reaches the one who waits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.comm.background import run_beside
from longspan.comm.groups import kept, new_group_beside
from longspan.comm.traffic import record_traffic
from tests.ranks import raised, run_on_ranks

CPU = torch.device("cpu")
PROJECT_ROOT = Path(__file__).resolve().parents[2]


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def sum_beside_sums() -> list[float]:
    """Collectives of the work and of the main thread: rank 0 does the work's first, the others the main thread's."""
    rank = dist.get_rank()

    def work(group: dist.ProcessGroup) -> Tensor:
        total = torch.tensor([float(rank)])
        dist.all_reduce(total, group=group)
        return total

    task = run_beside(world(), CPU, work)
    if rank == 0:
        task.wait()
    own = torch.tensor([1.0])
    dist.all_reduce(own)
    return [task.wait().item(), own.item()]


def test_collectives_of_the_work_and_of_the_main_thread_do_not_mix() -> None:
    assert run_on_ranks(3, sum_beside_sums) == [[3.0, 3.0]] * 3


def results_in_order() -> list[Any]:
    log: list[int] = []

    def work(number: int) -> Callable[[dist.ProcessGroup], int]:
        def note(group: dist.ProcessGroup) -> int:
            log.append(number)
            return number

        return note

    tasks = [run_beside(world(), CPU, work(number)) for number in range(5)]
    values = [task.wait() for task in reversed(tasks)]
    return [log, values, threading.current_thread() is threading.main_thread()]


def test_works_run_in_the_order_of_the_calls_and_may_be_waited_for_in_any() -> None:
    assert run_on_ranks(2, results_in_order) == [[[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], True]] * 2


def progress_without_waiting() -> list[str]:
    """What happens while the main thread does nothing for the exchange."""
    rank = dist.get_rank()
    log: list[str] = []
    arrived = threading.Event()

    def work(group: dist.ProcessGroup) -> Tensor:
        x = torch.ones(1)
        if rank == 1:
            dist.recv(x, group=group, group_src=0)
            log.append("received")
        if rank == 0:
            log.append("sent")
            dist.send(x, group=group, group_dst=1)
        arrived.set()
        return x

    task = run_beside(world(), CPU, work, "messages")
    assert arrived.wait(30)
    log.append("waits")
    task.wait()
    return log


def test_several_steps_are_done_before_anyone_waits() -> None:
    assert run_on_ranks(2, progress_without_waiting) == [["sent", "waits"], ["received", "waits"]]


def modes_of_the_work() -> tuple[bool, torch.dtype, str]:
    x = torch.ones(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = run_beside(world(), CPU, lambda group: x @ x).wait()
        return product.requires_grad, product.dtype, str((x @ x).dtype)


def test_the_work_keeps_no_graph_and_computes_in_the_dtype_of_the_states_under_autocast() -> None:
    assert run_on_ranks(2, modes_of_the_work) == [(False, torch.float32, "torch.bfloat16")] * 2


def groups_that_works_see() -> list[bool]:
    seen = [run_beside(world(), CPU, lambda group: group).wait() for _ in range(2)]
    seen += [run_beside(world(), CPU, lambda group: group, "messages").wait() for _ in range(2)]
    names = [group.group_name for group in seen]
    return [names[0] == names[1], names[2] == names[3], len({names[0], names[2], world().group_name}) == 3]


def test_groups_are_made_once_apart_for_collectives_and_messages() -> None:
    assert run_on_ranks(3, groups_that_works_see) == [[True] * 3] * 3


def collectives_after_unequal_messages() -> float:
    rank = dist.get_rank()

    def message(group: dist.ProcessGroup) -> None:
        x = torch.ones(1)
        if rank == 0:
            dist.send(x, group=group, group_dst=1)
        if rank == 1:
            dist.recv(x, group=group, group_src=0)

    def collective(group: dist.ProcessGroup) -> Tensor:
        total = torch.ones(1)
        dist.all_reduce(total, group=group)
        return total

    run_beside(world(), CPU, message, "messages").wait()
    return run_beside(world(), CPU, collective).wait().item()


def test_unequal_counts_of_messages_are_not_taken_for_a_mismatch_of_collectives() -> None:
    assert run_on_ranks(3, collectives_after_unequal_messages) == [3.0] * 3


def failures() -> list[Any]:
    group = dist.new_group()
    assert isinstance(group, dist.ProcessGroup)

    def fail(group: dist.ProcessGroup) -> None:
        raise ValueError("the work went wrong")

    begun = threading.Event()

    def wait(group: dist.ProcessGroup) -> None:
        begun.wait()

    # The first is under way until the others have been begun.
    run_beside(group, CPU, wait)
    first, second = run_beside(group, CPU, fail), run_beside(group, CPU, lambda group: 1)
    begun.set()
    told = [raised(first.wait), raised(first.wait), raised(second.wait)]
    return [*told, run_beside(group, CPU, lambda group: 1).wait()]


def test_what_the_work_raises_is_raised_where_it_is_waited_for_and_by_works_begun_before() -> None:
    wrong = ("ValueError", "the work went wrong")
    later = "ExchangeError", "an earlier exchange of this process group failed: the work went wrong"
    for *errors, after in run_on_ranks(2, failures):
        assert errors == [wrong, wrong, later]
        assert after == 1


def waiting_time() -> float:
    with record_traffic() as traffic:
        run_beside(world(), CPU, lambda group: time.sleep(0.05)).wait()
    return traffic.wait_seconds


def test_the_time_spent_in_wait_counts_as_waiting() -> None:
    assert all(seconds > 0 for seconds in run_on_ranks(2, waiting_time))


def things_kept() -> list[Any]:
    made: list[str] = []
    groups: list[Any] = [dist.new_group() for _ in range(2)]

    def build(name: str) -> Callable[[], str]:
        def make() -> str:
            made.append(name)
            return name

        return make

    got = [kept(groups[0], "x", build("a")), kept(groups[0], "x", build("b")), kept(groups[1], "x", build("c"))]
    return [made, got]


def test_what_is_kept_is_built_once_a_group_and_key() -> None:
    assert run_on_ranks(2, things_kept) == [[["a", "c"], ["a", "a", "c"]]] * 2


def group_beside() -> list[Any]:
    # Of all ranks, for the timeout.
    parent = dist.new_group(timeout=timedelta(seconds=77))
    assert isinstance(parent, dist.ProcessGroup)
    made = new_group_beside(parent, [0, 2] if dist.get_rank() in (0, 2) else [1, 3])
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total, group=made)
    options = made._get_backend(CPU).options
    return [dist.get_process_group_ranks(made), total.item(), options._timeout.total_seconds()]


def test_a_group_beside_has_the_members_asked_for_and_the_timeout_of_its_group() -> None:
    even, odd = [[0, 2], 2.0, 77.0], [[1, 3], 4.0, 77.0]
    assert run_on_ranks(4, group_beside) == [even, odd, even, odd]


def groups_of_unequal_ranks() -> list[int]:
    world = dist.group.WORLD
    assert world is not None
    more = new_group_beside(world, [1, 2]) if dist.get_rank() in (1, 2) else None
    made = [new_group_beside(world, [0, 1] if dist.get_rank() < 2 else [2, 3]) for _ in range(2)]
    total = torch.tensor([dist.get_rank()])
    for group in made:
        dist.all_reduce(total, group=group)
    if more is not None:
        # Else it could be closed while the other rank still connects to it.
        dist.barrier(more)
        dist.destroy_process_group(more)
    return [int(total), len({group.group_name for group in made})]


def test_a_group_beside_may_join_ranks_that_are_in_unequal_numbers_of_groups() -> None:
    assert run_on_ranks(4, groups_of_unequal_ranks) == [[2, 2], [2, 2], [10, 2], [10, 2]]


# A process that stands alone, because it ends or its peer does.
TWO_PROCESSES = """
    import os, sys, threading, time
    import torch, torch.distributed as dist
    from longspan.comm.background import run_beside

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
    world = dist.group.WORLD

    def receive(group):
        x = torch.zeros(1)
        dist.recv(x, group=group, group_src=1 - rank)
        return x

    run_beside(world, torch.device("cpu"), lambda group: None, "messages").wait()
    dist.barrier()
"""


def run_two(tmp_path: Path, code: str) -> list[tuple[int, str]]:
    script = tmp_path / "two.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES) + textwrap.dedent(code))
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def test_a_rank_that_dies_is_an_error_where_its_message_is_waited_for(tmp_path: Path) -> None:
    code = """
        if rank == 1:
            os._exit(7)
        try:
            run_beside(world, torch.device("cpu"), receive, "messages").wait()
        except RuntimeError as error:
            print("told:", type(error).__name__)
            os._exit(0)
    """
    (survivor, output), (dead, _) = run_two(tmp_path, code)
    assert dead == 7
    assert survivor == 0, output
    assert "told:" in output


def test_a_process_ends_although_its_work_still_waits_for_a_message(tmp_path: Path) -> None:
    code = """
        begun = threading.Event()
        task = run_beside(world, torch.device("cpu"), lambda group: (begun.set(), receive(group)), "messages")
        begun.wait()
        print("ends")
    """
    for code_, output in run_two(tmp_path, code):
        assert code_ == 0, output
        assert "ends" in output


# That threads do not pile up runs in make test, in `tests/test_ranks.py`.
@pytest.mark.slow
def test_the_thread_ends_with_its_group(tmp_path: Path) -> None:
    code = """
        def threads():
            return [thread for thread in threading.enumerate() if thread.name.startswith("longspan")]

        (thread,) = threads()
        del world
        dist.destroy_process_group()
        thread.join(20)
        print("threads left:", len(threads()))
    """
    for code_, output in run_two(tmp_path, code):
        assert code_ == 0, output
        assert "threads left: 0" in output
