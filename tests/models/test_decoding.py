"""A prompt over ranks and token by token behind it: the logits and the greedy tokens of the whole sequence computed at once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan import SequenceLayout, parallelize
from longspan.errors import InputError, LayoutError, NonFiniteError
from longspan.models import LinearLlama3, ModelMemory, Sampling, decode, generate, prefill
from longspan.models.mixers import SequenceParallel
from longspan.parallel import compute_in
from longspan.streaming import SegmentDone
from tests.compare import relative_error, worst
from tests.models.tiny import LINEAR_MIXERS, each_linear_mixer, random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks

NUM_NEW = 6
PATTERNS = ({"pattern": "L"}, {"pattern": "LN"}, {"pattern": "LN", "window": 4})


def model_of(operator: str, **changes: Any) -> LinearLlama3:
    # Two linear layers at least: of several, some mixers share a parameter.
    return tiny_model(operator=operator, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=10, **changes)


def whole(model: LinearLlama3, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0]


class Recorded:
    """A model that keeps the logits it gave."""

    def __init__(self, model: LinearLlama3) -> None:
        self.model, self.sequence_parallel = model, model.sequence_parallel
        self.logits: list[Tensor] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        logits, memory = self.model(*arguments, **options)
        self.logits.extend(logits[0])
        return logits, memory


def differences(model: LinearLlama3, alone: LinearLlama3, length: int, order: Any = "zigzag") -> tuple[float, bool]:
    """Of the logits behind the prompt and behind each new token, from those of one call; and whether the tokens are its own."""
    prompt = random_tokens(1, length, seed=length)[0]
    recorded = Recorded(model)
    made = list(generate(recorded, prompt, max_new_tokens=NUM_NEW, order=order))
    want = whole(alone, [*prompt.tolist(), *made])[length - 1 : -1]
    return relative_error(torch.stack(recorded.logits), want), want.argmax(-1).tolist() == made


def differences_of_all(operator: str) -> dict[str, tuple[float, bool]]:
    found = {}
    for changes in PATTERNS:
        alone, model = model_of(operator, **changes), parallelize(model_of(operator, **changes), None)
        for length, order in itertools.product((1, 2, 3, 33), ("contiguous", "zigzag")):
            found[f"{changes} {length} {order}"] = differences(model, alone, length, order)
    return found


# Every mixer goes on token by token in `tests/models/test_linear_llama3.py`, too.
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(gsa|mamba2)$")
@pytest.mark.parametrize("operator", each_linear_mixer(("linear_attention", "gsa", "mamba2", "kda")))
def test_one_process_writes_what_the_whole_sequence_finds_likeliest(operator: str) -> None:
    """Also for prompts of one token, and those shorter than a window."""
    for changes in PATTERNS:
        model = model_of(operator, **changes)
        for length in (1, 2, 3, 70):
            error, same = differences(model, model, length)
            assert error < 1e-11 and same, (changes, length, error)


LAYERS: dict[str, dict[str, Any]] = {
    "softmax alone": {"pattern": "N"},
    "softmax alone, with a window": {"pattern": "N", "window": 4},
    "several mixers": {"pattern": ("based", "mamba2", "softmax", "deltanet"), "num_layers": 4},
}


@pytest.mark.parametrize("layers", LAYERS)
def test_models_of_softmax_alone_and_of_several_mixers_do_so_too(layers: str) -> None:
    model = tiny_model(**{"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 10, **LAYERS[layers]})
    for length in (1, 2, 3, 70):
        error, same = differences(model, model, length)
        assert error < 1e-11 and same, (length, error)


@pytest.mark.slow_rows(r"^(simple_gla|mamba2|hgrn2)-2")
@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operator", each_linear_mixer())
def test_a_prompt_over_ranks_is_gone_on_with_as_in_one_process(operator: str, num_ranks: int) -> None:
    """On each of the ranks alone; also of a prompt with fewer tokens than there are ranks."""
    for of_rank in run_on_ranks(num_ranks, differences_of_all, operator):
        assert all(error < 1e-11 and same for error, same in of_rank.values()), of_rank


def in_dtype(operator: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of float32 weights computed in a dtype: the logits' difference from those of the whole sequence computed so, and by how much
    of the largest logit the tokens are less likely there than the likeliest."""
    alone = model_of(operator, pattern="LN").float()
    model = parallelize(model_of(operator, pattern="LN").float(), None)
    if dtype != torch.float32:
        compute_in(alone, dtype)
        compute_in(model, dtype)
    prompt = random_tokens(1, 21)[0]
    recorded = Recorded(model)
    made = list(generate(recorded, prompt, max_new_tokens=NUM_NEW))
    want = whole(alone, [*prompt.tolist(), *made])[len(prompt) - 1 : -1]
    less = want.amax(-1) - want.gather(-1, torch.tensor(made)[:, None])[:, 0]
    return relative_error(torch.stack(recorded.logits), want), float(less.max() / want.abs().max())


@pytest.mark.slow_rows(r"^(simple_gla|hgrn2|mamba2)-dtype0")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(simple_gla|hgrn2)-dtype1")
@pytest.mark.parametrize(("dtype", "most", "tie"), [(torch.float32, 1e-4, 0.0), (torch.bfloat16, 0.05, 0.02)])
@pytest.mark.parametrize("operator", each_linear_mixer())
def test_the_same_in_float32_and_bfloat16(operator: str, dtype: torch.dtype, most: float, tie: float) -> None:
    """In bfloat16 two tokens may be as likely but for a rounding."""
    for error, less in run_on_ranks(2, in_dtype, operator, dtype):
        assert error < most and less <= tie


class Noted(Recorded):
    """A model that also notes how many tokens of a call each rank holds."""

    def __init__(self, model: LinearLlama3) -> None:
        super().__init__(model)
        self.held: list[tuple[int, ...]] = []

    def __call__(self, tokens: Tensor, layout: SequenceLayout, **options: Any) -> Any:
        self.held.append(layout.tokens_of)
        return super().__call__(tokens, layout, **options)


def made_with(weights: list[float] | None) -> tuple[tuple[int, ...], list[int]]:
    """How many tokens of a prompt each rank reads, and the tokens behind it."""
    noted = Noted(parallelize(model_of("gla", pattern="LN"), None))
    made = list(generate(noted, random_tokens(1, 33)[0], max_new_tokens=NUM_NEW, weights=weights))
    return noted.held[0], made


def refused_weights(weights: Any, length: int) -> tuple[str, str]:
    model = parallelize(model_of("gla", pattern="LN"), None)
    return raised(lambda: list(generate(model, random_tokens(1, length)[0], max_new_tokens=1, weights=weights)))


def test_ranks_read_a_prompt_in_shares_by_their_weights() -> None:
    even, uneven = (run_on_ranks(2, made_with, weights) for weights in (None, [1.0, 3.0]))
    assert [held for held, _ in even] == [(16, 16)] * 2 and [held for held, _ in uneven] == [(8, 24)] * 2
    assert {tuple(made) for _, made in even} == {tuple(made) for _, made in uneven}
    # Of a prompt with a token for each rank as of one with fewer.
    for length in (33, 2, 1):
        for kind, message in run_on_ranks(2, refused_weights, [1.0], length):
            assert kind == "LayoutError" and "one number for each of the 2 ranks; got 1: [1.0]" in message
    with pytest.raises(LayoutError, match="one number for each of the 1 ranks; got 2"):
        prefill(model_of("gla"), random_tokens(1, 9)[0], weights=[1.0, 3.0])


def alone_after_the_group() -> list[int]:
    model = parallelize(model_of("gla", pattern="LN"), None)
    prompt = random_tokens(1, 9)[0]
    memory = prefill(model, prompt)
    if dist.get_rank():
        return []
    # Nothing more is exchanged: the other rank is gone.
    return list(decode(model, prompt, memory, max_new_tokens=NUM_NEW))


def test_decoding_needs_no_other_rank() -> None:
    model = model_of("gla", pattern="LN")
    want = list(generate(model, random_tokens(1, 9)[0], max_new_tokens=NUM_NEW))
    assert run_on_ranks(2, alone_after_the_group) == [want, []]


def test_linear_layers_take_constant_memory_and_softmax_layers_that_of_what_they_see() -> None:
    def num_bytes(length: int, **changes: Any) -> int:
        memory = prefill(model_of("kda", **changes), random_tokens(1, length)[0])
        assert memory is not None and memory.num_tokens == length - 1
        return memory.num_bytes

    assert num_bytes(10, pattern="L") == num_bytes(60, pattern="L")
    assert num_bytes(10, pattern="LN", window=4) == num_bytes(60, pattern="LN", window=4)
    assert num_bytes(60, pattern="LN") > num_bytes(10, pattern="LN")


SEGMENTS = (3, 7, 16, 40)


def errors_in_segments(layers: dict[str, Any], length: int, order: Any) -> list[float]:
    """What is remembered of a prompt that is read in segments of each of several lengths, and what is computed from it, beside what
    is remembered at once."""
    model, tokens = parallelize(tiny_model(**layers), None), random_tokens(1, length)[0]
    want = prefill(model, tokens, order=order)
    found = []

    def behind(memory: ModelMemory) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(tokens[None, -1:], SequenceLayout.local(1), memory=memory)
        return logits

    for segment_tokens in SEGMENTS:
        got = prefill(model, tokens, order=order, segment_tokens=segment_tokens)
        assert got is not None and want is not None and got.num_tokens == want.num_tokens == length - 1
        pairs = [
            (x, y.tensors[name]) for y, z in zip(want.layers, got.layers, strict=True) for name, x in z.tensors.items()
        ]
        found += [relative_error(x, y) for x, y in pairs] + [relative_error(behind(got), behind(want))]
        assert all(layer.earlier is None for layer in got.layers)
    return found


IN_SEGMENTS: tuple[dict[str, Any], ...] = (
    {"pattern": "LN", "num_layers": 2},
    {"pattern": "LN", "num_layers": 3},
    {"pattern": "LN", "window": 4},
    {"pattern": "LN", "window": 1},
    {"pattern": "L", "operator": "gated_deltanet"},
)


# Each mixer alone runs in make test, below.
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_prompt_in_segments_is_remembered_as_at_once(num_ranks: int) -> None:
    """Also where the last segment is shorter than the ranks are many, and where one segment holds all."""
    for layers in IN_SEGMENTS:
        for order, length in (("zigzag", 23), ("contiguous", 30)):
            for errors in run_on_ranks(num_ranks, errors_in_segments, layers, length, order):
                assert len(errors) >= len(SEGMENTS) and worst(errors) < 1e-11, (layers, errors)


@pytest.mark.slow_rows(r"^(lightning|retention|simple_gla|gla|rebased|deltanet|deltaproduct)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(gsa|based|mamba|linear_attention)$")
@pytest.mark.parametrize("operator", [each for each in LINEAR_MIXERS if each not in ("gated_deltanet",)])
def test_every_mixer_reads_a_prompt_in_segments(operator: str) -> None:
    assert (
        worst(run_on_ranks(1, errors_in_segments, {"pattern": "L", "operator": operator}, 23, "contiguous")[0]) < 1e-11
    )


def test_no_more_tokens_than_a_segments_are_computed_at_once() -> None:
    model = tiny_model(pattern="LN")
    seen: list[int] = []
    model.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    prefill(model, random_tokens(1, 50)[0], segment_tokens=16)
    assert [tokens for tokens in seen if tokens] == [16, 16, 16, 1]


def heard_of_a_prompt() -> list[SegmentDone]:
    """The segments of a prompt, of which one between two is given up first."""
    model, tokens = parallelize(tiny_model(pattern="LN"), None), random_tokens(1, 24)[0]
    want = prefill(model, tokens)

    def stop(done: SegmentDone) -> None:
        if done.segment == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        prefill(model, tokens, segment_tokens=8, between=stop)
    heard: list[SegmentDone] = []
    found = prefill(model, tokens, segment_tokens=8, between=heard.append)
    assert found is not None and want is not None
    for layer, expected in zip(found.layers, want.layers, strict=True):
        assert worst(relative_error(x, expected.tensors[name]) for name, x in layer.tensors.items()) < 1e-11
    return heard


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_prompt_is_heard_of_between_its_segments_and_may_end_there(num_ranks: int) -> None:
    for heard in run_on_ranks(num_ranks, heard_of_a_prompt):
        assert heard == [SegmentDone("forward", segment, 3) for segment in range(3)]


def test_a_prompt_at_once_is_heard_of_once() -> None:
    model, tokens = tiny_model(), random_tokens(1, 24)[0]
    heard: list[SegmentDone] = []
    next(generate(model, tokens, between=heard.append))
    assert heard == [SegmentDone("forward", 0, 1)]


@pytest.mark.parametrize("segment_tokens", [0, -1, 2.5, True, "8"])
def test_segments_of_no_number_of_tokens_are_refused(segment_tokens: Any) -> None:
    with pytest.raises(InputError, match="segment_tokens must be a positive int"):
        prefill(tiny_model(), random_tokens(1, 5)[0], segment_tokens=segment_tokens)


def test_a_model_that_cannot_go_on_with_a_segment_is_refused() -> None:
    with pytest.raises(InputError, match=r"by empty_memory\(\) and whole_memory\(\).*; got Recorded"):
        prefill(Recorded(tiny_model()), random_tokens(1, 9)[0], segment_tokens=4)


def refused_segments() -> str:
    model = parallelize(tiny_model(), None)
    return raised(lambda: prefill(model, random_tokens(1, 9)[0], segment_tokens=1))[1]


def test_segments_of_fewer_tokens_than_ranks_are_refused() -> None:
    for message in run_on_ranks(2, refused_segments):
        assert "fewer than the 2 ranks" in message and "The least that works is 2" in message


def test_a_prompt_makes_no_logits() -> None:
    model, tokens = model_of("gla", pattern="LN"), random_tokens(2, 9)
    with torch.no_grad():
        want = model(tokens)
        for kept in (0, 2, 9):
            found, memory = model(tokens, logits_to_keep=kept, output_memory=True)
            assert found.shape == (2, kept, 29) and memory.num_tokens == 9
            assert kept == 0 or relative_error(found, want[:, 9 - kept :]) < 1e-12
    for bad in (-1, 10, True, 1.0):
        with pytest.raises(InputError, match="logits_to_keep must be an int from 0 to the number of tokens here, 9"):
            model(tokens, logits_to_keep=bad)
    with pytest.raises(InputError, match="logits_to_keep is for logits; got 1"):
        model(tokens, labels=tokens, logits_to_keep=1)


def memories_of_a_prompt(window: int | None) -> tuple[list[float], list[bool]]:
    """What is remembered of a prompt in two calls, without logits beside with some; and whether the last block's parts ran."""
    model = parallelize(tiny_model(num_layers=2, pattern="LN", window=window, num_experts=2), None)
    ran: list[bool] = []
    for part in ("feed_forward", "mixer.out_proj"):
        model.blocks[-1].get_submodule(part).register_forward_hook(lambda *_: ran.append(True))
    tokens = random_tokens(1, 23)
    place = model.sequence_parallel
    assert place is not None
    layout = SequenceLayout(23, place.group, "zigzag", [0, 9, 23], continues=0)
    found: list[float] = []
    seen: list[bool] = []
    for in_segments in (False, True):
        memories: list[ModelMemory | None] = [model.empty_memory() if in_segments else None] * 2
        for start, stop in ((0, 14), (14, 23)):
            stretch = layout.stretch(start, stop)
            for kept in (1, 0):
                ran.clear()
                with torch.no_grad():
                    memories[kept] = model(
                        stretch.shard(tokens[:, start:stop]),
                        stretch,
                        memory=memories[kept],
                        logits_to_keep=kept,
                        output_memory=True,
                        in_segments=in_segments,
                    )[1]
                seen.append(bool(ran) == bool(kept))
        got, want = memories
        assert got is not None and want is not None
        if in_segments:
            got, want = model.whole_memory(got, layout), model.whole_memory(want, layout)
        for layer, expected in zip(got.layers, want.layers, strict=True):
            assert layer.tensors.keys() == expected.tensors.keys() and layer.tensors
            found += [relative_error(x, expected.tensors[name]) for name, x in layer.tensors.items()]
    return found, seen


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("window", [None, 4])
def test_of_a_prompt_the_last_block_computes_what_is_remembered_alone(num_ranks: int, window: int | None) -> None:
    for errors, seen in run_on_ranks(num_ranks, memories_of_a_prompt, window):
        assert worst(errors) == 0.0 and all(seen)


class Counter:
    """Gives the token after the last one by far the largest logit; from `ends_at` on, NaN."""

    sequence_parallel: SequenceParallel | None = None

    def __init__(self, ends_at: int) -> None:
        self.ends_at = ends_at

    def __call__(
        self,
        tokens: Tensor,
        layout: SequenceLayout,
        *,
        memory: ModelMemory | None,
        logits_to_keep: int,
        output_memory: bool,
    ) -> tuple[Tensor, ModelMemory]:
        seen = 0 if memory is None else memory.num_tokens
        last = tokens[:, tokens.shape[1] - logits_to_keep :]
        logits = 1e4 * nn.functional.one_hot((last + 1) % 257, 257).float()
        found = torch.where(last[..., None] >= self.ends_at, torch.nan, logits)
        return found, ModelMemory(seen + tokens.shape[1], ())


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-30, 0.8])
def test_a_token_is_likely_at_every_temperature(temperature: float) -> None:
    tokens = generate(Counter(255), torch.tensor([5, 97]), sampling=Sampling(temperature), max_new_tokens=3)
    assert list(tokens) == [98, 99, 100]


def test_tokens_end_at_the_number_at_the_end_and_where_there_are_no_numbers() -> None:
    prompt = torch.tensor([97])
    assert list(generate(Counter(255), prompt, max_new_tokens=1)) == [98]
    assert list(generate(Counter(255), prompt, end=100)) == [98, 99]
    assert list(itertools.islice(generate(Counter(255), prompt), 5)) == [98, 99, 100, 101, 102]
    tokens = generate(Counter(99), prompt, max_new_tokens=9)
    assert [next(tokens), next(tokens)] == [98, 99]
    with pytest.raises(NonFiniteError, match="the logits behind 3 tokens are not finite"):
        next(tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, .*; got -0.1"),
        ({"temperature": float("nan")}, "temperature must be .*; got nan"),
        ({"temperature": float("inf")}, "temperature must be .*; got inf"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be greater than 0 and at most 1, .*; got 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be greater than 0 and at most 1, .*; got 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "top_k must be a whole number of tokens, or 0 for all; got -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0; 1 is none; got 0.0"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"top_k": 5}, "top_k is 5, which chooses among tokens, but temperature 0 always takes the likeliest one"),
        ({"top_p": 0.5}, "top_p is 0.5, which chooses among tokens, but temperature 0"),
    ],
)
def test_sampling_out_of_range_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**values)


def test_prompts_and_numbers_that_do_not_fit_are_refused() -> None:
    model = model_of("gla", pattern="L")
    for bad in (torch.zeros(0, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3), [1, 2]):
        with pytest.raises(InputError, match=r"tokens must be|at least one token"):
            generate(model, bad)  # type: ignore[arg-type]
    for number in (0, -1, 1.5):
        with pytest.raises(InputError, match="max_new_tokens must be a positive int"):
            generate(model, random_tokens(1, 3)[0], max_new_tokens=number)  # type: ignore[arg-type]


def chosen(logits: Tensor, seen: Tensor, sampling: Sampling, count: int = 3000) -> Tensor:
    """How often each token is chosen."""
    random = torch.Generator().manual_seed(sampling.seed)
    return torch.bincount(
        torch.tensor([sampling.choose(logits, seen, random) for _ in range(count)]), minlength=len(logits)
    )


# The fourth has all that the second and the third have.
@pytest.mark.slow_rows(r"^values[12]$")
@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.3, "top_p": 0.6},
        {"temperature": 0.9, "top_k": 6, "top_p": 0.7, "repetition_penalty": 1.5},
        {"temperature": 1.0, "repetition_penalty": 0.5},
    ],
)
def test_tokens_are_chosen_as_often_as_transformers_would(values: dict[str, Any]) -> None:
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(4))
    there = torch.tensor([[0, 3, 5, 5, 11]])
    seen = torch.zeros(12, dtype=torch.bool)
    seen[there[0]] = True
    sampling = Sampling(**values)
    processors = LogitsProcessorList()
    processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    want = processors(there, logits[None].clone())[0].double().softmax(-1)
    found = chosen(logits, seen, sampling)
    assert not found[want == 0].any()
    assert relative_error(found / 3000, want) < 0.08


def test_a_penalty_changes_the_likeliest_token_and_a_seed_the_chosen_ones() -> None:
    logits, seen = torch.tensor([2.0, 1.5, -3.0]), torch.tensor([True, False, True])
    random = torch.Generator()
    assert Sampling().choose(logits, seen, random) == 0
    assert Sampling(repetition_penalty=2.0).choose(logits, seen, random) == 1
    model, prompt = model_of("gla", pattern="L"), random_tokens(1, 5)[0]

    def made(seed: int) -> list[int]:
        return list(generate(model, prompt, sampling=Sampling(2.0, seed=seed), max_new_tokens=12))

    assert made(0) == made(0) != made(1)
