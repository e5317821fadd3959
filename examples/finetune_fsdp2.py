"""A plain loop: sequences shared by ranks, and the model sharded by FSDP2 over all of them; nobody sets a divisor.

torchrun --nproc-per-node 2 examples/finetune_fsdp2.py
torchrun --nproc-per-node 4 examples/finetune_fsdp2.py --ranks-per-sequence 2
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from small import model_and_rows, parser
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import longspan


def main() -> None:
    arguments = parser(__doc__).parse_args()
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpus else "gloo")
    replicas = dist.get_world_size() // arguments.ranks_per_sequence
    mesh = init_device_mesh(device.type, (replicas, arguments.ranks_per_sequence), mesh_dim_names=("dp", "cp"))

    model, rows = model_and_rows(arguments)
    model.to(device)
    longspan.parallelize(model, mesh["cp"])
    over_all = mesh["dp", "cp"]._flatten("dp_cp")
    for layer in model.model.layers:
        fully_shard(layer, mesh=over_all)
    fully_shard(model, mesh=over_all)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    # Each replica has batches of its own, and its ranks all have the same: that is the rank and the number to give a
    # DistributedSampler, DistributedSampler(rows, num_replicas=replicas, rank=mesh["dp"].get_local_rank()).
    own = rows[mesh["dp"].get_local_rank() :: replicas]
    for step, row in zip(range(arguments.steps), own, strict=False):
        batch = {name: values[None].to(device) for name, values in row.items()}
        loss = model(**batch).loss  # averaged over all ranks it is the loss, and so are its gradients
        loss.backward()
        sharded: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = sharded.full_tensor().item()
        optimizer.step()
        optimizer.zero_grad()
        average = loss.detach() / dist.get_world_size()
        dist.all_reduce(average)
        if step % 5 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {average.item():.4f}, norm {norm:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
