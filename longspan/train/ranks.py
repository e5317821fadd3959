"""The ranks of a run: who they are, on which device, and how they agree before anything irreversible.

What travels here is JSON and float64: nothing that is received is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longspan import errors
from longspan.comm.collectives import all_gather_single
from longspan.errors import ConfigError, LongspanError
from longspan.launch import Place, start_process_group
from longspan.parallel import MeshDegrees, ParallelMesh

Value = TypeVar("Value")


class Ranks:
    """All ranks of a run.

    `mesh` is None for a single rank, which has no process group; `degrees` are its sizes. `rank` counts the whole world; ranks
    with the same `dp_rank` share sequences.
    """

    def __init__(self, place: Place, device: torch.device) -> None:
        self.rank = place.rank
        self.world_size = place.world_size
        self.device = device
        self.mesh: ParallelMesh | None = None
        self.degrees = MeshDegrees(sp=place.world_size)
        self._made_group = False

    @classmethod
    def start(cls, place: Place, device: str, timeout_seconds: float, prefix: str = "parallel.") -> Ranks:
        """Choose the device and join the process group, where there is more than one rank and none was made before.

        A group that was made before, as Ray Train does, is taken, and stays as these ranks close. prefix: of what gives the device,
        in messages.

        Raises:
            ConfigError: if GPUs are asked for and there is not one for each local rank.
        """
        chosen = choose_device(device, place, prefix)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        ranks = cls(place, chosen)
        if place.world_size > 1 and not dist.is_initialized():
            start_process_group(place, "nccl" if chosen.type == "cuda" else "gloo", timeout_seconds)
            ranks._made_group = True
        return ranks

    def arrange(self, degrees: MeshDegrees) -> None:
        """Make the mesh, and the process groups that a run takes from it.

        Now, where all ranks come alike: a rank that refuses what it reads later would leave others waiting for it in a new group.
        """
        self.degrees = degrees
        if self.world_size > 1:
            self.mesh = ParallelMesh(degrees, self.device.type)
            _ = self.mesh["sp"], self.mesh["world"]
            if degrees.shards_weights:
                _ = self.mesh.weights

    def close(self) -> None:
        """Leave the process group that `start` has made, after all ranks have come here."""
        if self.world_size > 1:
            self.gather_numbers([0.0])
            if self._made_group:
                dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def dp(self) -> int:
        """Groups of ranks that compute different sequences."""
        return self.degrees.data

    @property
    def sp(self) -> int:
        """Ranks that share a sequence."""
        return self.degrees.sp

    @property
    def dp_rank(self) -> int:
        """Which of the groups this rank is in."""
        return self.degrees.coordinate(self.rank, "data")

    def gather_numbers(self, numbers: Sequence[float]) -> Tensor:
        """Every rank's numbers, float64 ``[world_size, len(numbers)]`` on the CPU."""
        own = torch.tensor(list(numbers), dtype=torch.float64, device=self.device)
        if self.world_size == 1:
            return own[None].cpu()
        return self._gather(own).cpu()

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; the values may differ in length."""
        if self.world_size == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.gather_numbers([len(content)])[:, 0]]
        padded = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        padded[: len(content)] = content.to(self.device)
        rows = self._gather(padded).cpu()
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def _gather(self, own: Tensor) -> Tensor:
        """Every rank's `own` ``[n]``, ``[world_size, n]``."""
        out = own.new_empty(self.world_size * len(own))
        all_gather_single(out, own, group=None)
        return out.view(self.world_size, len(own))

    def from_first(self, function: Callable[[], Value]) -> Value:
        """Call `function` on rank 0; every rank returns its value, which must be JSON, or raises the error that it raised."""
        outcome: dict[str, Any] = {}
        failure: LongspanError | None = None
        if self.is_first:
            try:
                outcome = {"value": function()}
            except LongspanError as error:
                failure = error
                outcome = _error_as_json(error)
        outcome = self.gather_json(outcome)[0]
        if failure is not None:
            raise failure
        if "error" in outcome:
            raise _error_from_json(outcome)
        value: Value = outcome["value"]
        return value

    def together(self, function: Callable[[], Value]) -> Value:
        """Call `function` on every rank; if it raised a LongspanError on any of them, all raise the first one."""
        outcome: dict[str, Any] = {}
        value: Value | None = None
        failure: LongspanError | None = None
        try:
            value = function()
        except LongspanError as error:
            failure = error
            outcome = _error_as_json(error)
        for rank, other in enumerate(self.gather_json(outcome)):
            if "error" in other:
                raise failure if failure is not None and rank == self.rank else _error_from_json(other)
        return value  # type: ignore[return-value]

    def agree(self, facts: dict[str, Any]) -> None:
        """Check that every rank was told the same.

        Raises:
            ConfigError: on every rank, with a table of the facts that differ.
        """
        everyone = self.gather_json(facts)
        keys = sorted({key for told in everyone for key in told})
        rows = [
            f"  {key}: " + ", ".join(f"rank {rank} {told.get(key)!r}" for rank, told in enumerate(everyone))
            for key in keys
            if any(told.get(key) != everyone[0].get(key) for told in everyone)
        ]
        if rows:
            raise ConfigError(
                "the ranks were started differently:\n" + "\n".join(rows) + "\nStart all of them with the same command"
            )


def choose_device(device: str, place: Place, prefix: str = "parallel.") -> torch.device:
    """The device of a local rank; prefix: of what gives it, in messages.

    Raises:
        ConfigError: if GPUs are asked for and there is not one for each local rank.
    """
    if device == "cpu":
        return torch.device("cpu")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_devices >= place.local_world_size:
        return torch.device("cuda", place.local_rank)
    if device == "cuda":
        raise ConfigError(
            f"{prefix}device is 'cuda', but there are {num_devices} usable GPUs for {place.local_world_size} local "
            f"ranks. Start fewer ranks, or use {prefix}device 'cpu'"
        )
    return torch.device("cpu")


def _error_as_json(error: LongspanError) -> dict[str, str]:
    return {"error": type(error).__name__, "message": str(error)}


def _error_from_json(outcome: dict[str, str]) -> LongspanError:
    kind: type[LongspanError] = getattr(errors, outcome["error"], LongspanError)
    return kind(outcome["message"])
