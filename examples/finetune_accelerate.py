"""A loop with Accelerate, its sequences shared by ranks.

torchrun --nproc-per-node 2 examples/finetune_accelerate.py
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from small import model_and_rows, parser
from torch.utils.data import DataLoader

import longspan
from longspan.integrations.transformers import SequenceParallelConfig


def main() -> None:
    arguments = parser(__doc__).parse_args()
    model, rows = model_and_rows(arguments)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=2,
        parallelism_config=SequenceParallelConfig(cp_size=arguments.ranks_per_sequence),
    )
    # Ranks that share sequences are given the same batches by Accelerate's loaders, and the model splits them.
    mesh = accelerator.torch_device_mesh
    if mesh is not None:
        longspan.parallelize(model, mesh["cp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data: Any = rows
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=1))

    for step, batch in zip(range(2 * arguments.steps), loader, strict=False):
        with accelerator.accumulate(model):
            loss = model(**batch, use_cache=False).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        # The average over all ranks is the loss.
        average = accelerator.reduce(loss.detach(), "mean")
        if step % 10 == 0:
            accelerator.print(f"batch {step}: loss {average.item():.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
