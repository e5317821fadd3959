"""Which share of each sequence a rank holds: equal ones, given ones, or by the speed that is measured before the first step.

What is measured are two rates of each rank, all ranks computing at once as in training: operations a second of a model with one
layer of each kind that the run's model has, without the products of softmax attention; and of these products alone. From the
numbers of operations of the run's model follows how long a rank would take for a whole sequence, and from that its share
(`longspan.plan.balance`). Ranks that share a sequence have one list of weights; groups of them are measured at once, and have each
their own.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from longspan.attention.softmax import softmax_attention
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.parallel import compute_in
from longspan.plan.balance import RankSeconds, balanced_shares
from longspan.plan.training import Operations
from longspan.train.config import Config
from longspan.train.loading import SavedCheckpoint
from longspan.train.model import compute_dtype
from longspan.train.ranks import Ranks
from longspan.train.rate import operations_of_model

_MODEL_TOKENS, _ATTENTION_TOKENS = 1024, 2048
# All ranks compute for so long: one that shares a core with another must not find it idle because the other is done.
_SECONDS = 0.4
_LEAST_CALLS = 2

Weights = tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """Operations a second of a rank, as a model's layers count them: all but products of softmax attention, and these."""

    layers: float
    attention: float


@dataclass(frozen=True)
class Balance:
    """The weights of each group of ranks that share a sequence, None where its shares are equal.

    speeds: of every rank of the run, as measured, by rank; empty where nothing was.
    """

    groups: tuple[Weights | None, ...]
    speeds: tuple[Speed, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        groups = [None if weights is None else list(weights) for weights in self.groups]
        return {"groups": groups, "speeds": [dataclasses.astuple(speed) for speed in self.speeds]}

    @classmethod
    def from_json(cls, record: Any) -> Balance:
        """The balance that `as_json` wrote; raises KeyError, TypeError or ValueError for another record."""
        groups = tuple(None if weights is None else tuple(map(float, weights)) for weights in record["groups"])
        return cls(groups, tuple(Speed(*map(float, speed)) for speed in record["speeds"]))


def stated_balance(config: Config, ranks: Ranks) -> Balance:
    """The balance that the config itself says; equal shares where it is to be measured."""
    given = config.parallel.weights
    return Balance((given,) * ranks.dp)


def measures_speed(config: Config, ranks: Ranks) -> bool:
    """Whether shares follow from a measurement."""
    return ranks.sp > 1 and config.parallel.weights is None and config.parallel.balance != ("even",)


def measured_balance(
    config: Config,
    vocab_size: int,
    ranks: Ranks,
    tokens_by_document_length: np.ndarray | None = None,
    orders: Sequence[Sequence[int] | None] | None = None,
) -> Balance:
    """Measure all ranks, in a second or two; the same on every rank, which all call this together.

    tokens_by_document_length: of a typical step, as `Batches.tokens_by_document_length`; None takes every sequence for one
    document. orders: of each group of ranks, in which they hold the sequence, as `longspan.train.order.RankOrder` has them; None is
    that of their numbers.
    """
    model = config.model.build(vocab_size)
    own = measured_speed(model, config, ranks)
    speeds = [Speed(*row) for row in ranks.gather_numbers([own.layers, own.attention]).tolist()]
    operations = operations_of_documents(model, config, tokens_by_document_length)
    grows = config.parallel.order == "contiguous" and model.window is None and _is_one_document(config)
    groups = []
    members_of = ranks.degrees.groups("sp")
    for members, given in zip(members_of, orders or [None] * len(members_of), strict=True):
        order: Sequence[int] = range(len(members)) if given is None else given
        shares = balanced_shares([_seconds_of(operations, speeds[members[rank]]) for rank in order], grows=grows)
        of_ranks = dict(zip(order, shares, strict=True))
        groups.append(tuple(of_ranks[rank] for rank in range(len(members))))
    return Balance(tuple(groups), tuple(speeds))


def _is_one_document(config: Config) -> bool:
    return config.data.task != "text" or config.data.documents == "concatenate"


def _seconds_of(operations: Operations, speed: Speed) -> RankSeconds:
    attention = operations.attention / speed.attention if operations.attention else 0.0
    return RankSeconds(operations.rest / speed.layers, attention)


def operations_of_documents(
    model: LinearLlama3Config, config: Config, tokens_by_document_length: np.ndarray | None
) -> Operations:
    """Operations of one sequence of the run, with documents of such lengths, which reset what a softmax layer sees."""
    seq_len = config.train.seq_len
    if tokens_by_document_length is None or _is_one_document(config):
        return operations_of_model(model, seq_len)
    counts = tokens_by_document_length / max(1, int(tokens_by_document_length.sum()))
    rest = attention = 0.0
    for exponent in np.flatnonzero(counts):
        # The middle of lengths from one power of two to the next.
        length = max(1, min(seq_len, 3 * 2 ** int(exponent) // 2))
        of_length = operations_of_model(model, length)
        rest += float(counts[exponent]) * of_length.rest / length * seq_len
        attention += float(counts[exponent]) * of_length.attention / length * seq_len
    return Operations(rest, attention)


def measured_speed(model: LinearLlama3Config, config: Config, ranks: Ranks) -> Speed:
    """The speed of this rank, while all ranks measure theirs; attention's is 0 for a model that has none."""
    kinds = tuple(dict.fromkeys(model.layer_operators))
    one_of_each = dataclasses.replace(model, pattern=kinds, operator=LinearLlama3Config.operator, num_layers=len(kinds))
    num_tokens = min(_MODEL_TOKENS, config.train.seq_len)
    operations = operations_of_model(one_of_each, num_tokens)
    seconds = _seconds_of_model(one_of_each, num_tokens, compute_dtype(config), ranks)
    if "softmax" not in kinds:
        return Speed(operations.rest / seconds, 0.0)
    num_keys = min(_ATTENTION_TOKENS, config.train.seq_len)
    attention = operations_of_model(one_of_each, num_keys).attention
    attention /= _seconds_of_attention(model, num_keys, compute_dtype(config), ranks)
    # Where attention by itself takes longer than within the model, both have one rate.
    rest = seconds - operations.attention / attention
    if rest <= 0:
        return Speed(operations.total / seconds, operations.total / seconds)
    return Speed(operations.rest / rest, attention)


def _seconds_of_model(config: LinearLlama3Config, num_tokens: int, dtype: torch.dtype | None, ranks: Ranks) -> float:
    # The run's random state must not notice.
    with torch.random.fork_rng(devices=[]):
        model = LinearLlama3(config).to(ranks.device)
    if dtype is not None:
        compute_in(model, dtype)
    # Tokens all alike would make numbers that are quicker to compute with.
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, num_tokens), generator=random).to(ranks.device)

    def step() -> None:
        model(tokens, labels=tokens).backward()
        model.zero_grad(set_to_none=True)

    return _seconds_a_call(step, ranks)


def _seconds_of_attention(
    config: LinearLlama3Config, num_tokens: int, dtype: torch.dtype | None, ranks: Ranks
) -> float:
    random = torch.Generator().manual_seed(0)
    shapes = [(1, num_tokens, heads, config.size_of_head) for heads in (config.num_heads, *(config.kv_heads,) * 2)]
    q, k, v = (torch.randn(shape, generator=random).to(ranks.device, dtype).requires_grad_() for shape in shapes)

    def step() -> None:
        softmax_attention(q, k, v, window=config.window).sum().backward()

    return _seconds_a_call(step, ranks)


def _seconds_a_call(call: Callable[[], None], ranks: Ranks) -> float:
    """Of this rank, while all ranks make calls of their own; after one that finds memory cold."""
    call()
    ranks.gather_numbers([0.0])
    begun = time.perf_counter()
    seconds, calls = 0.0, 0
    while calls < _LEAST_CALLS or seconds < _SECONDS:
        call()
        if ranks.device.type != "cpu":
            torch.accelerator.synchronize(ranks.device)
        seconds, calls = time.perf_counter() - begun, calls + 1
    return seconds / calls


def balance_of_checkpoint(saved: SavedCheckpoint, ranks: Ranks) -> Balance | None:
    """The measured balance of a checkpoint, if it has one of as many groups of as many ranks.

    Raises:
        CheckpointError: for a balance of another form.
    """
    balance = saved.measured("balance", Balance.from_json, "shares of ranks")
    if balance is None:
        return None
    fits = len(balance.groups) == ranks.dp and all(w is not None and len(w) == ranks.sp for w in balance.groups)
    return balance if fits else None


def describe(balance: Balance, ranks: Ranks, from_checkpoint: bool) -> str:
    """The shares of each group of ranks in a line, with the speeds that they follow from."""
    groups = ranks.degrees.groups("sp")
    parts = []
    for weights, members in zip(balance.groups, groups, strict=True):
        if weights is None:
            parts.append("equal shares")
            continue
        shares = ", ".join(
            f"rank {member} {weight / sum(weights):.1%}" for member, weight in zip(members, weights, strict=True)
        )
        parts.append(shares)
    if not balance.speeds:
        return f"{'; '.join(dict.fromkeys(parts))}; as parallel.balance says"
    speeds = ", ".join(
        f"{speed.layers / 1e9:,.1f}" + (f" and {speed.attention / 1e9:,.1f}" if speed.attention else "")
        for speed in balance.speeds
    )
    of = "layers and of softmax attention" if balance.speeds[0].attention else "layers"
    when = "before, as the checkpoint has them" if from_checkpoint else "now, and kept in the checkpoints"
    return f"{'; '.join(parts)}; GFLOP/s in {of}, by rank: {speeds}; measured {when}"
