"""Train on the workers of a Ray cluster: ``python examples/launch/ray_train.py --workers 2 -- --run.dir /shared/run``.

Needs Ray Train: pip install 'longspan[ray]'. What stands after ``--`` goes to ``longspan train``. run.dir must be on a file system
that all workers share, and all paths must be absolute: Ray's workers run in folders of their own. When a worker fails, Ray starts
all of them again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

if TYPE_CHECKING:
    from longspan.train.config import Config


def config_of(arguments: Sequence[str]) -> Config:
    """What is trained; raises LongspanError for options that do not fit."""
    from longspan.commands.train import parse_train
    from longspan.train.config_checks import check

    config, _ = parse_train(arguments)
    check(config)
    return config


def train(told: dict[str, Any]) -> None:
    """One worker: Ray has set its place in the environment, and made the process group."""
    from longspan.launch import StopRequest, place_of_this_process, show_stacks_when_asked
    from longspan.train import run

    place = place_of_this_process()
    assert place is not None, "Ray sets RANK, WORLD_SIZE and LOCAL_RANK"
    show_stacks_when_asked(place)
    run.train(config_of(told["arguments"]), place, StopRequest())


def main() -> int:
    from longspan.errors import LongspanError

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="ranks")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker, and NCCL between them")
    parser.add_argument("--failures", type=int, default=3, help="how often failed workers are started again")
    parser.add_argument("--storage", type=Path, default=Path("runs/ray"), help="where Ray keeps its own files")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of longspan train, after --")
    given = parser.parse_args()
    arguments = ["--run.go_on", "True", *(given.arguments[1:] if given.arguments[:1] == ["--"] else given.arguments)]
    try:
        timeout_seconds = config_of(arguments).parallel.timeout_seconds
    except LongspanError as error:
        print(f"longspan: error: {error}", file=sys.stderr)
        return 2
    ray.init(ignore_reinit_error=True)
    trainer = TorchTrainer(
        train,
        train_loop_config={"arguments": arguments},
        torch_config=TorchConfig(backend="nccl" if given.gpu else "gloo", timeout_s=max(1, round(timeout_seconds))),
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(
            storage_path=str(given.storage.absolute()), failure_config=FailureConfig(max_failures=given.failures)
        ),
    )
    trainer.fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
