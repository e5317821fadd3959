"""Each mixer is the layer of its paper, output and gradients; it starts as the paper says, and is as large."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longspan
from longspan.features import hgrn2_lower_bounds
from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config, num_parameters
from longspan.models.mixers import Context
from longspan.models.rotary import rotation
from tests.compare import relative_error, worst
from tests.models.references import REFERENCES, Sizes

LENGTH, LAYER = 23, 2
CONFIG = LinearLlama3Config(
    vocab_size=5, dim=12, num_layers=4, pattern="L", num_heads=4, num_kv_heads=2, head_dim=6, hidden_dim=8, window=5
)


def of_mixer(name: str) -> LinearLlama3Config:
    return dataclasses.replace(CONFIG, pattern=(name,))


def random_weights(module: nn.Module) -> None:
    """Values of every parameter that matter and do not overflow."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)


def values_of_the_first_layer() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    shape = (2, LENGTH, CONFIG.num_heads * CONFIG.size_of_head)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def inputs_and_upstream() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, upstream = torch.randn(2, 2, LENGTH, CONFIG.dim, generator=generator, dtype=torch.float64)
    return x, upstream


@pytest.mark.parametrize(("name", "layer"), [*((name, LAYER) for name in MIXERS), ("rwkv7", 0)])
def test_a_mixer_is_the_layer_of_its_paper(name: str, layer: int) -> None:
    model = LinearLlama3(of_mixer(name)).double()
    random_weights(model)
    mixer: Any = model.blocks[layer].mixer
    logits = [p for key, p in model.named_parameters() if key.startswith("shared")]
    leaves = {**dict(mixer.named_parameters()), **dict(enumerate(logits))}
    values = None
    if mixer.takes_on:
        values = leaves["first values"] = values_of_the_first_layer()
    x, upstream = inputs_and_upstream()
    x.requires_grad_()
    positions = torch.arange(LENGTH)
    turned = rotation(positions, CONFIG.size_of_head, CONFIG.rope_theta, torch.float64)

    shared = {kind: module() for kind, module in model.shared.items()}
    got, _, *more = mixer(x, Context(None, positions, turned, shared=shared), values)
    # The definition of the bounds has a test of its own.
    bounds = hgrn2_lower_bounds(logits[0]) if logits else None
    sizes = Sizes(CONFIG.num_heads, CONFIG.size_of_head, layer, CONFIG.num_layers, CONFIG.norm_eps, bounds, values)
    want = REFERENCES[name](x, dict(mixer.named_parameters()), sizes)

    assert want.abs().max() > 0.1
    assert relative_error(got, want) < 1e-11
    assert len(more) == mixer.hands_on
    wanted = torch.autograd.grad(want, [x, *leaves.values()], upstream)
    found = torch.autograd.grad(got, [x, *leaves.values()], upstream)
    assert all(bool(gradient.abs().max() > 0) for gradient in wanted)
    assert worst([relative_error(one, other) for one, other in zip(found, wanted, strict=True)]) < 1e-9


def test_the_first_layer_of_rwkv7_hands_its_values_to_all_others() -> None:
    """Whatever other layers are between them."""
    config = dataclasses.replace(CONFIG, num_layers=5, pattern=("softmax", "rwkv7", "gla", "rwkv7", "rwkv7"))
    model = LinearLlama3(config).double()
    random_weights(model)
    kinds: list[Any] = [block.mixer for block in model.blocks]
    assert [(mixer.hands_on, mixer.takes_on) for mixer in kinds if mixer.name == "rwkv7"] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    given: list[tuple[Tensor, ...]] = []
    for mixer in kinds:
        mixer.register_forward_pre_hook(lambda module, arguments: given.append(arguments[2:]))
    made: list[Tensor] = []
    kinds[1].register_forward_hook(lambda module, arguments, output: made.append(output[2]))
    model(torch.arange(5)[None])
    assert [len(each) for each in given] == [0, 0, 0, 1, 1]
    assert all(each[0] is made[0] for each in given[3:])


def test_one_layer_of_rwkv7_hands_nothing_on() -> None:
    mixer: Any = LinearLlama3(dataclasses.replace(of_mixer("rwkv7"), num_layers=1)).blocks[0].mixer
    assert not mixer.hands_on and not mixer.takes_on
    assert not [name for name, _ in mixer.named_parameters() if "value" in name]


def test_every_mixer_has_a_reference() -> None:
    assert set(REFERENCES) == set(MIXERS)


def mixer_of(name: str, **changes: Any) -> Any:
    config = dataclasses.replace(of_mixer(name), **changes)
    with torch.random.fork_rng(devices=[]):
        return LinearLlama3(config).blocks[0].mixer


C, H = 64, 4
PAPERS = {
    # Of C channels in H heads: matrices, as the papers count them, and the smaller parts.
    "linear_attention": 4 * C * C + C // H,
    "lightning": 5 * C * C + C,
    "retention": 8 * C * C,
    "gla": 4 * C * C + (16 * C + 16 * C // 2 + C // 2) + C // H,
    # 64 slots of a head.
    "gsa": 4 * C * C + 64 * H * C + C,
    "based": 2 * C * C + 2 * C * 16 * H,
    "rebased": 2 * C * C + 2 * C * 16 * H + 2 * 16,
    "hgrn2": 4 * C * C + C,
    # [u, z] and out, to Δ of rank C/16, B and C and from Δ; taps and biases; A, Δ and D of 2 C channels.
    "mamba": 6 * C * C + 2 * C * (2 * C // 16 + 2 * 16) + 5 * 2 * C + 2 * C * (16 + 1 + 1),
    # [z, x, B, C, dt] and out; taps and biases; A, Δ, D of 2 H heads; the norm.
    "mamba2": 6 * C * C + C * (2 * 128 + 2 * H) + 5 * (2 * C + 256) + 3 * 2 * H + 2 * C,
    "deltanet": 4 * C * C + H * C + 4 * 3 * C + C // H,
    "gated_deltanet": 8 * C * C + 2 * H * C + 4 * 4 * C + 2 * H + 2 * C // H,
    # Two keys and two values a token.
    "deltaproduct": 11 * C * C + 3 * H * C + 4 * 7 * C + 2 * H + 2 * C // H,
    # Three ranks of 32 at this size; six shifts; seven numbers of each channel.
    "rwkv7": 4 * C * C + 2 * 3 * 32 * C + 6 * C + 7 * C,
    "kda": 4 * C * C + 2 * 2 * C * (C // H) + H * C + 4 * 3 * C + C + H + C // H,
    # Four taps and sixteen exponentials of each channel.
    "chela": 5 * C * C + (4 + 2 * 16) * C + C // H,
    "softmax": 4 * C * C,
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_mixer_has_as_many_parameters_as_its_paper_says(name: str) -> None:
    mixer = mixer_of(name, dim=C, num_heads=H, num_kv_heads=H, head_dim=C // H)
    assert sum(parameter.numel() for parameter in mixer.parameters()) == PAPERS[name]


def test_gated_deltanet_has_six_squares_with_three_quarters_of_the_heads() -> None:
    mixer = mixer_of("gated_deltanet", dim=64, num_heads=3, num_kv_heads=3, head_dim=16)
    matrices = sum(p.numel() for key, p in mixer.named_parameters() if key.split(".")[0] in PROJECTIONS)
    assert matrices == 6 * 64 * 64


PROJECTIONS = {"q_proj", "k_proj", "v_proj", "gate_proj", "out_proj"}


def test_hgrn2_layers_share_bounds_that_rise_from_zero_in_equal_steps() -> None:
    four = LinearLlama3(of_mixer("hgrn2"))
    bounds = hgrn2_lower_bounds(four.shared["hgrn2"]())
    torch.testing.assert_close(bounds[:, 0], torch.tensor([0.0, 0.25, 0.5, 0.75]))
    assert len(LinearLlama3(dataclasses.replace(CONFIG, pattern=("hgrn2", "gla", "gla", "gla"))).shared) == 0
    hybrid = LinearLlama3(dataclasses.replace(CONFIG, pattern=("softmax", "hgrn2")))
    assert [getattr(block.mixer, "number", None) for block in hybrid.blocks] == [None, 0, None, 1]
    assert hybrid.shared["hgrn2"]().shape == (2, 24)


def test_lightning_layers_forget_less_with_depth_and_the_last_one_hardly_at_all() -> None:
    blocks: Any = LinearLlama3(of_mixer("lightning")).blocks
    slowest = [block.mixer.log_decay[0] for block in blocks]
    assert slowest == sorted(slowest) and -1e-5 < slowest[-1] < 0 and slowest[0] < -0.2


@pytest.mark.parametrize(
    ("name", "least", "num_heads"),
    [("mamba2", 1.0, 64), ("kda", 1.0, 64), ("gated_deltanet", 0.0, 64), ("deltaproduct", 0.0, 256)],
)
def test_steps_and_rates_start_as_mamba_2s(name: str, least: float, num_heads: int) -> None:
    decay = mixer_of(name, num_heads=num_heads, num_kv_heads=num_heads, head_dim=2, dim=128).decay
    rates, steps = decay.A_log.exp(), torch.nn.functional.softplus(decay.dt_bias)
    assert least <= rates.min() < least + 2 and 14 < rates.max() <= 16
    assert 0.00099 < steps.min() < 0.0015 and 0.06 < steps.max() < 0.101
    # Uniform in the logarithm: half of them on either side of the middle.
    assert 0.35 < (steps.log() < math.log(1e-2)).double().mean() < 0.65


def test_mamba_starts_as_its_authors_have_it() -> None:
    mixer = mixer_of("mamba", dim=256, num_heads=4, num_kv_heads=4, head_dim=64)
    torch.testing.assert_close(mixer.rates()[0], -torch.arange(1.0, 17.0).expand(512, 16))
    assert bool((mixer.rates.D == 1).all())
    bound, weight = 16**-0.5, mixer.dt_proj.weight.detach()
    assert weight.shape == (512, 16) and 0.99 * bound < weight.abs().max() <= bound
    assert abs(float(weight.std()) - bound / 3**0.5) < 0.01
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.00099 < steps.min() < 0.0015 and 0.06 < steps.max() < 0.101
    assert 0.4 < (steps.log() < math.log(1e-2)).double().mean() < 0.6


@pytest.mark.parametrize("name", ["mamba", "mamba2", "deltanet", "gated_deltanet", "deltaproduct", "kda"])
def test_taps_start_uniform_within_a_half(name: str) -> None:
    convolution = mixer_of(name).convolution
    for parameter in convolution.parameters():
        taps = parameter.detach()
        assert 0.4 < taps.abs().max() <= 0.5 and abs(float(taps.mean())) < 0.1


def test_chelas_convolutions_start_with_rates_over_all_lengths_and_a_variance_of_one() -> None:
    convolution = mixer_of("chela", dim=256, num_heads=4, num_kv_heads=4).convolution
    rates = convolution.log_rates.detach().double().exp()
    torch.testing.assert_close(
        rates[:, [0, -1]], torch.tensor([1.0, 1 / 4096]).double().expand(256, 2), rtol=1e-5, atol=0
    )
    assert 0.4 < convolution.weight.abs().max() <= 0.5
    kernel = longspan.ExponentialKernel(-rates, convolution.coefficients.detach().double())
    # Exponentials of a channel are independent: over channels, their answers to white noise add up to a variance of 1.
    variance = kernel.taps(16384).square().sum(1).mean()
    assert 0.8 < variance < 1.25


@pytest.mark.slow_rows(r"^(deltaproduct|deltanet|gated_deltanet|rebased|gla|simple_gla|lightning)$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(linear_attention|retention|hgrn2|mamba)$")
@pytest.mark.parametrize("name", MIXERS)
def test_a_bfloat16_layer_is_finite_forward_and_backward(name: str) -> None:
    model = LinearLlama3(dataclasses.replace(of_mixer(name), dim=32)).bfloat16()
    tokens = torch.randint(0, 5, (1, 300), generator=torch.Generator().manual_seed(0))
    model(tokens, labels=tokens).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())


@pytest.mark.parametrize("name", MIXERS)
def test_parameters_are_counted_without_making_them(name: str) -> None:
    for tied in (False, True):
        config = dataclasses.replace(of_mixer(name), tie_embeddings=tied)
        assert num_parameters(config) == sum(p.numel() for p in LinearLlama3(config).parameters())
