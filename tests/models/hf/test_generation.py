"""`generate` of Transformers writes what the model inside finds, from a cache whose linear layers do not grow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from longspan.errors import InputError
from longspan.models import generate
from longspan.models.hf import LinearLlamaCache, LinearLlamaForCausalLM
from tests.compare import relative_error
from tests.models.hf.tiny import KINDS, alone, padded, tiny_hf
from tests.models.tiny import random_tokens

NUM_NEW = 6


def written(model: LinearLlamaForCausalLM, tokens: Tensor, **options: Any) -> Any:
    """What `generate` returns, a tensor if not asked for more."""
    # Without a mask Transformers takes each token that is that of padding for padding.
    options = {"attention_mask": torch.ones_like(tokens), **options}
    return model.generate(tokens, max_new_tokens=NUM_NEW, pad_token_id=0, **options)


def greedy(model: LinearLlamaForCausalLM, row: Tensor, count: int = NUM_NEW) -> list[int]:
    return list(generate(model.model, row, max_new_tokens=count))


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_library_s_own_decoding(kind: str) -> None:
    model = tiny_hf(kind)
    for length in (1, 40):
        tokens = random_tokens(2, length, seed=length)
        made = written(model, tokens, do_sample=False)
        assert torch.equal(made[:, :length], tokens)
        assert made[:, length:].tolist() == [greedy(model, row) for row in tokens]


# A hybrid has the layers of a pure one; beams are of experts.
@pytest.mark.slow_rows(r"^(pure|experts)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^hybrid$")
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_go_on_as_each_does_alone(kind: str) -> None:
    model = tiny_hf(kind)
    tokens, mask, rows = padded([3, 20, 9, 20], "left")
    for more in ({}, {"prefill_chunk_size": 7}, {"use_cache": False}):
        made = written(model, tokens, attention_mask=mask, do_sample=False, **more)
        assert made[:, tokens.shape[1] :].tolist() == [greedy(model, row) for row in rows], more


# The cache of every kind is in the test above, or in its slow rows.
@pytest.mark.slow_rows(r"^(pure|hybrid|window)$")
@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_their_scores_are_those_without_a_cache(kind: str) -> None:
    model = tiny_hf(kind)
    tokens, mask, rows = padded([3, 20, 9], "left")
    options: dict[str, Any] = {
        "attention_mask": mask,
        "num_beams": 3,
        "num_return_sequences": 2,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    found, want = (written(model, tokens, use_cache=use_cache, **options) for use_cache in (True, False))
    assert torch.equal(found.sequences, want.sequences) and len(found.sequences) == 6
    assert relative_error(found.sequences_scores, want.sequences_scores) < 1e-5
    # Beams are not what is greedy, or this would show nothing.
    assert found.sequences[::2, 20:].tolist() != [greedy(model, row) for row in rows]


def test_sampling_draws_by_the_random_state() -> None:
    model = tiny_hf("hybrid")
    tokens = random_tokens(2, 9)

    def sampled(seed: int, **more: Any) -> list[list[int]]:
        torch.manual_seed(seed)
        texts: list[list[int]] = written(
            model, tokens, do_sample=True, temperature=2.0, top_k=20, top_p=0.95, **more
        ).tolist()
        return texts

    assert sampled(1) == sampled(1) != sampled(2)
    assert sampled(1, use_cache=False) == sampled(1)
    assert len(sampled(1, num_return_sequences=3)) == 6


def test_it_ends_where_the_model_ends_a_document() -> None:
    model = tiny_hf("hybrid")
    row = random_tokens(1, 9)[0]
    tokens = greedy(model, row)
    end = tokens[3]
    made = written(model, row[None], do_sample=False, eos_token_id=end)[0, 9:].tolist()
    assert made == tokens[: tokens.index(end) + 1]


def test_it_ends_behind_a_stop_string() -> None:
    model, row = tiny_hf("hybrid"), random_tokens(1, 9)[0]
    letters = "abcdefghijklmnopqrstuvwxyzABC"
    tokenizer: Any = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokens = greedy(model, row)
    stop = {"stop_strings": [letters[tokens[3]]], "tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer)}
    made = written(model, row[None], do_sample=False, **stop)[0, 9:].tolist()
    assert made == tokens[: tokens.index(tokens[3]) + 1]


@pytest.mark.parametrize(("kind", "layers_that_grow"), [("pure", []), ("hybrid", [1]), ("window", [])])
def test_the_cache_of_a_linear_layer_does_not_grow(kind: str, layers_that_grow: list[int]) -> None:
    model = tiny_hf(kind)
    sizes = []
    for length in (10, 80):
        out = written(model, random_tokens(2, length), return_dict_in_generate=True, do_sample=False)
        cache = out.past_key_values
        assert isinstance(cache, LinearLlamaCache) and cache.get_seq_length() == length + NUM_NEW - 1
        (group,) = cache.groups
        assert group.memory is not None
        sizes.append([layer.num_bytes for layer in group.memory.layers])
        assert cache.num_bytes == sum(sizes[-1])
    for index, (short, long) in enumerate(zip(*sizes, strict=True)):
        assert (long > short) == (index in layers_that_grow), index


def test_a_cache_goes_on_and_copies_of_it_go_different_ways() -> None:
    model = tiny_hf("hybrid")
    tokens, mask, rows = padded([4, 15], "left")
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    more = random_tokens(2, 5, seed=3)
    whole = torch.cat([tokens, more], 1)
    for _ in range(2):
        made = written(
            model,
            whole,
            attention_mask=torch.cat([mask, torch.ones_like(more)], 1),
            past_key_values=cache,
            do_sample=False,
        )
        assert made[:, 20:].tolist() == [greedy(model, torch.cat([row, more[i]])) for i, row in enumerate(rows)]
        cache = kept
    with torch.no_grad():
        assert model(more, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 15 + 5 + NUM_NEW - 1 + 5


def test_rows_of_a_cache_are_chosen_repeated_and_forgotten() -> None:
    model = tiny_hf("hybrid")
    tokens, mask, rows = padded([4, 15, 4], "left")
    cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
    assert cache.batch_size == 3 and len(cache) == 2 and cache.is_initialized and cache.has_previous_state()
    assert "rows=3, num_columns=15" in repr(cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([5, 2, 2, 0]))
    more = random_tokens(4, 3, seed=3)
    logits = model(more, past_key_values=cache).logits
    for i, row in enumerate((rows[2], rows[1], rows[1], rows[0])):
        assert relative_error(logits[i], alone(model, torch.cat([row, more[i]]))[-3:]) < 1e-12
    cache.crop(0)
    with pytest.raises(InputError, match="cannot take back tokens"):
        cache.crop(1)
    with pytest.raises(InputError, match="the cache is of 4 rows, and the tokens of 2"):
        model(more[:2], past_key_values=cache)
    with pytest.raises(InputError, match="filled by LinearLlamaForCausalLM alone"):
        cache.update(None, None, 0)
    cache.reset()
    assert cache.batch_size == -1 and not cache.is_initialized and len(cache) == 0
    assert relative_error(model(tokens[1:2], past_key_values=cache).logits[0], alone(model, tokens[1])) < 1e-12


def test_what_cannot_be_generated_is_refused() -> None:
    model = tiny_hf("hybrid")
    tokens, mask, _ = padded([3, 9], "right")
    with pytest.raises(InputError, match="a prompt to generate from has padding on the right"):
        written(model, tokens, attention_mask=mask)
    with pytest.raises(InputError, match="input_ids must have at least one row and token"):
        written(model, tokens[:, :0])
    with pytest.raises(InputError, match="cache_implementation='static': a LinearLlamaCache is the only one"):
        written(model, tokens, cache_implementation="static")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        written(model, tokens[:1], assistant_model=tiny_hf("hybrid"))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 16, dtype=torch.float64), max_new_tokens=1)
