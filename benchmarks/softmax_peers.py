"""Other code for softmax attention over ranks, in the form that `benchmarks.softmax_sides` times.

Both take what a rank of ours takes, [B, T, H, D] of its own tokens, and give the output and the gradients of q, k and v. Nothing
of theirs is changed; what they need around them to run on gloo and a CPU stands here.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.softmax_sides import Setting, Side, Step, Tensors
from longspan.layout import SequenceLayout


def deepspeed_ulysses(tensors: Tensors, layout: SequenceLayout, setting: Setting) -> Step:
    """DeepSpeed's `DistributedAttention` (arXiv 2309.14509) around `scaled_dot_product_attention`; contiguous shards."""
    # Read when it is imported; without, it asks the machine for accelerators.
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm
    from deepspeed.sequence.layer import DistributedAttention

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # No operators of its own: it would compile an all-reduce in shared memory for minutes, which attention never calls.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.comm.init_distributed("gloo", verbose=False)
    attention = DistributedAttention(_Local(setting.causal), _everyone(), scatter_idx=2, gather_idx=1)
    leaves = [tensors.q, tensors.k, tensors.v]

    def run() -> tuple[Tensor, ...]:
        o: Tensor = attention(*leaves, 0)
        return (o, *torch.autograd.grad(o, leaves, tensors.grad))

    return run


class _Local(nn.Module):
    """Attention of all tokens on a rank's heads."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2)


def torch_ring(rotation: str, tensors: Tensors, layout: SequenceLayout, setting: Setting) -> Step:
    """The loop of PyTorch's experimental context parallelism, given the CPU's flash operators.

    Its dispatcher knows CUDA's operators only, but the loop takes the operator as an argument. `rotation` is its own name for how
    keys travel: ``"ALL_TO_ALL"`` is a ring, ``"ALL_GATHER"`` (its default) gathers once in forward and once in backward; gradients
    of keys go round a ring in both. Balanced where the layout is zigzag.
    """
    from torch.distributed.tensor.experimental._context_parallel import _attention

    leaves = [tensors.q, tensors.k, tensors.v]
    options = _attention._cp_options
    balanced = layout.order == "zigzag"

    def run() -> tuple[Tensor, ...]:
        # Its options are global, and sides with others run in between.
        options.enable_load_balance = balanced
        options.rotate_method = _attention._RotateMethod[rotation]
        o: Tensor = _TorchRing.apply(*(x.transpose(1, 2) for x in leaves), setting.causal).transpose(1, 2)
        return (o, *torch.autograd.grad(o, leaves, tensors.grad))

    return run


class _TorchRing(torch.autograd.Function):
    """q, k, v and o are [B, H, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = _attention._templated_ring_attention(_everyone(), 2, operator, q, k, v, is_causal=causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        q, k, v, out, lse = ctx.saved_tensors
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = _attention._templated_ring_attention_backward(
            _everyone(), 2, operator, grad_out, "grad_out", q, k, v, out, lse, ctx.causal, dropout_p=0.0
        )
        return dq, dk, dv, None


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def unavailable(side: Side) -> str | None:
    """Why a peer cannot be run here, or None."""
    package = "deepspeed" if side.kind == "ulysses" else "torch.distributed.tensor.experimental._context_parallel"
    if importlib.util.find_spec(package) is None:
        remedy = "install the extra `bench`" if package == "deepspeed" else f"torch {torch.__version__} has none"
        return f"not run: {remedy}"
    return None


PEERS = (
    Side("DeepSpeed DistributedAttention", "ulysses", "contiguous", deepspeed_ulysses),
    Side("torch ring", "ring", "zigzag", partial(torch_ring, "ALL_TO_ALL")),
    Side("torch ring", "ring", "contiguous", partial(torch_ring, "ALL_TO_ALL")),
    Side("torch ring, gathering", "all_gather", "zigzag", partial(torch_ring, "ALL_GATHER")),
    Side("torch ring, gathering", "all_gather", "contiguous", partial(torch_ring, "ALL_GATHER")),
)
