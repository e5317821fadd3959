"""Train on the workers of a Ray cluster: ``python examples/launch/ray_train.py --workers 2 -- --run.dir /shared/run``.

Needs Ray Train: pip install 'longspan[ray]'. What stands after ``--`` goes to ``longspan train``. run.dir must be on a file system
that all workers share, with an absolute path: Ray's workers run in folders of their own. When a worker fails, Ray starts all of
them again, and they go on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def train(told: dict[str, Any]) -> None:
    """One worker: Ray has set its place in the environment, and made the process group."""
    from longspan.commands.train import parse_train
    from longspan.launch import StopRequest, place_of_this_process
    from longspan.train.config_checks import check
    from longspan.train.ranks import Ranks, choose_device
    from longspan.train.run import train_on

    config, _ = parse_train(told["arguments"])
    check(config)
    place = place_of_this_process()
    assert place is not None, "Ray sets RANK, WORLD_SIZE and LOCAL_RANK"
    train_on(Ranks(place, choose_device(config.parallel.device, place)), config, StopRequest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="ranks")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker, and NCCL between them")
    parser.add_argument("--failures", type=int, default=3, help="how often failed workers are started again")
    parser.add_argument("--storage", type=Path, default=Path("runs/ray"), help="where Ray keeps its own files")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of longspan train, after --")
    given = parser.parse_args()
    arguments = ["--run.go_on", "True", *(given.arguments[1:] if given.arguments[:1] == ["--"] else given.arguments)]
    ray.init(ignore_reinit_error=True)
    trainer = TorchTrainer(
        train,
        train_loop_config={"arguments": arguments},
        torch_config=TorchConfig(backend="nccl" if given.gpu else "gloo"),
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=given.gpu),
        run_config=RunConfig(
            storage_path=str(given.storage.absolute()), failure_config=FailureConfig(max_failures=given.failures)
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
