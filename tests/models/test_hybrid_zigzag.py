"""A hybrid runs in zigzag order from the embedding to the loss: its layers exchange states and keys, and never tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from longspan import SequenceLayout, parallelize, record_traffic, sum_gradients
from longspan.attention.softmax import SoftmaxMethod
from tests.compare import relative_error, worst
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks

NAMES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "batch_isend_irecv",
    "broadcast",
    "irecv",
    "isend",
    "recv",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "send",
)
METHODS: tuple[SoftmaxMethod, ...] = ("all_gather", "ring", "ulysses")

# All-to-alls of one softmax layer on two ranks, forward and backward.
ALL_TO_ALLS = {"all_gather": (0, 1), "ring": (1, 2), "ulysses": (3, 4)}


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Calls of torch.distributed's functions inside the block, by name."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in NAMES if hasattr(dist, name)}

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(dist, name, counted(name, original))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step_of(
    pattern: str, method: SoftmaxMethod, num_tokens: int, window: int | None
) -> tuple[dict[str, int], dict[str, int], int, float]:
    """Collectives forward and backward, bytes sent, and the largest difference to one process, relative."""
    changes = {"pattern": pattern, "num_layers": len(pattern), "window": window}
    tokens = random_tokens(1, num_tokens + 1)
    alone = tiny_model(**changes)
    F.cross_entropy(alone(tokens[:, :-1]).mT, tokens[:, 1:], reduction="sum").backward()

    model = parallelize(tiny_model(**changes), None, exchange="all_gather", softmax_method=method)
    layout = SequenceLayout(num_tokens, order="zigzag")
    with record_traffic() as traffic:
        with counted_collectives() as forward:
            logits = model(layout.shard(tokens[:, :-1]), layout=layout)
        loss = F.cross_entropy(logits.mT, layout.shard_labels(tokens), reduction="sum")
        with counted_collectives() as backward:
            loss.backward()
    sum_gradients(model)
    errors = []
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        errors.append(relative_error(parameter.grad, expected.grad))
    return dict(forward), dict(backward), traffic.bytes_sent, worst(errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(9-ulysses|None-ring)$")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("window", [None, 9])
def test_the_collectives_of_a_hybrid_are_those_of_its_layers(method: SoftmaxMethod, window: int | None) -> None:
    """And its gradients are those of one process: nothing else brings tokens together or changes who holds them."""
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    for forward, backward, _, difference in run_on_ranks(2, step_of, "LLLN", method, 80, window):
        assert difference <= 1e-10
        in_forward, in_backward = ALL_TO_ALLS[method]
        want_forward, want_backward = Counter({gather: 3}), Counter({gather: 3, "all_to_all_single": in_backward})
        if method == "all_gather":
            # With a window, just the tokens that are needed.
            want_forward["all_to_all_single" if window else gather] += 1
        else:
            want_forward["all_to_all_single"] += in_forward
        assert (forward, backward) == (dict(want_forward), dict(want_backward))


def test_linear_layers_send_nothing_that_grows_with_the_sequence() -> None:
    """So a hybrid's bytes grow as those of its softmax layers alone."""
    sent = {
        (pattern, num_tokens): [
            bytes_sent for *_, bytes_sent, _ in run_on_ranks(2, step_of, pattern, "ring", num_tokens, None)
        ]
        for pattern in ("LLLN", "N")
        for num_tokens in (80, 160)
    }
    for rank in range(2):
        growth = [sent[pattern, 160][rank] - sent[pattern, 80][rank] for pattern in ("LLLN", "N")]
        assert growth[0] == growth[1] > 0


def test_dist_is_what_the_layers_call() -> None:
    """The counter sees what goes through torch.distributed's own names."""
    for calls in run_on_ranks(2, one_all_reduce):
        assert calls == {"all_reduce": 1}


def one_all_reduce() -> dict[str, int]:
    with counted_collectives() as calls:
        dist.all_reduce(torch.zeros(1))
    return dict(calls)
