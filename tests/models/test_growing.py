"""Keys and values that grow in place: the same bits as joined anew, whoever goes on from them, and few copies."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import SequenceLayout
from longspan.models import LinearLlama3, ModelMemory, decode, prefill
from longspan.models.mixers.growing import Grown, append
from tests.models.tiny import random_tokens, tiny_model

SIZES = (5, 1, 1, 3, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)


def random_keys(num_tokens: int, seed: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, num_tokens, 3, 4, generator=torch.Generator().manual_seed(seed))


def joined(before: Tensor | None, new: Tensor, most: int | None) -> Tensor:
    together = new if before is None else torch.cat([before, new], dim=1)
    return together if most is None else together[:, max(0, together.shape[1] - most) :]


@pytest.mark.parametrize("most", [None, 0, 1, 4, 7])
def test_tensors_are_those_joined_anew_and_stay_as_they_are(most: int | None) -> None:
    """Also what was returned before, and what goes on from an earlier one in another way."""
    kept: list[tuple[Tensor, Grown, Tensor]] = []
    tensor: Tensor | None = None
    grown: Grown | None = None
    wanted: Tensor | None = None
    for seed, size in enumerate(SIZES):
        new = random_keys(size, seed)
        tensor, grown = append(tensor, grown, new, most)
        wanted = joined(wanted, new, most)
        assert torch.equal(tensor, wanted)
        kept.append((tensor, grown, wanted))
    for seed, (tensor, grown, wanted) in enumerate(list(kept)):
        for _ in range(2):
            new = random_keys(2, 100 + seed)
            tensor, grown = append(tensor, grown, new, most)
            wanted = joined(wanted, new, most)
            kept.append((tensor, grown, wanted))
    for tensor, _, wanted in kept:
        assert torch.equal(tensor, wanted)


@pytest.mark.parametrize(("most", "num_copies"), [(None, 9), (50, 15)])
def test_most_tokens_are_written_where_there_is_room(most: int | None, num_copies: int) -> None:
    """Behind a prompt of 10: of its size, then twice as large whenever it is full, and with a window once for each window."""
    tensor, grown = append(None, None, random_keys(10, 0), most)
    places = {tensor.untyped_storage().data_ptr()}
    alive = [tensor]
    for seed in range(600):
        tensor, grown = append(tensor, grown, random_keys(1, seed), most)
        if tensor.untyped_storage().data_ptr() not in places:
            places.add(tensor.untyped_storage().data_ptr())
            alive.append(tensor)
    assert len(alive) <= num_copies


@pytest.mark.parametrize("first", [True, False])
def test_what_inference_mode_made_is_gone_on_with_outside_and_back(first: bool) -> None:
    tensor: Tensor | None = None
    grown: Grown | None = None
    wanted: Tensor | None = None
    for seed in range(12):
        with torch.inference_mode(first == (seed % 6 < 3)), torch.no_grad():
            new = random_keys(1, seed)
            tensor, grown = append(tensor, grown, new, None)
            wanted = joined(wanted, new, None)
            assert torch.equal(tensor, wanted)


def steps(model: LinearLlama3, tokens: Tensor, memory: ModelMemory | None, anew: bool) -> tuple[Tensor, ModelMemory]:
    """Logits of each token, given one by one, and what is remembered then; anew: without what is known of rooms."""
    found = []
    for token in tokens.unbind(1):
        given = memory.detach() if anew and memory is not None else memory
        with torch.no_grad():
            logits, memory = model(token[:, None], memory=given, output_memory=True)
        found.append(logits)
    assert memory is not None
    return torch.cat(found, dim=1), memory


def same(one: ModelMemory, other: ModelMemory) -> bool:
    return one.num_tokens == other.num_tokens and all(
        torch.equal(mine.tensors[name], theirs.tensors[name])
        for mine, theirs in zip(one.layers, other.layers, strict=True)
        for name in theirs.tensors
    )


MODELS: dict[str, dict[str, Any]] = {
    "hybrid": {"pattern": "LN"},
    "window": {"pattern": "N", "window": 5},
    "window of one": {"pattern": "N", "window": 1},
}


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(hybrid|window of one)-dtype1$")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_bits_that_it_gives_with_keys_joined_anew(name: str, dtype: torch.dtype) -> None:
    """Several rows, behind a prompt and without one; and with gradients, where keys are joined."""
    model = tiny_model(num_layers=2, **MODELS[name]).to(dtype)
    tokens = random_tokens(3, 30)
    with torch.no_grad():
        _, prompt = model(tokens[:, :20], logits_to_keep=0, output_memory=True)
    for memory, given in ((None, tokens[:, :14]), (prompt, tokens[:, 20:])):
        logits, grown = steps(model, given, memory, anew=False)
        wanted, anew = steps(model, given, memory, anew=True)
        assert torch.equal(logits, wanted)
        assert same(grown, anew)
        with torch.enable_grad():
            taught, with_gradient = model(tokens[:, -1:], memory=grown, output_memory=True)
            assert torch.equal(taught, model(tokens[:, -1:], memory=anew, output_memory=True)[0])
            assert any(x.requires_grad for layer in with_gradient.layers for x in layer.tensors.values())


def test_keys_lie_where_they_lay_but_where_there_is_no_more_room() -> None:
    model = tiny_model(num_layers=2, pattern="LN")
    memory: ModelMemory | None = None
    places: list[int] = []
    for token in random_tokens(1, 40).unbind(1):
        with torch.no_grad():
            _, memory = model(token[:, None], memory=memory, output_memory=True)
        places.append(memory.layers[1].tensors["keys"].untyped_storage().data_ptr())
    assert sum(one != other for one, other in itertools.pairwise(places)) <= 7


@pytest.mark.parametrize("name", MODELS)
def test_a_document_that_begins_with_a_stretch_does_not_remember_the_one_before_it(name: str) -> None:
    """Without gradients, where keys grow in place, as with them; and the tokens behind are those that follow it alone."""
    model = tiny_model(num_layers=2, **MODELS[name])
    tokens = random_tokens(1, 30)
    begins, goes_on = (SequenceLayout.local(10, continues=number) for number in (0, 10))
    for grad_enabled in (False, True):
        with torch.set_grad_enabled(grad_enabled):
            _, of_another = model(tokens[:, :10], begins, output_memory=True)
            _, memory = model(tokens[:, 10:20], begins, memory=of_another, output_memory=True)
            _, wanted = model(tokens[:, 10:20], begins, output_memory=True)
            assert same(memory, wanted)
            logits = model(tokens[:, 20:], goes_on, memory=memory)
            assert torch.equal(logits, model(tokens[:, 20:], goes_on, memory=wanted))


def test_several_texts_go_on_from_one_memory_and_copies_of_it() -> None:
    """Taken in turn, token by token: each is the text that it is alone, and the memory that they share stays as it was."""
    model = tiny_model(num_layers=2, pattern="LN")
    tokens = random_tokens(1, 8)
    _, memory = steps(model, tokens, None, anew=False)
    before = copy.deepcopy(memory)
    ways = [random_tokens(1, 9, seed=seed) for seed in range(3)]
    alone = [steps(model, way, memory, anew=True) for way in ways]
    each: list[ModelMemory] = [memory, copy.deepcopy(memory), memory]
    for position in range(9):
        for number, way in enumerate(ways):
            with torch.no_grad():
                logits, each[number] = model(way[:, position : position + 1], memory=each[number], output_memory=True)
            assert torch.equal(logits[:, 0], alone[number][0][:, position]), (number, position)
    for found, (_, wanted) in zip(each, alone, strict=True):
        assert same(found, wanted)
    assert same(memory, before)


def test_a_turn_of_decoding_does_not_change_the_memory_that_it_begins_with() -> None:
    model, prompt = tiny_model(num_layers=2, pattern="LN"), random_tokens(1, 20)[0]
    memory = prefill(model, prompt)
    made = [list(decode(model, prompt, memory, max_new_tokens=9)) for _ in range(3)]
    assert made[0] == made[1] == made[2]
