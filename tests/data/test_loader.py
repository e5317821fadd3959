"""Batches are made ahead, in order, and what goes wrong with one is said where it is taken."""

from __future__ import annotations

import threading

import pytest

from longspan.data import loader as loader_module
from longspan.data.loader import Loader
from longspan.errors import DataError


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "longspan-loader"]


def test_batches_come_in_order_and_are_made_ahead_of_their_step() -> None:
    made: list[int] = []
    two_more = threading.Semaphore(0)

    def make(step: int) -> int:
        made.append(step)
        two_more.release()
        return step * step

    with Loader(make, 3, 9, ahead=2) as loader:
        for step in range(3, 9):
            for _ in range(2 if step == 3 else int(step < 8)):
                assert two_more.acquire(timeout=60)
            # The next one is there, or being made, before this one is taken; no other.
            assert made == list(range(3, min(step + 2, 9)))
            assert loader.take() == step * step
        assert loader.wait() < 60 and not loader.has_failed
    assert threads() == []


def test_waiting_is_counted() -> None:
    go = threading.Event()

    def make(step: int) -> int:
        assert go.wait(60)
        return step

    with Loader(make, 0, 1) as loader:
        threading.Timer(0.2, go.set).start()
        assert loader.wait() > 0.1
        assert loader.wait() < 0.1
        assert loader.take() == 0


def test_an_error_reaches_whoever_takes_the_batch_and_not_those_before() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise DataError("byte 17 is bad")
        return step

    with Loader(make, 0, 5) as loader:
        for step in range(2):
            loader.wait()
            assert not loader.has_failed
            assert loader.take() == step
        loader.wait()
        assert loader.has_failed
        for _ in range(2):
            with pytest.raises(DataError, match="byte 17 is bad"):
                loader.take()
    assert threads() == []


def test_a_batch_that_does_not_come_is_given_up() -> None:
    go = threading.Event()

    def make(step: int) -> int:
        assert go.wait(60)
        return step

    with Loader(make, 6, 8, timeout_seconds=0.1) as loader:
        with pytest.raises(DataError, match=r"the batch of step 7 was not there after 0\.1 s of reading"):
            loader.take()
        go.set()
    assert threads() == []


def test_a_batch_that_was_given_up_stays_so_when_it_comes_late() -> None:
    """All ranks have been told that it is not there, and stop: this one must not go on."""
    go, came = threading.Event(), threading.Event()

    def make(step: int) -> int:
        assert step or go.wait(60)
        if step:
            came.set()
        return step

    with Loader(make, 0, 3, timeout_seconds=0.1) as loader:
        loader.wait()
        assert loader.has_failed
        go.set()
        assert came.wait(60)
        assert loader.has_failed
        with pytest.raises(DataError, match="step 1 was not there"):
            loader.check()


def test_a_read_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_SECONDS_TO_END", 0.05)
    go = threading.Event()
    with (
        pytest.raises(DataError, match="was not there"),
        Loader(lambda step: go.wait(60), 0, 8, timeout_seconds=0.05) as loader,
    ):
        loader.take()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "longspan-loader")
    assert thread.daemon
    go.set()
    thread.join(60)
    assert threads() == []


def test_no_thread_outlives_a_run_that_fails() -> None:
    with pytest.raises(RuntimeError, match="elsewhere"), Loader(lambda step: step, 0, 100):
        assert threads() == ["longspan-loader"]
        raise RuntimeError("elsewhere")
    assert threads() == []
