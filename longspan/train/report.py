"""What a run says on the terminal: a progress bar, or a line now and then where there is no terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 60.0


class _Console(Console):
    """Says nothing more, and lets the run go on, once its terminal or pipe has gone."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # What is still in Python's buffer would fail again as the process ends.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())

    @contextlib.contextmanager
    def outliving_its_terminal(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.on_broken_pipe()


class Report:
    """Prints on rank 0, and nothing on the others.

    With a terminal the steps are a progress bar; without one, every `print_every`-th step is a line. Both say how long is left.
    """

    def __init__(self, num_steps: int, print_every: int, silent: bool) -> None:
        self._console = _Console(quiet=silent, highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._print_every = print_every
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                console=self._console,
            )
        self._task: Any = None
        self._num_made = 0
        self._start = self._said = time.perf_counter()

    def heading(self, name: str, text: str) -> None:
        """A line of what the run consists of."""
        with self._console.outliving_its_terminal():
            self._console.print(f"[bold]{name:<11}[/bold]", end="")
            self._console.print(text, markup=False)

    def line(self, text: str) -> None:
        """A line of text as it is."""
        with self._console.outliving_its_terminal():
            self._console.print(text, markup=False)

    def __enter__(self) -> Report:
        self._start = self._said = time.perf_counter()
        if self._bar is not None:
            with self._console.outliving_its_terminal():
                self._bar.start()
            self._task = self._bar.add_task("", total=self._num_steps, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with self._console.outliving_its_terminal():
                self._bar.stop()

    def within_step(self, step: int, share: float, where: str) -> None:
        """Show how much of a long step is done: in the bar, or without a terminal in a line each minute."""
        if self._bar is not None:
            self._bar.update(self._task, numbers=f"step {step}: {share:.0%}, {where}")
        elif time.perf_counter() - self._said > _SECONDS_BETWEEN_LINES:
            elapsed = time.perf_counter() - self._start
            self.line(
                f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {share:.0%}, {where}  {elapsed:.0f} s"
            )
            self._said = time.perf_counter()

    def step(self, record: dict[str, Any]) -> None:
        """Show a step: loss, tokens per second, share of time waiting for other ranks, peak memory, the fullest expert."""
        numbers = (
            f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tokens/s  "
            f"waiting {record['wait_share']:.0%}  {record['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        if "fullest_expert" in record:
            numbers += f"  fullest expert {record['fullest_expert']:.1f}x"
        step = record["step"]
        self._num_made += 1
        self._said = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._print_every == 0 or step in (1, self._num_steps):
            elapsed = time.perf_counter() - self._start
            left = elapsed / self._num_made * (self._num_steps - step)
            until = f", {left:.0f} s left" if step < self._num_steps else ""
            self.line(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  {numbers}  {elapsed:.0f} s{until}")
