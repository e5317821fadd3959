"""A prompt prefilled over ranks leaves the cache that Transformers makes in one process, and the same tokens follow."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import longspan
from longspan.errors import InputError
from longspan.integrations.transformers import layout_of
from longspan.integrations.transformers.structure import is_of_fla
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FAMILIES, FLA_FAMILIES, VOCABULARY, build
from tests.integrations.transformers.reference import Wide
from tests.integrations.transformers.test_rotary import KINDS, options_of
from tests.ranks import raised, run_on_ranks

PROJECT_ROOT = Path(__file__).resolve().parents[3]
TOLERANCE = 1e-12
NUM_TOKENS = 29
NUM_NEW = 6
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": 0}

FEW = ("qwen3", "deepseek_v3", "lfm2", "minimax", "qwen3_next", "kimi_linear", "zamba2", "mamba2", "recurrent_gemma")
"""A family for each kind of memory: windows, latents, convolutions, states, states of modules, and their mixtures."""
WITHOUT_LENGTH = ("mamba", "mamba2", "falcon_mamba", "minimax")
"""Whose cache does not know how many tokens it holds: Transformers cannot continue it from the whole prompt."""


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


@pytest.mark.parametrize("name", FEW)
def test_two_ranks_are_one_process(name: str) -> None:
    check(name, 2, "zigzag", "last")


@pytest.mark.parametrize(("order", "to"), [("contiguous", "last"), ("zigzag", "all")])
def test_other_orders_and_targets(order: Order, to: str) -> None:
    check("qwen3_next", 2, order, to)


@pytest.mark.parametrize("rope", KINDS)
def test_frequencies_that_look_at_the_longest_position(rope: str) -> None:
    check("llama", 2, "zigzag", "last", rope)


@pytest.mark.parametrize("name", ["qwen3_next", "recurrent_gemma"])
def test_segments_leave_the_same_cache(name: str) -> None:
    """Segments shorter than windows; the last one shorter than the others."""
    check(name, 2, "zigzag", "last", segment_tokens=8)


def test_segments_with_frequencies_that_look_at_the_longest_position() -> None:
    check("llama", 2, "contiguous", "all", "dynamic", segment_tokens=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_segments_in_every_family(name: str) -> None:
    check(name, 2, "zigzag", "last", segment_tokens=8)
    check(name, 2, "contiguous", "all", segment_tokens=3)
    check(name, 1, "contiguous", "last", segment_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_every_family(name: str) -> None:
    for num_ranks in (2, 4):
        for order in ("contiguous", "zigzag"):
            check(name, num_ranks, order, "last")
    check(name, 3, "zigzag", "all")
    check(name, 1, "zigzag", "last")


def dtypes_of(name: str) -> list[tuple[str, torch.dtype, torch.dtype]]:
    """Where a bfloat16 model's cache differs in dtype from Transformers' own."""
    model: Any = build(name).bfloat16()
    ids = prompt()
    with torch.no_grad():
        cache = empty_cache(model)
        model(ids, use_cache=True, **{name_of_cache(model): cache})
    want = tensors_of(cache, model)
    longspan.parallelize(model, None)
    got = tensors_of(longspan.prefill(model, ids, to="all").cache, model)
    return [(key, want[key].dtype, got[key].dtype) for key in want if want[key].dtype != got[key].dtype]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_dtypes_of_a_bfloat16_model(name: str) -> None:
    assert run_on_ranks(2, dtypes_of, name) == [[], []]


def shortest(name: str, length: int) -> tuple[int, dict[str, float] | None]:
    """The rank that has the last token, and there the errors of what is left of a prompt of few tokens."""
    model: Any = build(name)
    ids = prompt(1, length)
    with Wide(), torch.no_grad():
        cache = empty_cache(model)
        want = {"logits": model(ids, use_cache=True, **{name_of_cache(model): cache}).logits[:, -1]}
        want |= tensors_of(cache, model)
        cache, logits, rank = longspan.prefill(
            longspan.parallelize(model, None),
            ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(length)[None],
        )
        if cache is None or logits is None:
            return rank, None
        got = {"logits": logits, **tensors_of(cache, model)}
    return rank, {key: relative_error(got[key], want[key]) for key in want}


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("name", ["zamba2", "recurrent_gemma"])
def test_a_prompt_of_a_token_a_rank(name: str, length: int) -> None:
    """Shorter than convolutions, and than the segments that give rank 0 the last token."""
    check_short(name, length)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_CACHE)
def test_a_prompt_of_a_token_a_rank_in_every_family(name: str) -> None:
    check_short(name, 2)


def check_short(name: str, length: int) -> None:
    compare_short(run_on_ranks(2, shortest, name, length))


def compare_short(found: list[tuple[int, dict[str, float] | None]]) -> None:
    first, (owner, errors) = found
    assert first == (1, None)
    assert errors is not None
    assert owner == 1
    assert worst_of(errors)[0] < TOLERANCE


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


def sent_by_rank(name: str, length: int) -> int:
    model: Any = longspan.parallelize(build(name), None, order="contiguous")
    with longspan.record_traffic() as traffic:
        longspan.prefill(model, prompt(2, length))
    return traffic.of_phase("prefill").bytes_sent


def test_what_one_rank_decodes_with_is_sent_to_it_alone() -> None:
    """Keys and values of two softmax layers, 2 heads of 12; the last inputs of convolutions are on the last rank."""
    bytes_of_a_token = 2 * 2 * 2 * 2 * 12 * 8
    assert run_on_ranks(2, sent_by_rank, "qwen3_next", 29) == [15 * bytes_of_a_token, 0]


def test_a_window_sends_what_it_will_see() -> None:
    """Two layers with windows of 9 tokens, 2 heads of 6: 8 tokens, of which the last rank has all or all but one."""
    bytes_of_a_token = 2 * 2 * 2 * 2 * 6 * 8
    assert run_on_ranks(2, sent_by_rank, "mistral", 16) == [0, 0]
    assert run_on_ranks(2, sent_by_rank, "mistral", 15) == [bytes_of_a_token, 0]


def test_one_rank_needs_no_process_group() -> None:
    model: Any = longspan.parallelize(build("recurrent_gemma"), None)
    ids = prompt()
    with Wide():
        cache = longspan.prefill(model, ids[:, :-1]).cache
        assert torch.equal(continued(model, cache, ids), expected("recurrent_gemma").following)


def run_blocks_of_the_page() -> None:
    torch.manual_seed(0)
    page = PROJECT_ROOT / "docs" / "transformers_generation.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "page"})


def test_the_blocks_of_the_page_run() -> None:
    run_on_ranks(2, run_blocks_of_the_page)


def refused(what: str) -> tuple[str, str]:
    rank = dist.get_rank()
    ids = prompt()
    model: Any = build("llama")
    given: dict[str, Any] = {}
    match what:
        case "not parallelized":
            return raised(lambda: longspan.prefill(model, ids))
        case "backbone":
            model = model.model
        case "head of another library":
            return raised(lambda: longspan.prefill(nn.Linear(2, 2), ids))
        case "no model":
            return raised(lambda: longspan.prefill("gpt2", ids))  # type: ignore[arg-type]
        case "padding":
            given["attention_mask"] = torch.ones_like(ids)
            given["attention_mask"][0, -3:] = 0
        case "documents":
            ids = ids[:1]
            given["position_ids"] = torch.cat([torch.arange(9), torch.arange(NUM_TOKENS - 9)])[None]
        case "short":
            ids = ids[:, :1]
        case "different prompts":
            ids = ids + rank
        case "target":
            given["to"] = "first"
        case "generate" | "a cache of Transformers" | "training" | "sharded":
            pass
    longspan.parallelize(model, None)
    match what:
        case "generate":
            return raised(lambda: model.generate(ids, **GREEDY))
        case "a cache of Transformers":
            return raised(lambda: model.generate(ids, past_key_values=empty_cache(model), **GREEDY))
        case "training":
            model.train()
        case "sharded":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return raised(lambda: longspan.prefill(model, ids, **given))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("not parallelized", "longspan.parallelize(model, group) first"),
        ("backbone", "ForCausalLM"),
        ("head of another library", "a Linear"),
        ("no model", "'gpt2'"),
        ("padding", "rows of one length"),
        ("documents", "each prompt by itself"),
        ("short", "1 tokens, fewer than the 2 ranks"),
        ("different prompts", "different batches"),
        ("target", "last, all; got 'first'"),
        ("training", "model.eval()"),
        ("sharded", "to='all'"),
        ("generate", "longspan.prefill(model, input_ids[:, :-1])"),
        ("a cache of Transformers", "longspan.prefill(model, input_ids[:, :-1])"),
    ],
)
def test_refusals(what: str, says: str) -> None:
    for kind, message in run_on_ranks(2, refused, what):
        assert kind == "InputError", message
        assert says in message


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


@pytest.mark.slow
def test_the_example_runs() -> None:
    example = PROJECT_ROOT / "examples" / "generate_long_prompt.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(example)]
    result = subprocess.run(
        [*command, "--tokens", "64", "--new-tokens", "4"],
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert "64 tokens over 2 ranks: the same 4 tokens as in one process" in result.stdout


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(InputError, match=r"RwkvForCausalLM takes no cache.*unparallelize"):
        longspan.prefill(longspan.parallelize(build("rwkv"), None), prompt())
