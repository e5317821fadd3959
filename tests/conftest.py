"""What every test shares: one thread per process, as on the ranks; Triton's interpreter; random numbers; the ranks
end with the session."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch

from tests.ranks import PRELOADED, stop_ranks
from tests.slow_rows import NOT_SLOW, mark_slow_rows


def pytest_configure(config: pytest.Config) -> None:
    # Tests are small: a second thread costs more than it brings, and takes the core from the ranks.
    torch.set_num_threads(1)
    # Read when the kernels are first imported, here and on the ranks.
    os.environ["TRITON_INTERPRET"] = "1"
    # Under nohup, or in the background of a shell, these signals are ignored, and so they would be by processes that tests start
    # and send them to: what is ignored is inherited, a handler is not.
    for number in (signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    # One more than cores: tests wait for processes to start, and for time to pass.
    return 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Before those marked slow are left out.
    unused = mark_slow_rows(items)
    config.stash[NOT_SLOW] = [item.nodeid for item in items if item.get_closest_marker("slow") is None]
    if unused and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(f"slow_rows names what no row of the test matches: {', '.join(unused)}")


def pytest_collection_finish(session: pytest.Session) -> None:
    # Ranks need it in two folders alone, and take seconds to load it.
    if any(name in item.nodeid for item in session.items for name in ("transformers/", "models/hf/")):
        PRELOADED.append("transformers.models.llama.modeling_llama")
    # Modules and tests stay: the collector need not look through them, each time that it runs.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws without a seed of its own does not depend on the tests that this worker ran before."""
    torch.manual_seed(0)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    stop_ranks()
