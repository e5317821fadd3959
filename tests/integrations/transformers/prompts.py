"""What a prompt leaves in a cache, of one process and of ranks, and the tokens that follow it: what tests of prefill compare."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import longspan
from longspan.integrations.transformers.structure import is_of_fla
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FAMILIES, VOCABULARY, build
from tests.integrations.transformers.reference import Wide
from tests.integrations.transformers.test_rotary import options_of
from tests.ranks import run_on_ranks

TOLERANCE = 1e-12
NUM_TOKENS = 29
NUM_NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}

FEW = ("qwen3", "deepseek_v3", "lfm2", "minimax", "qwen3_next", "kimi_linear", "zamba2", "mamba2", "recurrent_gemma")
"""A family for each kind of memory: windows, latents, convolutions, states, states of modules, and their mixtures."""


# RWKV keeps what it remembers in a list of its own.
WITH_CACHE = [name for name in FAMILIES if name != "rwkv"]


def prompt(rows: int = 2, length: int = NUM_TOKENS) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(9))


def name_of_cache(model: nn.Module) -> str:
    takes = inspect.signature(type(model).forward).parameters
    return "cache_params" if "cache_params" in takes else "past_key_values"


def empty_cache(model: Any) -> Any:
    """What ``generate`` and models make."""
    if is_of_fla(model):
        return import_module("fla.models.utils").Cache()
    from transformers import DynamicCache
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    return MiniMaxCache() if model.config.model_type == "minimax" else DynamicCache(config=model.config)


def tensors_of(cache: Any, model: nn.Module) -> dict[str, Tensor]:
    """Everything that a model remembers, by name: in its cache and on its modules."""
    found: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        for name in ("keys", "values"):
            found[f"{index} {name}"] = getattr(layer, name, None)
        if hasattr(layer, "cumulative_length"):
            found[f"{index} length"] = torch.tensor([layer.cumulative_length])
        for name in ("conv_states", "recurrent_states"):
            found |= {f"{index} {name} {key}": value for key, value in getattr(layer, name, {}).items()}
        for key, value in getattr(layer, "has_previous_state", {}).items():
            found[f"{index} previous {key}"] = torch.tensor([value])
        found |= of_fla(layer, index)
    found |= {f"{index} linear": value for index, value in enumerate(getattr(cache, "linear_cache", ()))}
    found |= tensors_on_modules(model)
    return {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}


def of_fla(layer: Any, index: int) -> dict[str, Tensor]:
    """What a layer of flash-linear-attention's cache holds."""
    found: dict[str, Tensor] = {}
    for name, value in (getattr(layer, "state", None) or {}).items():
        parts = value if isinstance(value, tuple) else (value,)
        found |= {f"{index} {name} {type(value).__name__} {number}": part for number, part in enumerate(parts)}
    if found:
        found[f"{index} length"] = torch.tensor([layer.get_seq_length()])
        found[f"{index} window"] = torch.tensor([layer.window_size or 0, layer.is_sliding])
    return found


def tensors_on_modules(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path} {name}": value
        for path, module in model.named_modules()
        for name in ("conv1d_state", "recurrent_states")
        if isinstance(value := module.__dict__.get(name), Tensor)
    }


def continued(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Greedy tokens behind `ids`, whose last is not in the cache yet, in the way that docs/transformers_generation.md says."""
    name = name_of_cache(model)
    if name == "cache_params":
        tokens = model.generate(ids[:, -1:], cache_params=cache, **GREEDY)
    elif model.config.model_type == "minimax":
        positions = torch.tensor([[ids.shape[1] - 1]])
        tokens = model.generate(ids[:, -1:], past_key_values=cache, position_ids=positions, **GREEDY)
    else:
        tokens = model.generate(ids, past_key_values=cache, **GREEDY)
    new: Tensor = tokens[:, -NUM_NEW:]
    return new


@dataclass(frozen=True)
class Memory:
    """What is left of a prompt: the last token's logits ``[B, V]``, all memory by name, and the tokens that follow it."""

    logits: Tensor
    tensors: dict[str, Tensor]
    following: Tensor


def built(name: str, rope: str | None) -> nn.Module:
    return build(name, **({} if rope is None else options_of(rope)))


@functools.lru_cache(maxsize=4)
def expected(name: str, rope: str | None = None) -> Memory:
    """In one process, by the unmodified model: the whole prompt at once, and continued from all but its last token."""
    model: Any = built(name, rope)
    ids = prompt()
    with Wide(), torch.no_grad():
        cache = empty_cache(model)
        logits = model(ids, use_cache=True, **{name_of_cache(model): cache}).logits[:, -1]
        tensors = tensors_of(cache, model)
        cache = empty_cache(model)
        model(ids[:, :-1], use_cache=True, **{name_of_cache(model): cache})
        return Memory(logits, tensors, continued(model, cache, ids))


def of_ranks(
    name: str, order: Order, to: Any, rope: str | None, segment_tokens: int | None = None
) -> tuple[int, Memory | None]:
    """The rank that has the last token, and what this rank has of a prompt's memory."""
    model: Any = longspan.parallelize(built(name, rope), None, order=order)
    ids = prompt()
    with Wide():
        cache, logits, rank = longspan.prefill(model, ids, to=to, segment_tokens=segment_tokens)
        assert (cache is None) == (logits is None)
        found = None
        if cache is not None:
            assert type(cache) is type(empty_cache(model))
            found = tensors_of(cache, model)
        cache = longspan.prefill(model, ids[:, :-1], to=to, segment_tokens=segment_tokens).cache
        if cache is None:
            assert not tensors_on_modules(model)
            return rank, None
        assert found is not None
        assert logits is not None
        return rank, Memory(logits, found, continued(model, cache, ids))


def check(
    name: str, num_ranks: int, order: Order, to: str, rope: str | None = None, segment_tokens: int | None = None
) -> None:
    found = run_on_ranks(num_ranks, of_ranks, name, order, to, rope, segment_tokens)
    compare(expected(name, rope), found, name, order, to)


def compare(want: Memory, found: list[tuple[int, Memory | None]], name: str, order: Order, to: str) -> None:
    num_ranks = len(found)
    last = 0 if order == "zigzag" else num_ranks - 1
    for rank, (owner, got) in enumerate(found):
        assert owner == last
        if to == "last" and rank != owner:
            assert got is None
            continue
        assert got is not None
        error, what = worst_of(errors_of(got, want))
        assert error < TOLERANCE, f"{name} on rank {rank} of {num_ranks}: {what} is off by {error:.1e}"


def errors_of(got: Memory, want: Memory) -> dict[str, float]:
    """Errors of the logits and of all memory; other tokens that follow, or memory of other names, have an infinite one."""
    names = got.tensors.keys() ^ want.tensors.keys()
    errors = dict.fromkeys(names, float("inf"))
    errors |= {key: relative_error(got.tensors[key], want.tensors[key]) for key in want.tensors.keys() - names}
    errors["logits"] = relative_error(got.logits, want.logits)
    errors["tokens that follow"] = 0.0 if torch.equal(got.following, want.following) else float("inf")
    return errors
