"""One rank of `benchmarks.cluster.Cluster.call`: calls the function that it finds in a folder, and leaves the value there."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    folder = Path(sys.argv[1])
    function, args = pickle.loads((folder / "call").read_bytes())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    value = function(*args)
    (folder / f"value-{dist.get_rank()}").write_bytes(pickle.dumps(value))
    # A rank that has left takes the store, or its end of a connection, with it.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
