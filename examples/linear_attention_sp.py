"""A layer of gated linear attention, its sequence split over ranks, against one process: outputs and every gradient.

    torchrun --nproc-per-node 2 examples/linear_attention_sp.py

Every rank draws the same weights and the same sequence, computes its own part in parallel, and compares the whole with
what it gets alone.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import longspan

SEQ_LEN = 1001  # no multiple of anything
NUM_HEADS = 4
HEAD_DIM = 32
DIM = NUM_HEADS * HEAD_DIM


class GatedLinearAttention(nn.Module):
    """The sequence-mixing part of a block; x is [B, T, DIM], of one device or of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(DIM, DIM, bias=False)
        self.v_proj = nn.Linear(DIM, DIM, bias=False)
        self.q_proj = nn.Linear(DIM, DIM, bias=False)
        self.g_proj = nn.Linear(DIM, NUM_HEADS)
        self.o_proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, layout: longspan.SequenceLayout | None = None) -> Tensor:
        k = self.k_proj(x).unflatten(-1, (NUM_HEADS, HEAD_DIM))
        v = self.v_proj(x).unflatten(-1, (NUM_HEADS, HEAD_DIM))
        g = F.logsigmoid(self.g_proj(x))
        memory = longspan.write("simple_gla", k, v, g=g, layout=layout)  # start the exchange
        q = self.q_proj(x).unflatten(-1, (NUM_HEADS, HEAD_DIM))  # compute
        return self.o_proj(memory.read(q).flatten(-2))  # wait, and read


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    layer.zero_grad()
    return found


def main() -> None:
    has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")
    if has_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpus else "gloo")

    torch.manual_seed(0)
    layer = GatedLinearAttention().double().to(device)
    x = torch.randn(1, SEQ_LEN, DIM, dtype=torch.float64).to(device)
    target = torch.randn(1, SEQ_LEN, DIM, dtype=torch.float64).to(device)

    alone = layer(x)
    ((alone - target).square().sum() / SEQ_LEN).backward()
    expected = gradients(layer)

    layout = longspan.SequenceLayout(SEQ_LEN)
    local = layer(layout.shard(x), layout)
    # The convention: the local sum divided by the number of tokens of all ranks; then gradients are summed.
    ((local - layout.shard(target)).square().sum() / SEQ_LEN).backward()
    longspan.sum_gradients(layer)
    found = gradients(layer)

    torch.testing.assert_close(layout.gather(local), alone)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
    if dist.get_rank() == 0:
        print(f"{layout.num_ranks} ranks, {SEQ_LEN} tokens: outputs and {len(expected)} gradients equal one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
