"""The model on one device: what it computes, how it starts, decodes and learns."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.errors import InputError, LayoutError
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3, LinearLlama3Config, ModelMemory
from longspan.models.gates import ScalarDecayGate
from longspan.models.mixers.retention import RetentionMixer
from longspan.models.rotary import rotate, rotation
from tests.compare import relative_error, worst
from tests.models.tiny import LINEAR_MIXERS, random_tokens, tiny_model

HYBRIDS: list[dict[str, Any]] = [
    *({"operator": operator} for operator in LINEAR_MIXERS),
    {"pattern": "NL", "operator": ("retention", "simple_gla"), "num_kv_heads": None, "tie_embeddings": True},
    {"pattern": "N", "num_kv_heads": 1, "head_dim": 6},
    {"pattern": "LN", "window": 20},
]


def decoded(model: LinearLlama3, tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ModelMemory]:
    """Logits of the tokens taken in so many at a time, and what is remembered of all."""
    memory: ModelMemory | None = None
    logits = []
    for part in tokens.split(lengths, dim=1):
        found, memory = model(part, memory=memory, output_memory=True)
        logits.append(found)
    assert memory is not None
    return torch.cat(logits, dim=1), memory


@pytest.mark.slow_rows(r"'operator': '(lightning|retention|simple_gla|gla|rebased|deltanet|deltaproduct|hgrn2)'")
@pytest.mark.parametrize("changes", HYBRIDS, ids=str)
def test_a_prompt_and_then_token_by_token_gives_the_logits_of_one_call(changes: dict[str, Any]) -> None:
    model, tokens = tiny_model(**changes), random_tokens(2, 100)
    with torch.no_grad():
        want, memory = model(tokens, output_memory=True)
        got, after = decoded(model, tokens, [70, 3, *[1] * 27])
    assert want.abs().max() > 0.1
    assert relative_error(got, want) < 1e-11
    assert after.num_tokens == memory.num_tokens == 100
    for one, other in zip(after.layers, memory.layers, strict=True):
        assert worst(relative_error(one.tensors[name], other.tensors[name]) for name in other.tensors) < 1e-11


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"'operator': '(deltanet|rebased|gla|simple_gla|lightning|retention|gated_deltanet)'")
@pytest.mark.parametrize("changes", HYBRIDS, ids=str)
def test_segments_of_time_give_the_gradients_of_one_call(changes: dict[str, Any]) -> None:
    model, alone, tokens = tiny_model(**changes), tiny_model(**changes), random_tokens(2, 60)
    upstream = torch.randn(2, 60, 29, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, _ = decoded(model, tokens, [25, 20, 15])
    got.backward(upstream)
    alone(tokens).backward(upstream)
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        assert relative_error(parameter.grad, expected.grad) < 1e-10, name


def test_a_detached_memory_ends_a_segments_gradients() -> None:
    model, tokens = tiny_model(), random_tokens(1, 12)
    _, memory = model(tokens, output_memory=True)
    assert all(x.requires_grad for layer in memory.layers for x in layer.tensors.values())
    detached = memory.detach()
    assert not any(x.requires_grad for layer in detached.layers for x in layer.tensors.values())
    (kept,), (cut,) = (model(tokens[:, :1], memory=m)[:, 0].detach() for m in (memory, detached))
    assert torch.equal(kept, cut)


def test_a_linear_layers_memory_does_not_grow_and_a_softmax_layers_does() -> None:
    model, tokens = tiny_model(pattern="LN", num_layers=2), random_tokens(1, 100)
    with torch.no_grad():
        memories = [decoded(model, tokens[:, :length], [length])[1] for length in (1, 50, 100)]
    assert [memory.layers[0].num_bytes for memory in memories] == [4 * 4 * 4 * 8] * 3
    assert [memory.layers[1].num_bytes for memory in memories] == [2 * length * 2 * 4 * 8 for length in (1, 50, 100)]


def test_a_softmax_layers_memory_holds_no_more_than_its_window_needs() -> None:
    model, tokens = tiny_model(pattern="N", window=20), random_tokens(1, 60)
    with torch.no_grad():
        _, memory = decoded(model, tokens, [1] * 60)
    assert {x.shape[1] for layer in memory.layers for x in layer.tensors.values()} == {19}


@pytest.mark.parametrize("changes", HYBRIDS, ids=str)
def test_no_token_sees_a_later_one(changes: dict[str, Any]) -> None:
    model, tokens = tiny_model(**changes), random_tokens(1, 80)
    changed = tokens.clone()
    changed[0, 50] = (changed[0, 50] + 1) % 29
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    errors = [relative_error(after[:, position], before[:, position]) for position in range(80)]
    # A chunk form may scale by decays that come later in the chunk: its roundings differ, nothing else.
    assert worst(errors[:50]) < 1e-13
    assert min(errors[50:]) > 1e-9


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"'operator': '(deltaproduct|chela|kda|gsa)'")
@pytest.mark.parametrize("changes", HYBRIDS, ids=str)
def test_packed_documents_are_as_if_each_were_alone(changes: dict[str, Any]) -> None:
    model, tokens = tiny_model(**changes), random_tokens(1, 90)
    documents = (0, 1, 30, 90)
    with torch.no_grad():
        packed = model(tokens, layout=SequenceLayout.local(90, documents))
        alone = [model(tokens[:, start:stop]) for start, stop in pairwise(documents)]
    assert relative_error(packed, torch.cat(alone, dim=1)) < 1e-11


@pytest.mark.parametrize("operator", LINEAR_MIXERS)
def test_initial_weights_depend_on_the_seed_alone(operator: str) -> None:
    config = LinearLlama3Config(vocab_size=50, dim=32, hidden_dim=48, operator=operator)
    model, other = LinearLlama3(config), LinearLlama3(config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(99)
    model.init_weights(3)
    torch.manual_seed(1)
    other.init_weights(3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    model.init_weights(4)
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_tied_embeddings_share_one_matrix() -> None:
    tied, untied = (
        LinearLlama3(LinearLlama3Config(vocab_size=50, dim=32, hidden_dim=48, tie_embeddings=tie))
        for tie in (True, False)
    )
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 50 * 32
    assert 0.015 < tied.head.weight.std() < 0.025


def test_number_of_parameters_and_operations() -> None:
    config = LinearLlama3Config(
        vocab_size=50,
        dim=32,
        num_layers=2,
        pattern="LN",
        num_heads=4,
        num_kv_heads=2,
        hidden_dim=48,
        operator="linear_attention",
    )
    model = LinearLlama3(config)
    feed_forward, head = 3 * 32 * 48, 50 * 32
    linear_matrices, softmax_matrices = 4 * 32 * 32, 2 * 32 * 32 + 2 * 32 * 16
    matrices = linear_matrices + softmax_matrices + 2 * feed_forward + head
    assert model.num_parameters() == matrices + 50 * 32 + 5 * 32 + 8
    # For each of 32 inner channels: one state row of 8 in the linear layer, 100 keys on average in the softmax layer.
    assert model.flops_per_token(200) == 6 * matrices + 12 * 32 * 8 + 12 * 32 * 100
    windowed = LinearLlama3(dataclasses.replace(config, window=50))
    # 50 keys, and on average 25 for the first 50 of 200 tokens.
    assert windowed.flops_per_token(200) == 6 * matrices + 12 * 32 * 8 + 12 * 32 * (50 * 0.75 + 25 * 0.25)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(simple_gla|deltaproduct|gated_deltanet|retention|rebased|mamba|gla|lightning|deltanet)$")
@pytest.mark.parametrize("operator", LINEAR_MIXERS)
def test_a_bfloat16_model_stays_close_to_float32(operator: str) -> None:
    """Norms, decays and angles of a bfloat16 model are computed in float32, so a long sequence does not drift."""
    config = LinearLlama3Config(vocab_size=29, dim=32, hidden_dim=48, operator=operator)
    model = LinearLlama3(config)
    tokens = random_tokens(1, 700)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        want = model(tokens)
        got = model.bfloat16()(tokens)
    assert got.dtype == torch.float32
    # HGRN2 makes decays and keys of one logit, which bfloat16 rounds; CHELA rounds two convolutions.
    assert relative_error(got, want) < {"hgrn2": 0.07, "chela": 0.06}.get(operator, 0.04)


def test_decays_are_float32_in_a_bfloat16_model() -> None:
    config = LinearLlama3Config(vocab_size=5, dim=32, num_heads=8, operator="retention")
    fixed, scalar = RetentionMixer(config, 0).bfloat16(), ScalarDecayGate(16, 4).bfloat16()
    log_decay = torch.tensor(fixed.log_decay)
    torch.testing.assert_close(log_decay.exp(), 1 - 2.0 ** -torch.arange(5.0, 13.0))
    g = scalar(torch.randn(2, 300, 16, dtype=torch.bfloat16))["g"]
    assert g.dtype == torch.float32
    assert (g <= 0).all()


def test_scalar_decay_starts_with_mamba_2s_steps() -> None:
    decay = ScalarDecayGate(16, 3).double()
    g = decay(torch.zeros(1, 1, 16, dtype=torch.float64))["g"]
    torch.testing.assert_close(g[0, 0], -torch.tensor([0.001, 8.5 * 0.01, 1.6], dtype=torch.float64), rtol=1e-5, atol=0)


def test_rotary_embedding_keeps_relative_positions_exact_a_million_tokens_on() -> None:
    q, k = (torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    scores = []
    for start in (0, 1_000_000):
        at = rotation(torch.tensor([start + 5]), 64, 10_000.0, torch.float32)
        before = rotation(torch.tensor([start]), 64, 10_000.0, torch.float32)
        scores.append((rotate(q, at) * rotate(k, before)).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-5)
    assert not torch.allclose(scores[0], (q * k).sum(), atol=1e-2)


@pytest.mark.slow_rows(r"^(deltanet|deltaproduct|gated_deltanet|simple_gla|rebased|retention|gla|lightning)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(gsa|linear_attention|rwkv7|mamba|hgrn2|based)$")
@pytest.mark.parametrize("operator", LINEAR_MIXERS)
def test_the_loss_falls_on_a_text_that_repeats(operator: str) -> None:
    config = LinearLlama3Config(vocab_size=29, dim=32, num_layers=2, pattern="LN", hidden_dim=64, operator=operator)
    model = LinearLlama3(config)
    tokens = random_tokens(1, 16).repeat(1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    # What has neither a gate on its output nor a kernel that tells keys apart takes longer, most of all what forgets nothing.
    for _ in range({"linear_attention": 100, "gsa": 40}.get(operator, 20)):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.tensor(29.0).log()) < 0.2
    assert losses[-1] < 0.3 * losses[0]


def test_a_first_call_in_inference_mode_does_not_spoil_training() -> None:
    model, tokens = tiny_model(operator="retention"), random_tokens(1, 20)
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), r"tokens must be int64 \[B, T\]; got torch.int64 of shape \(5,\)"),
        (torch.zeros(1, 5), r"tokens must be int64 \[B, T\]; got torch.float32"),
    ],
)
def test_tokens_of_another_form_are_refused(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_model()(tokens)


def test_a_memory_that_does_not_fit_is_refused() -> None:
    model, tokens = tiny_model(), random_tokens(1, 4)
    _, memory = model(tokens, output_memory=True)
    wrong: Any = memory.layers
    with pytest.raises(InputError, match="memory must be what a call with output_memory=True returned, or None; got"):
        model(tokens, memory=wrong)
    with pytest.raises(InputError, match="one part for each of the 4 layers; got 3"):
        model(tokens, memory=ModelMemory(4, memory.layers[:3]))
    with pytest.raises(InputError, match=r"initial_state must be \[B, H, K, V\] = \(2, 4, 4, 4\)"):
        model(random_tokens(2, 4), memory=memory)
    with pytest.raises(InputError, match="continues a document of 3 earlier tokens, and nothing is remembered of them"):
        model(tokens, SequenceLayout.local(4, [0, 1, 4], continues=3))


@pytest.mark.parametrize("documents", [(0, 9), (0, 3, 4, 9), (0, 5, 9)])
def test_packed_documents_go_on_from_what_is_remembered(documents: tuple[int, ...]) -> None:
    """Given by the layout of a stretch, or by packed documents and a memory alone."""
    model, tokens = tiny_model(pattern="LN", window=4), random_tokens(1, 9)
    whole = SequenceLayout.local(9, documents)
    want = model(tokens, whole)
    for cut in (2, 4, 5):
        first, rest = whole.stretch(0, cut), whole.stretch(cut, 9)
        start, memory = model(tokens[:, :cut], first, output_memory=True)
        (end, _) = model(tokens[:, cut:], rest, memory=memory, output_memory=True)
        assert relative_error(torch.cat([start, end], dim=1), want) <= 1e-12
        if rest.continues and rest.num_documents > 1:
            again = model(tokens[:, cut:], SequenceLayout.local(9 - cut, rest.documents), memory=memory)
            assert torch.equal(again, end)


def test_a_layout_of_another_length_is_refused() -> None:
    with pytest.raises(LayoutError, match="the model takes the 8 tokens"):
        tiny_model()(random_tokens(1, 7), layout=SequenceLayout.local(8))


def test_a_layout_of_several_ranks_needs_a_parallelized_model() -> None:
    layout = SequenceLayout.for_rank(8, 2, 0)
    with pytest.raises(
        LayoutError, match=r"over 2 ranks, and the model is not parallelized. Call longspan.parallelize"
    ):
        tiny_model()(random_tokens(1, 4), layout=layout)
