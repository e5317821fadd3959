"""Both passes over a segment draw the same numbers, and a step leaves the random state behind what it drew."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import SequenceLayout, parallelize, stream
from tests.compare import worst
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import run_on_ranks
from tests.streaming.whole import differences, gradients_of, labels_of


def with_dropout() -> Any:
    """A model with dropout behind every mixer, as a hook adds it."""
    model: Any = tiny_model(pattern="LN", operator="mamba2", num_layers=2)
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda module, given, found: (F.dropout(found[0], 0.3), found[1]))
    return model


def as_one_graph(
    model: nn.Module, tokens: Tensor, segment_tokens: int, seed: int, whole: SequenceLayout | None = None
) -> dict[str, Tensor]:
    """The same segments in one graph, of which nothing is computed twice."""
    labels, memory, total = labels_of(tokens), None, torch.zeros((), dtype=torch.float64)
    torch.manual_seed(seed)
    num_tokens = labels.shape[1]
    whole = SequenceLayout.local(num_tokens) if whole is None else whole
    for start in range(0, num_tokens, segment_tokens):
        stop = min(start + segment_tokens, num_tokens)
        layout = whole.stretch(start, stop)
        inputs, targets = (layout.shard(x[:, start:stop]) for x in (tokens, labels))
        given = {"labels": targets, "num_valid": int((labels >= 0).sum())}
        loss, memory = model(inputs, layout, memory=memory, **given, output_memory=True)
        total = total + loss
    after = torch.rand(3)
    total.backward()
    found = {"loss": total.detach(), "after": after, **gradients_of(model)}
    model.zero_grad(set_to_none=True)
    return found


def test_dropout_draws_the_same_in_both_passes() -> None:
    model, tokens = with_dropout(), random_tokens(2, 41)
    want = as_one_graph(model, tokens, 9, 5)
    for keep_every in (1, 3):
        torch.manual_seed(5)
        loss = stream(model, 9, keep_every=keep_every).forward_backward(tokens[:, :-1], labels_of(tokens))
        # What one call of each segment would have left.
        got = {"loss": loss, "after": torch.rand(3), **gradients_of(model)}
        model.zero_grad(set_to_none=True)
        assert worst(differences(got, want)) < 1e-10
    other = as_one_graph(model, tokens, 9, 6)
    assert worst(differences(other, want)) > 0.01


def dropout_on_rank() -> dict[str, float]:
    """Each rank draws numbers of its own."""
    model, tokens = parallelize(with_dropout(), None), random_tokens(2, 41)
    layout, seed = SequenceLayout(40, order="zigzag"), 5 + dist.get_rank()
    want = as_one_graph(model, tokens, 9, seed, layout)
    torch.manual_seed(seed)
    loss = stream(model, 9).forward_backward(tokens[:, :-1], labels_of(tokens), layout)
    return differences({"loss": loss, "after": torch.rand(3), **gradients_of(model)}, want)


def test_dropout_over_ranks_draws_the_same_in_both_passes() -> None:
    for errors in run_on_ranks(2, dropout_on_rank):
        assert worst(errors) < 1e-10, errors


def passes_of_the_last_block(draws_on: tuple[int, ...]) -> int:
    """How often the last block computes tokens of a sequence of five segments; the model draws on some ranks."""
    model: Any = tiny_model(pattern="LN", operator="mamba2", num_layers=2)
    model = parallelize(model, None)
    ran: list[int] = []
    model.blocks[-1].feed_forward.register_forward_hook(lambda module, given, found: ran.append(0))
    if dist.get_rank() in draws_on:
        model.blocks[0].mixer.register_forward_hook(lambda module, given, found: torch.rand(1) and None)
    tokens = random_tokens(1, 51)
    layout = SequenceLayout(50)
    stream(model, 10).forward_backward(tokens[:, :-1], labels_of(tokens), layout)
    return len(ran)


def test_a_first_pass_leaves_out_what_nobody_reads_where_nobody_draws() -> None:
    """The first segment shows that; the last one has no first pass. What one rank does the others do, as layers exchange."""
    assert run_on_ranks(2, passes_of_the_last_block, ()) == [1 + 5] * 2
    assert run_on_ranks(2, passes_of_the_last_block, (1,)) == [4 + 5] * 2


def test_each_segment_draws_numbers_of_its_own() -> None:
    drawn: list[Tensor] = []
    model: Any = tiny_model(pattern="L", num_layers=1)

    def note(module: nn.Module, given: Any, found: Any) -> None:
        drawn.append(torch.rand(2))

    model.blocks[0].mixer.register_forward_hook(note)
    tokens = random_tokens(1, 41)
    layout = SequenceLayout.local(40, (0, 10, 20, 40))
    stream(model, 10).forward_backward(tokens[:, :-1], labels_of(tokens), layout)
    # Segments 0, 1, 2 of the first pass; 3, 2, 1, 0 of the second, the last one for the first time.
    assert [tuple(x.tolist()) for x in drawn[:3]] == [tuple(x.tolist()) for x in drawn[:3:-1]]
    assert len({tuple(x.tolist()) for x in drawn}) == 4
