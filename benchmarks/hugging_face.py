"""Layers of Transformers' models, as they are and parallelized, in one run: time and peak memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import longspan
from benchmarks.harness import (
    BESIDE_ONE_RANK,
    Paired,
    Table,
    beside_one_rank,
    in_subprocess,
    least_ratio,
    paired,
    peak_bytes,
    require_close,
    run_ranks,
    timed_alone_and_together,
    timed_pairs,
)
from longspan.integrations.transformers import layout_of

WIDTH = 256


@dataclass(frozen=True)
class Layer:
    """A backbone of one layer that is no softmax attention; its feed-forward part is small.

    quick_up_to: tokens up to which a step of Transformers' own code takes seconds; beyond, where it takes minutes, both sides are
    called once, with nothing before. runs_own: whether that code is run at all.
    """

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    quick_up_to: int = 16384
    runs_own: bool = True


_SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 1, "vocab_size": 61, "intermediate_size": 64}
_LINEAR = {"layer_types": ["linear_attention"]}
_JAMBA = {
    "attn_layer_period": 8,
    "attn_layer_offset": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "use_mamba_kernels": False,
}

LAYERS: dict[str, Layer] = {
    "Qwen3-Next: Gated DeltaNet, 4 to 8 heads of 64": Layer(
        "Qwen3NextModel",
        "Qwen3NextConfig",
        {
            **_LINEAR,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "mlp_only_layers": [0],
            "head_dim": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "Bamba: Mamba-2, 8 heads of 64, 64 states": Layer(
        "BambaModel",
        "BambaConfig",
        {
            "attn_layer_indices": [],
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_expand": 2,
            "mamba_chunk_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "MiniMax: lightning attention, 4 heads of 64": Layer(
        "MiniMaxModel",
        "MiniMaxConfig",
        {
            **_LINEAR,
            "head_dim": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 256,
        },
    ),
    "Kimi-Linear: KDA, 4 heads of 64": Layer(
        "KimiLinearModel",
        "KimiLinearConfig",
        {
            **_LINEAR,
            "linear_head_dim": 64,
            "linear_num_heads": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        quick_up_to=4096,
    ),
    "Jamba: Mamba, 128 channels, 16 states": Layer(
        "JambaModel", "JambaConfig", {**_JAMBA, "hidden_size": 64, "mamba_dt_rank": 8}, quick_up_to=1024
    ),
    # As wide as the other layers, where Transformers' own code would take most of an hour.
    "Jamba: Mamba, 512 channels, 16 states": Layer(
        "JambaModel", "JambaConfig", {**_JAMBA, "mamba_dt_rank": 16}, runs_own=False
    ),
}


def _backbone(name: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    layer = LAYERS[name]
    config = getattr(transformers, layer.config)(pad_token_id=0, **{**_SMALL, **layer.options})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, layer.model)(config)
    return model.train()


def _step(model: nn.Module, embeds: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of the sum of squares of what comes out; returns that of this rank."""

    def run() -> Tensor:
        model.zero_grad()
        hidden: Tensor = model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        hidden.square().sum().backward()
        return hidden.detach()

    return run


def _embeds(model: Any, seq_len: int) -> Tensor:
    return torch.randn(1, seq_len, model.config.hidden_size, generator=torch.Generator().manual_seed(1))


def _own_and_ours(name: str, seq_len: int, pairs: int) -> Paired:
    own, ours = _backbone(name), longspan.parallelize(_backbone(name), None)
    embeds = _embeds(own, seq_len)
    theirs, mine = _step(own, embeds), _step(ours, embeds)
    require_close(name, mine(), theirs(), 1e-3)
    return timed_pairs(theirs, mine, pairs)


def _once(name: str, seq_len: int, parallel: bool) -> tuple[float, int, Any]:
    """Seconds and peak memory of one call, the first of its process, and what comes out: for what takes minutes."""
    model = _backbone(name)
    if parallel:
        longspan.parallelize(model, None)
    step = _step(model, _embeds(model, seq_len))
    hidden: list[Tensor] = []
    begun = time.perf_counter()
    peak = peak_bytes(lambda: hidden.append(step()))
    return time.perf_counter() - begun, peak, hidden[0].numpy()


def _peak(name: str, seq_len: int, parallel: bool) -> int:
    model = _backbone(name)
    if parallel:
        longspan.parallelize(model, None)
    _step(model, _embeds(model, 256))()
    gc.collect()
    return peak_bytes(_step(model, _embeds(model, seq_len)))


def _two_ranks(name: str, seq_len: int, rounds: int) -> list[list[float]]:
    """Times of one rank alone, of both, of both with half of the tokens each and no exchange, and of both with a sequence each."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone_model = longspan.parallelize(_backbone(name), groups[dist.get_rank()])
    shared = longspan.parallelize(_backbone(name), None)
    embeds = _embeds(alone_model, seq_len)
    alone, together = _step(alone_model, embeds), _step(shared, embeds)
    half = _step(alone_model, embeds[:, : seq_len // 2].contiguous())
    hidden = together()
    whole = layout_of(shared).gather(hidden)
    if dist.get_rank() == 0:
        require_close(f"{name} over ranks", whole, alone(), 1e-3)
    return timed_alone_and_together(alone, together, half, alone, rounds=rounds)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f}"


def hugging_face(quick: bool) -> Table:
    table = Table(
        "hugging_face",
        "One layer of a Transformers model, forward + backward, B1, float32, one thread: its own PyTorch code over ours",
        "never below 1",
        ["layer", "tokens", "ms, own", "ms, ours", "times as fast", "peak MiB, own", "peak MiB, ours"],
    )
    for name, layer in LAYERS.items():
        if not layer.runs_own:
            continue
        for seq_len in (1024,) if quick else (4096, 16384):
            if seq_len > layer.quick_up_to:
                own, ours = (in_subprocess(_once, name, seq_len, parallel) for parallel in (False, True))
                require_close(name, torch.from_numpy(ours[2]), torch.from_numpy(own[2]), 1e-3)
                result, peaks = paired([own[0]], [ours[0]]), (own[1], ours[1])
            else:
                pairs = 2 if quick or seq_len > 4096 else 5
                result = in_subprocess(_own_and_ours, name, seq_len, pairs)
                peaks = tuple(in_subprocess(_peak, name, seq_len, parallel) for parallel in (False, True))
            times = (f"{result.first * 1e3:.0f}", f"{result.second * 1e3:.0f}")
            table.add(name, f"{seq_len:,}", *times, result.ratio, *map(_mebibytes, peaks))
    return table


def hugging_face_ranks(quick: bool) -> Table:
    table = Table(
        "hugging_face_ranks",
        "One layer of a Transformers model, forward + backward, B1, float32: two ranks of one thread over one rank, whose other "
        "core is idle, and over one whose other core runs a sequence of its own. "
        "Beside it two halves without exchange over the first",
        "at least 1.8 times as fast",
        ["layer", "tokens", *BESIDE_ONE_RANK, "two halves", "two halves, least", "peak MiB per rank of two"],
    )
    for name in LAYERS:
        # As many as let the table end within the hour.
        for seq_len, rounds in ((1024, 2),) if quick else ((4096, 31), (16384, 15)):
            alone, together, halves, busy = run_ranks(2, _two_ranks, name, seq_len, rounds)[0]
            peak = max(run_ranks(2, _peak, name, seq_len, True))
            of_halves = paired(alone, halves).ratio, least_ratio(alone, halves)
            table.add(name, f"{seq_len:,}", *beside_one_rank(together, alone, busy), *of_halves, _mebibytes(peak))
    return table


TABLES: dict[str, Callable[[bool], Table]] = {"hugging_face": hugging_face, "hugging_face_ranks": hugging_face_ranks}
