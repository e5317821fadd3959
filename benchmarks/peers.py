"""Linear attention against the PyTorch code of Transformers, in one run: time and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Table, in_subprocess, peak_bytes, require_close, timed_pairs
from benchmarks.linear import HEADS, make_tensors, step


class _One(nn.Module):
    """An output gate that is open, and costs nothing but the product."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_full((1,), 40.0)


def _transformers_gated_delta_rule(tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    leaves = [tensors[name] for name in ("q", "k", "v", "g", "beta")]

    def run() -> Tensor:
        o: Tensor = torch_chunk_gated_delta_rule(*leaves, chunk_size=64)[0]
        torch.autograd.grad(o, leaves, tensors["grad"])
        return o

    return run


def _transformers_lightning(tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The loop of MiniMax's lightning layer, with its projections, activation, norm and gate taken out."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    size = tensors["q"].shape[-1]
    config = MiniMaxConfig(
        hidden_size=HEADS * size,
        num_attention_heads=HEADS,
        head_dim=size,
        num_hidden_layers=2,
        layer_types=["linear_attention", "linear_attention"],
    )
    layer: Any = MiniMaxLightningAttention(config, 0)
    layer.act_fn = nn.Identity()
    layer.qkv_proj = layer.norm = layer.out_proj = nn.Identity()
    layer.output_gate = _One()
    # Its decays are the layer's own: ours take the same.
    tensors["log_decay"] = -layer.slope_rate.flatten().detach()
    leaves = [tensors[name] for name in "qkv"]

    def run() -> Tensor:
        packed = torch.cat(leaves, dim=-1).flatten(2)
        o: Tensor = layer(packed, position_embeddings=None, attention_mask=None)[0].unflatten(-1, (HEADS, size))
        torch.autograd.grad(o, leaves, tensors["grad"])
        return o

    return run


PEERS = {
    "gated_delta_rule": ("torch_chunk_gated_delta_rule", _transformers_gated_delta_rule),
    "retention": ("the loop of MiniMax's lightning layer", _transformers_lightning),
}


def _sides(operator: str, seq_len: int, size: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    tensors = make_tensors(seq_len, size, torch.float32, operator)
    _, make_peer = PEERS[operator]
    peer = make_peer(tensors)
    scale = size**-0.5 if operator == "gated_delta_rule" else 1.0
    return step(operator, tensors, scale=scale), peer


def _peak_of_side(operator: str, seq_len: int, size: int, side: int) -> int:
    _sides(operator, 512, size)[side]()
    return peak_bytes(_sides(operator, seq_len, size)[side])


def peers(quick: bool) -> Table:
    import transformers

    seq_len = 2048 if quick else 8192
    table = Table(
        "peers",
        f"Against Transformers {transformers.__version__}, forward + backward, {seq_len:,} tokens, B1 H8, one thread, float32",
        "at least 3 times as fast, at most half the peak memory (of outputs, gradients and what is in between)",
        ["operator", "peer", "K = V", "ms", "ms, peer", "times as fast", "MiB", "MiB, peer", "memory"],
    )
    torch.set_num_threads(1)
    for operator, (peer_name, _) in PEERS.items():
        for size in (64, 128):
            ours, theirs = _sides(operator, seq_len, size)
            require_close(f"{operator} and {peer_name}", ours(), theirs(), 1e-3)
            result = timed_pairs(theirs, ours, 3 if quick else 5)
            peaks = [in_subprocess(_peak_of_side, operator, seq_len, size, side) for side in (0, 1)]
            table.add(
                operator,
                peer_name,
                size,
                *result.cells(second_first=True),
                *(f"{peak / 2**20:.0f}" for peak in peaks),
                f"{peaks[0] / peaks[1]:.2f}",
            )
    return table


TABLES = {"peers": peers}
