"""Decoding from the cache of a prompt that ranks have read, on one of them; and where Transformers itself goes wrong there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longspan
from longspan.integrations.transformers import layout_of
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FLA_FAMILIES, build
from tests.integrations.transformers.prompts import (
    GREEDY,
    NUM_NEW,
    NUM_TOKENS,
    TOLERANCE,
    continued,
    empty_cache,
    name_of_cache,
    prompt,
)
from tests.integrations.transformers.reference import Wide
from tests.ranks import raised, run_on_ranks


def a_loop_by_hand(name: str) -> tuple[Tensor, Tensor] | None:
    """Tokens of a loop that calls the parallelized model with prefill's cache, and of one process."""
    model: Any = build(name)
    ids = prompt()
    with Wide(), torch.no_grad():
        want = model.generate(ids, **GREEDY)
        longspan.parallelize(model, None, order="zigzag")
        cache, logits, _ = longspan.prefill(model, ids)
        if cache is None or logits is None:
            return None
        tokens = [ids]
        for step in range(NUM_NEW):
            tokens.append(logits.argmax(-1, keepdim=True))
            positions = (
                {}
                if name == "mamba2" or name in FLA_FAMILIES
                else {"position_ids": torch.tensor([[NUM_TOKENS + step]])}
            )
            logits = model(tokens[-1], use_cache=True, **{name_of_cache(model): cache}, **positions).logits[:, -1]
    return torch.cat(tokens, 1), want


@pytest.mark.parametrize("name", ["mamba2", "minimax"])
def test_calls_with_its_cache_decode_on_one_rank(name: str) -> None:
    found, nothing = run_on_ranks(2, a_loop_by_hand, name)
    assert nothing is None
    assert torch.equal(*found)


def whole_error(model: nn.Module, ids: Tensor, want: Tensor) -> float:
    """Error of the logits of a parallel forward, of all ranks."""
    logits = model(ids).logits
    return relative_error(layout_of(model).gather(logits), want)


def decoding_between_steps() -> list[float]:
    """Errors of the logits of a parallel forward before and after decoding, by the model and by its copy."""
    model: Any = build("minimax")
    ids = prompt()
    with Wide(), torch.no_grad():
        want = model(ids, use_cache=False).logits
        following = model.generate(ids, **GREEDY)[:, -NUM_NEW:]
        longspan.parallelize(model, None)
        errors = []
        for each in (model, copy.deepcopy(model)):
            errors.append(whole_error(each, ids, want))
            cache = longspan.prefill(each, ids[:, :-1], to="all").cache
            kept = copy.deepcopy(cache)
            for start in (cache, kept):
                assert torch.equal(continued(each, start, ids), following)
            # Where decoding fails the model is parallel again.
            kind, _ = raised(lambda each=each, cache=cache: each(ids[:, -1:], past_key_values=cache, position_ids="?"))
            assert kind != "InputError"
            errors.append(whole_error(each, ids, want))
        twin = copy.deepcopy(model)
        model.lm_head.weight *= -1
        assert torch.equal(continued(twin, longspan.prefill(twin, ids[:, :-1], to="all").cache, ids), following)
        model.lm_head.weight *= -1
        longspan.unparallelize(model)
        assert torch.equal(model.generate(ids, **GREEDY)[:, -NUM_NEW:], following)
    return errors


def test_the_model_is_parallel_again_after_decoding() -> None:
    for errors in run_on_ranks(2, decoding_between_steps):
        assert worst_of(dict(enumerate(errors)))[0] < TOLERANCE


def the_whole_prompt_again(name: str) -> tuple[str, str] | None:
    model: Any = longspan.parallelize(build(name), None, order="zigzag")
    ids = prompt()
    with Wide():
        cache = longspan.prefill(model, ids[:, :-1]).cache
        if cache is None:
            return None
        return raised(lambda: model.generate(ids, **{name_of_cache(model): cache}, **GREEDY))


@pytest.mark.parametrize("name", ["mamba2", "minimax"])
def test_a_cache_without_length_is_not_fed_the_prompt_again(name: str) -> None:
    answer, nothing = run_on_ranks(2, the_whole_prompt_again, name)
    assert nothing is None
    kind, message = answer
    assert kind == "InputError"
    assert "input_ids[:, -1:]" in message
    assert ("position_ids" in message) == (name == "minimax")


@pytest.mark.parametrize("name", ["falcon_mamba", "mamba2", "minimax"])
def test_why_the_whole_prompt_is_refused(name: str) -> None:
    """Transformers itself, in one process, generates something else when it continues such a cache from the whole prompt."""
    model: Any = build(name)
    ids = prompt()
    with Wide(), torch.no_grad():
        want = model.generate(ids, **GREEDY)
        cache = empty_cache(model)
        model(ids[:, :-1], use_cache=True, **{name_of_cache(model): cache})
        got = model.generate(ids, **{name_of_cache(model): cache}, **GREEDY)
    assert not torch.equal(got, want)


def test_a_step_of_decoding_has_no_limit_of_step_sizes() -> None:
    """Transformers itself, in one process: a Mamba-2 with time_step_limit reads its last token otherwise in a step of its own."""
    model: Any = build("bamba")
    ids = prompt()
    with Wide(), torch.no_grad():
        want = model(ids).logits[:, -1]
        cache = empty_cache(model)
        model(ids[:, :-1], past_key_values=cache)
        got = model(ids[:, -1:], past_key_values=cache, position_ids=torch.tensor([[NUM_TOKENS - 1]])).logits[:, -1]
    assert relative_error(got, want) > 1e-3


@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "recurrent_gemma"])
def test_several_tokens_at_once_do_not_continue_a_cache(name: str) -> None:
    """Transformers itself, in one process: more than one token behind a cache is not read as in one go."""
    model: Any = build(name)
    ids = prompt()
    with Wide(), torch.no_grad():
        want = model(ids).logits[:, -1]
        given = {"use_cache": True, name_of_cache(model): empty_cache(model)}
        model(ids[:, :-3], **given)
        positions = (
            {"position_ids": torch.arange(NUM_TOKENS - 3, NUM_TOKENS)[None]} if name == "recurrent_gemma" else {}
        )
        got = model(ids[:, -3:], **given, **positions).logits[:, -1]
    assert relative_error(got, want) > 1e-3


def sharded_by_fsdp() -> tuple[Tensor, Tensor]:
    """Tokens of a model whose parameters are split over the same ranks, and of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = build("olmo_hybrid")
    ids = prompt()
    with Wide(), torch.no_grad():
        want = model.generate(ids, **GREEDY)
        longspan.parallelize(model, None)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        cache = longspan.prefill(model, ids[:, :-1], to="all").cache
        return model.generate(ids, past_key_values=cache, **GREEDY), want


def test_ranks_with_a_part_of_the_parameters_generate_together() -> None:
    for got, want in run_on_ranks(2, sharded_by_fsdp):
        assert torch.equal(got, want)


def sampled() -> tuple[Tensor, Tensor] | None:
    """Sampled tokens of one rank of a model with PEFT around it, and of one process."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    model: Any = get_peft_model(
        build("olmo_hybrid"), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    model.double().eval()
    ids = prompt()
    sampling = {**GREEDY, "do_sample": True, "temperature": 0.8, "top_k": 20}
    with Wide(), torch.no_grad():
        torch.manual_seed(5)
        want = model.generate(input_ids=ids, **sampling)
        cache = longspan.prefill(longspan.parallelize(model, None), ids[:, :-1]).cache
        if cache is None:
            return None
        torch.manual_seed(5)
        return model.generate(input_ids=ids, past_key_values=cache, **sampling), want


# Of PEFT's, which asks models of Transformers by an older name.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_generate_samples_as_in_one_process_with_peft_around_the_model() -> None:
    found, nothing = run_on_ranks(2, sampled)
    assert nothing is None
    assert torch.equal(*found)
