"""`start`: the most memory of a rank while a model is made whose weights are divided, whole first or never whole."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import MEMORY_SETTINGS, Table
from longspan.launch import Place, StopRequest, place_of_this_process, run_local_ranks, run_rank
from longspan.parallel import MeshDegrees
from longspan.parallel.sharded import on_this_rank
from longspan.train.config import Config, from_mapping
from longspan.train.model import build_model, build_parallel, make_parallel
from longspan.train.ranks import Ranks

_VOCABULARY = 32_768
_MEBIBYTE = 2**20
_WAYS = ("whole first", "never whole")


def _config(dim: int, num_layers: int) -> Config:
    return from_mapping({"model": {"dim": dim, "num_layers": num_layers, "num_heads": 8, "hidden_dim": 11 * dim // 4}})


def _as_rank(way: str, dim: int, num_layers: int, out: Path) -> Callable[[Place, StopRequest], int]:
    def make(config: Config, ranks: Ranks) -> torch.nn.Module:
        if way == "never whole":
            return build_parallel(config, _VOCABULARY, ranks)
        return make_parallel(build_model(config, _VOCABULARY, ranks.device), config, ranks)

    def as_rank(place: Place, stop: StopRequest) -> int:
        ranks = Ranks.start(place, "cpu", 600.0)
        ranks.arrange(MeshDegrees(dp_shard=place.world_size))
        # What FSDP2 and its groups take is there before.
        make(_config(16, 1), ranks)
        before = _most_bytes()
        model = make(_config(dim, num_layers), ranks)
        taken = ranks.gather_numbers([_most_bytes() - before, before])
        weights = list(model.parameters())
        if ranks.is_first:
            share = sum(on_this_rank(weight).nbytes for weight in weights)
            whole = sum(4 * weight.numel() for weight in weights)
            largest = max(4 * weight.numel() for weight in weights)
            most, process = taken.max(0).values.tolist()
            out.write_text(json.dumps([whole, share, largest, most, process]))
        ranks.close()
        return 0

    return as_rank


def _most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start(quick: bool) -> Table:
    table = Table(
        "start",
        "The most memory that a rank takes to make a model whose weights are divided over the ranks, beside what its process held: "
        "every rank makes the whole model first and divides it, or divides it before it has memory",
        "no rank holds all weights: the share and the largest weight",
        [
            "ranks",
            "MiB, weights",
            "MiB, share",
            "MiB, largest",
            *(f"MiB, {way}" for way in _WAYS),
            "MiB, process before",
        ],
    )
    dim, num_layers = (128, 2) if quick else (1024, 16)
    # As a user has it: without the settings that let a timing process keep all memory.
    environment = {name: value for name, value in os.environ.items() if name not in MEMORY_SETTINGS}
    for num_ranks in (2, 4):
        found = {}
        for way in _WAYS:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "found.json"
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.start",
                    str(num_ranks),
                    way,
                    str(dim),
                    str(num_layers),
                    str(out),
                ]
                subprocess.run(command, env=environment, check=True)
                found[way] = json.loads(out.read_text())
        whole, share, largest, _, process = found["never whole"]
        sizes = (whole, share, largest, *(found[way][3] for way in _WAYS), process)
        table.add(num_ranks, *(f"{size / _MEBIBYTE:,.0f}" for size in sizes))
    return table


def main(arguments: list[str]) -> int:
    """Start the ranks that the first argument says, or be one of them."""
    num_ranks, way, dim, num_layers, out = arguments
    place = place_of_this_process()
    if place is None:
        return run_local_ranks([sys.executable, "-m", "benchmarks.start", *arguments], int(num_ranks), 1)
    return run_rank(place, _as_rank(way, int(dim), int(num_layers), Path(out)))


TABLES: dict[str, Callable[[bool], Table]] = {"start": start}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
