"""A model scores each label by itself as its logits do, without holding them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import longspan
from longspan import SequenceLayout
from longspan.errors import InputError
from longspan.models import LinearLlama3, TokenScores
from longspan.ops.chunked.scores import score_tokens
from longspan.parallel import MeshDegrees, ParallelMesh, compute_in, shard_weights
from tests.compare import relative_error
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks

LENGTH = 23


def labelled() -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some are ignored."""
    tokens = random_tokens(2, LENGTH + 1)
    return tokens[:, :-1], tokens[:, 1:].masked_fill(tokens[:, 1:] % 5 == 0, -100)


def of_logits(logits: Tensor, labels: Tensor) -> TokenScores:
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return TokenScores(nats.view(labels.shape), logits.argmax(-1) == labels)


def check(got: TokenScores, want: TokenScores, tolerance: float = 1e-12) -> None:
    assert relative_error(got.nats, want.nats) < tolerance
    assert torch.equal(got.is_likeliest, want.is_likeliest)


def test_scores_are_those_of_the_logits() -> None:
    model = tiny_model()
    tokens, labels = labelled()
    with torch.no_grad():
        logits = model(tokens)
    # Some labels are the likeliest words, and some are not.
    labels[0] = torch.where(labels[0] >= 0, logits[0].argmax(-1), labels[0])
    want = of_logits(logits, labels)
    got = model(tokens, labels=labels, token_scores=True)
    check(got, want)
    assert 0 < int(got.is_likeliest.sum()) < labels.numel() and not got.nats.requires_grad
    assert not got.nats[labels == -100].any() and not got.is_likeliest[labels == -100].any()


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_change_nothing(chunk_size: int) -> None:
    hidden, weight = torch.randn(2, LENGTH, 8, dtype=torch.float64), torch.randn(29, 8, dtype=torch.float64)
    _, labels = labelled()
    check(score_tokens(hidden, weight, labels, chunk_size=chunk_size), of_logits(hidden @ weight.t(), labels))


def test_bfloat16_is_scored_in_float32() -> None:
    model = tiny_model().float()
    tokens, labels = labelled()
    compute_in(model, torch.bfloat16)
    with torch.no_grad():
        want = of_logits(model(tokens), labels)
    got = model(tokens, labels=labels, token_scores=True)
    assert got.nats.dtype == torch.float32
    check(got, want, 1e-5)


def test_where_nothing_is_asked_for_nothing_is_scored() -> None:
    tokens, labels = labelled()
    got = tiny_model()(tokens, labels=torch.full_like(labels, -100), token_scores=True)
    assert not got.nats.any() and not got.is_likeliest.any()


def _over_ranks(divided: bool) -> tuple[Tensor, Tensor]:
    tokens, labels = labelled()
    mesh = ParallelMesh(MeshDegrees(sp=2, shard_over_sp=divided), "cpu")
    model: LinearLlama3 = longspan.parallelize(tiny_model(), mesh["sp"])
    if divided:
        model = shard_weights(model, mesh)
    layout = SequenceLayout(LENGTH, mesh["sp"], "zigzag")
    got = model(layout.shard(tokens), layout=layout, labels=layout.shard(labels), token_scores=True)
    return layout.gather(got.nats), layout.gather(got.is_likeliest.double())


@pytest.mark.parametrize("divided", [False, True])
def test_ranks_score_their_own_tokens(divided: bool) -> None:
    tokens, labels = labelled()
    want = tiny_model()(tokens, labels=labels, token_scores=True)
    for nats, is_likeliest in run_on_ranks(2, _over_ranks, divided):
        check(TokenScores(nats, is_likeliest.bool()), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "got no labels"),
        ({"labels": True, "num_valid": 3}, "got num_valid"),
        ({"labels": True, "token_scores": 1}, "token_scores"),
    ],
)
def test_other_results_beside_scores_are_refused(options: dict[str, Any], message: str) -> None:
    tokens, labels = labelled()
    given = options | ({"labels": labels} if "labels" in options else {})
    with pytest.raises(InputError, match=message):
        tiny_model()(tokens, **({"token_scores": True} | given))


def test_the_code_of_the_page_on_evaluation_runs() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    model, (tokens, labels) = tiny_model(), labelled()
    names: dict[str, Any] = {"model": model, "tokens": tokens, "labels": labels}
    exec(compile(block, str(page), "exec"), names)
    check(TokenScores(names["nats"], names["is_likeliest"]), model(tokens, labels=labels, token_scores=True))


def test_scores_come_with_memory_too() -> None:
    tokens, labels = labelled()
    model = tiny_model()
    want = model(tokens, labels=labels, token_scores=True)
    first, memory = model(tokens[:, :9], labels=labels[:, :9], token_scores=True, output_memory=True)
    second = model(tokens[:, 9:], memory=memory, labels=labels[:, 9:], token_scores=True)
    for whole, *parts in zip(want, first, second, strict=True):
        assert relative_error(torch.cat(parts, dim=1), whole) < 1e-12
