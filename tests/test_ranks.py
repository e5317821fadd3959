"""The helper that runs a function on several ranks keeps what it promises."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import longspan
from tests.compare import worst
from tests.ranks import RankError, raised, run_on_ranks


def _rank_and_sum(offset: float) -> tuple[int, int, float]:
    total = torch.tensor([offset + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def _process_id() -> int:
    return os.getpid()


def _threads_and_debug_level() -> tuple[int, str]:
    return torch.get_num_threads(), dist.get_debug_level().name


def _values_of_all_kinds(given: torch.Tensor) -> dict[str, object]:
    leaf = torch.arange(3.0, requires_grad=True)
    return {
        "none": None,
        "given": given,
        "bfloat16": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16) + dist.get_rank(),
        "view": torch.arange(12, dtype=torch.int64).view(3, 4).t()[1:3],
        "not a leaf": leaf * 2,
        "nested": [({"a": torch.ones(2, dtype=torch.float64)},)],
    }


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("this rank has no key")


def _raise_on_while_others_wait(rank: int) -> None:
    _raise_on(rank)
    dist.barrier()


def _raise_everywhere() -> None:
    raise ValueError(f"rank {dist.get_rank()} refuses")


def _sleep_on(rank: int, seconds: float) -> None:
    if dist.get_rank() == rank:
        time.sleep(seconds)


def _die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(17)
    dist.barrier()


def _gather_different_shapes() -> list[torch.Tensor]:
    mine = torch.zeros(2, 3) if dist.get_rank() == 0 else torch.zeros(3, 2)
    outputs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(outputs, mine)
    return outputs


def _different_collectives() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.zeros(4))
    else:
        dist.broadcast(torch.zeros(4), src=0)


def _warn() -> None:
    warnings.warn("a rank warns", UserWarning, stacklevel=1)


def _listening_addresses() -> list[str]:
    """Local addresses (hexadecimal, as the kernel prints them) of this process's listening TCP sockets."""
    inodes = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(entry.path))
        except OSError:
            continue  # the descriptor of the listing itself
    addresses = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    addresses.append(fields[1].rpartition(":")[0])
    return addresses


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_values_come_back_by_rank(num_ranks: int) -> None:
    total = sum(0.5 + rank for rank in range(num_ranks))
    assert run_on_ranks(num_ranks, _rank_and_sum, 0.5) == [(rank, num_ranks, total) for rank in range(num_ranks)]


def test_calls_reuse_the_processes() -> None:
    first = run_on_ranks(2, _process_id)
    assert run_on_ranks(2, _process_id) == first
    assert len({*first, os.getpid()}) == 3


def test_ranks_use_one_thread_and_the_detail_debug_level() -> None:
    assert run_on_ranks(2, _threads_and_debug_level) == [(1, "DETAIL")] * 2


def test_tensors_come_back_intact() -> None:
    given = torch.randn(3, 2, dtype=torch.float64)
    for rank, values in enumerate(run_on_ranks(2, _values_of_all_kinds, given)):
        assert values["none"] is None
        assert torch.equal(values["given"], given)
        expected = torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16) + rank
        torch.testing.assert_close(values["bfloat16"], expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(values["view"], torch.arange(12).view(3, 4).t()[1:3])
        assert torch.equal(values["not a leaf"], torch.tensor([0.0, 2.0, 4.0]))
        assert torch.equal(values["nested"][0][0]["a"], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("function", [_raise_on, _raise_on_while_others_wait])
def test_an_exception_on_one_rank_names_that_rank(function) -> None:
    with pytest.raises(RankError, match="failed on ranks \\[1\\] of 2") as caught:
        run_on_ranks(2, function, 1)
    assert set(caught.value.errors) == {1}
    failure = caught.value.errors[1]
    assert failure.type_name == "KeyError"
    assert "this rank has no key" in failure.message
    assert "in _raise_on" in failure.traceback
    assert "in _raise_on" in str(caught.value)


def test_exceptions_on_all_ranks_are_all_reported() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(3, _raise_everywhere)
    assert {rank: failure.message for rank, failure in caught.value.errors.items()} == {
        rank: f"rank {rank} refuses" for rank in range(3)
    }


def test_an_expected_error_keeps_the_ranks() -> None:
    before = run_on_ranks(2, _process_id)
    assert run_on_ranks(2, raised, _raise_everywhere) == [("ValueError", f"rank {rank} refuses") for rank in range(2)]
    assert run_on_ranks(2, _process_id) == before


def test_an_expected_error_that_does_not_come_is_a_failure() -> None:
    with pytest.raises(RankError, match="_process_id raised nothing"):
        run_on_ranks(2, raised, _process_id)


def test_a_hang_hits_the_deadline_and_the_next_call_works() -> None:
    before = run_on_ranks(2, _process_id)
    with pytest.raises(RankError, match="out of time on ranks \\[1\\] of 2") as caught:
        run_on_ranks(2, _sleep_on, 1, 600.0, timeout=1.0)
    assert caught.value.errors[1].type_name == "TimeoutError"
    assert "in _sleep_on" in caught.value.errors[1].traceback
    after = run_on_ranks(2, _process_id)
    assert not set(before) & set(after)
    for process_id in before:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(2, _die_on, 0)
    assert caught.value.errors[0].type_name == "ProcessDied"
    assert "17" in caught.value.errors[0].message


@pytest.mark.parametrize("function", [_gather_different_shapes, _different_collectives])
def test_collectives_that_do_not_match_raise_on_every_rank(function) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(2, function)
    assert set(caught.value.errors) == {0, 1}
    assert all(failure.type_name == "RuntimeError" for failure in caught.value.errors.values())


def test_ranks_follow_the_warning_filters_of_the_test() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_on_ranks(2, _warn) == [None, None]
        warnings.simplefilter("error")
        assert run_on_ranks(2, raised, _warn) == [("UserWarning", "a rank warns")] * 2


@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="reads Linux's table of sockets")
def test_ranks_listen_on_loopback_alone() -> None:
    for addresses in run_on_ranks(2, _listening_addresses):
        assert addresses, "a gloo rank listens somewhere"
        # 127.0.0.1 and ::1, in the byte order of the table.
        assert set(addresses) <= {"0100007F", "00000000000000000000000001000000"}


def test_a_function_that_ranks_cannot_import_is_refused() -> None:
    def function() -> None: ...

    function.__module__ = "__main__"
    with pytest.raises(ValueError, match="defined in __main__"):
        run_on_ranks(2, function)


def _gloo_threads_after_an_exchange_in_a_new_group() -> int:
    layout = longspan.SequenceLayout(8, dist.new_group(list(range(dist.get_world_size()))))
    q = torch.randn(1, 4, 2, 3, requires_grad=True)
    o = longspan.linear_attention(q, q, q, layout=layout, exchange="all_to_all")
    assert isinstance(o, torch.Tensor)
    o.sum().backward()
    return sum("gloo" in name.read_text() for name in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the system does not list threads")
def test_groups_that_tests_make_do_not_pile_up() -> None:
    counts = [worst(run_on_ranks(2, _gloo_threads_after_an_exchange_in_a_new_group)) for _ in range(16)]
    # A call makes a group, and those of its exchange beside it: after a few calls the ranks leave all of them.
    assert worst(counts[8:]) <= worst(counts[:8])


def _state_of(process_id: int) -> str:
    """The letter of proc(5): T where it is stopped; nothing where it is gone, or waits for its parent to notice that it is."""
    try:
        letter = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if letter == "Z" else letter


def _becomes(process_ids: list[int], state: str) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if all(_state_of(process_id) == state for process_id in process_ids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="ranks rest where the system ends them with their parent")
def test_ranks_rest_between_calls() -> None:
    first, second = run_on_ranks(2, _process_id), run_on_ranks(3, _process_id)
    assert _becomes([*first, *second], "T")
    assert run_on_ranks(2, _process_id) == first


# That ranks rest runs in make test, above.
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ranks rest where the system ends them with their parent")
def test_ranks_that_rest_end_with_a_killed_test_run() -> None:
    lines = [
        "import os, signal",
        "from tests import ranks",
        # Of what ranks may need they need nothing here.
        "ranks.PRELOADED[:] = ['torch.distributed']",
        "from tests.ranks import run_on_ranks",
        "from tests.test_ranks import _process_id",
        "print(*run_on_ranks(2, _process_id), flush=True)",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ]
    script = "; ".join(lines)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    ranks = [int(word) for word in done.stdout.split()]
    assert len(ranks) == 2
    assert _becomes(ranks, "")


def _compute(seconds: float) -> None:
    begun = time.process_time()
    while time.process_time() - begun < seconds:
        pass


def test_a_rank_that_computes_is_not_taken_for_one_that_hangs() -> None:
    assert run_on_ranks(2, _compute, 1.3, timeout=1.0) == [None, None]
