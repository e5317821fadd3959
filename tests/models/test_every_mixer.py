"""Every mixer can be layers of a model, over ranks, in documents, and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan import SequenceLayout, parallelize, sum_gradients
from longspan.errors import ConfigError
from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config, ModelMemory
from longspan.models.gates import ChannelDecayGate, StepDecay, WriteStrength
from tests.compare import relative_error, worst
from tests.models.tiny import LINEAR_MIXERS, random_tokens, tiny_model
from tests.ranks import run_on_ranks


def test_a_mixer_is_listed_by_its_name() -> None:
    assert all(mixer.name == name for name, mixer in MIXERS.items())


def test_an_unknown_mixer_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError) as caught:
        LinearLlama3Config(vocab_size=50, operator="delta")
    assert all(name in str(caught.value) for name in (*LINEAR_MIXERS, "got 'delta'. Did you mean 'deltanet'?"))


def model_of(operator: str) -> LinearLlama3:
    """A head size of its own, larger than dim / num_heads, so that a gate of another size would show; and two linear layers."""
    return tiny_model(operator=operator, pattern="LNL", num_layers=3, num_heads=2, num_kv_heads=1, head_dim=10)


def gradients_and_logits(
    model: LinearLlama3, tokens: Tensor, layout: SequenceLayout, upstream: Tensor
) -> dict[str, Tensor]:
    logits = model(layout.shard(tokens), layout=layout)
    logits.backward(layout.shard(upstream))
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def differences_on_rank(operator: str, order: Any, documents: tuple[int, ...] | None) -> dict[str, float]:
    tokens = random_tokens(1 if documents else 2, 75)
    generator = torch.Generator().manual_seed(dist.get_world_size())
    upstream = torch.randn(*tokens.shape, 29, generator=generator, dtype=torch.float64)
    want = gradients_and_logits(model_of(operator), tokens, SequenceLayout.local(75, documents), upstream)

    model = parallelize(model_of(operator), None)
    layout = SequenceLayout(75, order=order, documents=documents)
    got = gradients_and_logits(model, tokens, layout, upstream)
    sum_gradients(model)
    want["logits"] = layout.shard(want["logits"])
    assert all(bool(value.abs().max() > 0) for value in want.values())
    return {name: relative_error(got[name], want[name]) for name in want}


LAYOUTS = (("contiguous", None), ("zigzag", None), ("zigzag", (0, 1, 30, 52, 75)))


@pytest.mark.slow_rows(r"^(rebased|gla|deltanet|lightning)-2$", r"-1$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(retention|linear_attention|simple_gla|hgrn2|gated_deltanet|deltaproduct)-2$")
@pytest.mark.parametrize("num_ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("operator", LINEAR_MIXERS)
def test_ranks_equal_one_process(operator: str, num_ranks: int) -> None:
    for order, documents in LAYOUTS if num_ranks > 1 else LAYOUTS[2:]:
        for differences in run_on_ranks(num_ranks, differences_on_rank, operator, order, documents):
            assert worst(differences) < 1e-10, (order, documents, differences)


@pytest.mark.slow_rows(r"^(linear_attention|gated_deltanet|kda|based|chela|rwkv7|mamba|mamba2)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gsa$")
@pytest.mark.parametrize("operator", LINEAR_MIXERS)
def test_token_by_token_a_model_gives_the_logits_of_one_call(operator: str) -> None:
    model, tokens = model_of(operator), random_tokens(2, 70)
    memory: ModelMemory | None = None
    found = []
    with torch.no_grad():
        want = model(tokens)
        for position in range(70):
            logits, memory = model(tokens[:, [position]], memory=memory, output_memory=True)
            found.append(logits)
    got = torch.cat(found, dim=1)
    assert want.abs().max() > 0.1
    assert relative_error(got, want) < 1e-11


def test_gates_of_a_bfloat16_layer_are_float32() -> None:
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    decay, strength = ChannelDecayGate(16, 4, 6).bfloat16(), WriteStrength(16, 4).bfloat16()
    g, beta = decay(x)["g"], strength(x)["beta"]
    assert g.shape == (2, 30, 4, 6)
    assert beta.shape == (2, 30, 4)
    assert g.dtype == beta.dtype == torch.float32
    assert (g < 0).all()
    steps = StepDecay(4, 4)
    with torch.no_grad():
        steps.draw_parameters(torch.Generator().manual_seed(0))
    size, of_channels = steps.bfloat16()(x)
    assert size.shape == of_channels.shape == (2, 30, 4, 4)
    assert size.dtype == of_channels.dtype == torch.float32
    assert (of_channels < 0).all() and (size > 0).all()


def test_channel_decays_start_at_the_stated_time_constant() -> None:
    g = ChannelDecayGate(16, 4, 6)(torch.zeros(1, 1, 16))["g"]
    torch.testing.assert_close(-1 / g, torch.full_like(g, 23.08), rtol=1e-3, atol=0)
