"""A mixture of experts is the layer that it says it is, and its auxiliary losses are their formulas."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from longspan import SequenceLayout
from longspan.errors import ConfigError, InputError
from longspan.models import (
    LinearLlama3,
    LinearLlama3Config,
    Routing,
    generate,
    num_active_parameters,
    num_parameters,
    preset,
)
from longspan.models.experts import MixtureOfExperts, Router
from longspan.models.feed_forward import SwiGLU
from longspan.models.initial import InitialWeights
from longspan.models.mixers import Context
from longspan.parallel import compile_blocks, compute_in, recompute_blocks
from tests.compare import relative_error, worst
from tests.models.test_chunked import errors, gradients, labelled
from tests.models.tiny import random_tokens, tiny_model
from tests.tracing.test_compile import pytestmark  # noqa: F401

DIM, INNER, NUM_EXPERTS = 16, 24, 6
CONTEXT = Context(None, torch.arange(1))
EXPERTS: dict[str, Any] = {
    "num_experts": NUM_EXPERTS,
    "experts_per_token": 2,
    "num_layers": 2,
    "pattern": "LN",
    "balance_loss_weight": 0.3,
    "z_loss_weight": 0.07,
}


def layer_of(per_token: int = 2, num_shared: int = 0) -> MixtureOfExperts:
    layer = MixtureOfExperts(DIM, INNER, NUM_EXPERTS, per_token, num_shared)
    layer.init_weights(InitialWeights(3, 1))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(20.0)
    return layer.double()


def tokens_of_width(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Router


@pytest.mark.parametrize("per_token", [2, 3, NUM_EXPERTS])
def test_weights_are_a_softmax_over_the_largest_logits(per_token: int) -> None:
    router, x = layer_of(per_token).router, tokens_of_width(40)
    logits = x @ router.weight.t()
    largest, expected = logits.topk(per_token, dim=-1)
    chosen, weights, _ = router(x)
    assert torch.equal(chosen, expected)
    assert relative_error(weights, largest.softmax(-1)) < 1e-12


def test_a_single_expert_has_its_probability_and_the_router_a_gradient() -> None:
    layer, x = layer_of(1), tokens_of_width(2, 20)
    _, weights, _ = layer.router(x.flatten(0, 1))
    probabilities = (x.flatten(0, 1) @ layer.router.weight.t()).softmax(-1)
    assert relative_error(weights[:, 0], probabilities.amax(-1)) < 1e-12
    layer(x, CONTEXT)[0].square().sum().backward()
    grad = layer.router.weight.grad
    assert grad is not None and grad.abs().amax() > 1e-3


def test_a_router_computes_in_float32_whatever_the_dtype() -> None:
    router, x = layer_of().router.bfloat16(), tokens_of_width(500).bfloat16()
    wide = copy.deepcopy(router).float()
    for context in (torch.autocast("cpu", torch.bfloat16, enabled=on) for on in (False, True)):
        with context:
            chosen, weights, routed = router(x)
        assert weights.dtype == routed.probabilities.dtype == routed.squared_logs.dtype == torch.float32
        expected = wide(x.float())
        assert torch.equal(chosen, expected[0]) and relative_error(weights, expected[1]) < 1e-6


def test_what_is_decided_is_counted() -> None:
    router, x = layer_of().router, tokens_of_width(50)
    chosen, _, routed = router(x)
    logits = x @ router.weight.t()
    probabilities = logits.softmax(-1)
    assert torch.equal(routed.choices, torch.bincount(chosen.flatten(), minlength=NUM_EXPERTS))
    assert relative_error(routed.probabilities, probabilities.sum(0)) < 1e-12
    assert relative_error(routed.squared_logs, logits.logsumexp(-1).square().sum()) < 1e-12
    entropy = torch.distributions.Categorical(logits=logits).entropy().sum()
    assert relative_error(routed.entropy, entropy) < 1e-12 and not routed.entropy.requires_grad


# The layer


def test_experts_that_are_all_alike_are_the_plain_layer() -> None:
    """The weights of a token's experts add up to one."""
    layer, x = layer_of(3), tokens_of_width(2, 20)
    plain = SwiGLU(DIM, INNER).double()
    with torch.no_grad():
        for name, matrices in layer.experts.named_parameters():
            matrices.copy_(getattr(plain, name).weight.expand_as(matrices))
    assert relative_error(layer(x, CONTEXT)[0], plain(x, CONTEXT)[0]) < 1e-12


def test_a_token_has_the_weighted_sum_of_its_experts_and_the_shared_ones() -> None:
    layer, x = layer_of(2, num_shared=2), tokens_of_width(3, 7)
    out, _ = layer(x, CONTEXT)
    assert layer.shared is not None and layer.shared.gate_proj.weight.shape == (2 * INNER, DIM)
    chosen, weights, _ = layer.router(x.flatten(0, 1))
    for token, row in enumerate(x.flatten(0, 1)):
        want = layer.shared(row[None, None], CONTEXT)[0].flatten()
        for e, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            gate, up, down = (matrices[e] for matrices in layer.experts.parameters())
            want = want + weight * (down @ (F.silu(gate @ row) * (up @ row)))
        assert relative_error(out.flatten(0, 1)[token], want) < 1e-12


def test_initial_weights_are_llamas_and_depend_on_the_seed_alone() -> None:
    config = LinearLlama3Config(50, dim=64, hidden_dim=96, num_experts=4, num_shared_experts=1)
    model, other = LinearLlama3(config), LinearLlama3(config)
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(99)
    model.init_weights(3)
    other.init_weights(3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    layer: Any = model.blocks[1].feed_forward
    stds = {name: float(parameter.detach().std()) for name, parameter in layer.named_parameters()}
    residual = 0.02 / (2 * config.num_layers) ** 0.5
    for name, std in stds.items():
        assert std == pytest.approx(residual if "down_proj" in name else 0.02, rel=0.1), name
    experts = layer.experts.gate_proj
    assert relative_error(experts[0], experts[1]) > 0.1


# The model


def test_parameters_and_operations_are_those_of_the_experts_that_a_token_takes() -> None:
    changes: dict[str, Any] = {"num_layers": 3, "hidden_dim": 48, "dim": 32}
    dense = LinearLlama3(LinearLlama3Config(50, **changes))
    model = LinearLlama3(LinearLlama3Config(50, **changes, num_experts=8, experts_per_token=3, num_shared_experts=2))
    one, router = 3 * 32 * 48, 8 * 32
    assert dense.num_active_parameters() == dense.num_parameters()
    assert model.num_parameters() == dense.num_parameters() + 3 * (9 * one + router)
    assert model.num_active_parameters() == dense.num_parameters() + 3 * (4 * one + router)
    assert model.flops_per_token(100) == dense.flops_per_token(100) + 6 * 3 * (4 * one + router)


@pytest.mark.parametrize("num_shared", [0, 2])
def test_operations_are_those_that_pytorch_counts(num_shared: int) -> None:
    layer, x = layer_of(3, num_shared), tokens_of_width(2, 20).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x, CONTEXT)[0].sum().backward()
    assert counter.get_total_flops() == 40 * layer.flops_per_token()


@pytest.mark.parametrize("pattern", [("linear_attention",), "LLLN"], ids=str)
@pytest.mark.parametrize(
    ("name", "shape", "active", "total"),
    [
        ("linear-moe-a0.3b-2b", (12, 1024, 8, 128, 896), 0.3e9, 2.2e9),
        ("linear-moe-a1b-7b", (16, 2048, 16, 128, 1024), 1.1e9, 6.8e9),
    ],
)
def test_the_presets_of_linear_moe_have_the_sizes_of_their_names(
    name: str, shape: tuple[int, ...], active: float, total: float, pattern: Any
) -> None:
    """Without the tables of words."""
    config = preset(name, vocab_size=1, pattern=pattern)
    assert (config.num_layers, config.dim, config.num_heads, config.size_of_head, config.hidden_dim) == shape
    assert (config.num_experts, config.experts_per_token, config.num_shared_experts) == (64, 8, 0)
    assert num_active_parameters(config) == pytest.approx(active, rel=0.15)
    assert num_parameters(config) == pytest.approx(total, rel=0.05)


def by_hand(model: LinearLlama3, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Balance and z of each layer, from the logits of its router."""
    found: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda router, given: found.append(given[0] @ router.weight.t()))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    model(tokens)
    for handle in handles:
        handle.remove()
    balances, zs = [], []
    for logits in found:
        probabilities = logits.softmax(-1)
        chosen = F.one_hot(logits.topk(model.config.experts_per_token, dim=-1).indices, NUM_EXPERTS).sum(1).double()
        shares = chosen.mean(0) / model.config.experts_per_token
        balances.append(NUM_EXPERTS * (shares * probabilities.mean(0)).sum())
        zs.append(logits.logsumexp(-1).square().mean())
    return torch.stack(balances), torch.stack(zs)


@pytest.mark.parametrize("per_token", [1, 3])
def test_the_loss_is_cross_entropy_and_the_formulas_of_the_auxiliary_losses(per_token: int) -> None:
    model = tiny_model(**{**EXPERTS, "experts_per_token": per_token})
    tokens, labels = labelled()
    balance, z = by_hand(model, tokens)
    cross_entropy = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    want = gradients(model, cross_entropy + 0.3 * balance.sum() + 0.07 * z.sum())
    routing = Routing()
    got = gradients(model, model(tokens, labels=labels, routing=routing))
    assert worst(errors(got, want)) < 1e-12
    noted = [routing.cross_entropy, routing.balance, routing.z, routing.auxiliary]
    wanted = [cross_entropy, balance.mean(), z.mean(), 0.3 * balance.sum() + 0.07 * z.sum()]
    assert worst(relative_error(torch.as_tensor(a), b) for a, b in zip(noted, wanted, strict=True)) < 1e-12
    assert not any(torch.as_tensor(x).requires_grad for x in noted)
    # Without both, nothing else is left.
    plain = tiny_model(**{**EXPERTS, "experts_per_token": per_token, "balance_loss_weight": 0.0, "z_loss_weight": 0.0})
    assert relative_error(plain(tokens, labels=labels), cross_entropy) < 1e-12


def test_a_loss_that_is_not_trained_on_is_the_cross_entropy() -> None:
    model = tiny_model(**EXPERTS)
    tokens, labels = labelled()
    want = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    routing = Routing()
    with torch.no_grad():
        assert relative_error(model(tokens, labels=labels, routing=routing), want) < 1e-12
    assert routing.choices is None and relative_error(torch.as_tensor(routing.cross_entropy), want) < 1e-12
    trained = model(tokens, labels=labels)
    assert relative_error(model.eval()(tokens, labels=labels), want) < 1e-12
    assert relative_error(model.train()(tokens, labels=labels), trained) == 0.0 and trained > want


@pytest.mark.parametrize("num_valid", [None, 0, torch.tensor(0)])
def test_where_no_label_counts_loss_and_gradients_are_zero(num_valid: Any) -> None:
    model = tiny_model(**EXPERTS)
    tokens, labels = labelled()
    found = gradients(model, model(tokens, labels=torch.full_like(labels, -100), num_valid=num_valid))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())


def test_micro_batches_of_a_step_add_up_by_their_tokens() -> None:
    model = tiny_model(**EXPERTS)
    tokens, labels = labelled()
    num_valid = int((labels != -100).sum())
    routing, total = Routing(tokens.numel()), torch.zeros(())
    for part, row in ((slice(0, 1), tokens[:1]), (slice(1, 2), tokens[1:])):
        total = total + model(row, labels=labels[part], num_valid=num_valid, routing=routing)
    each = [by_hand(model, tokens[row : row + 1]) for row in range(2)]
    balance, z = (torch.stack([pair[which] for pair in each]).mean(0) for which in range(2))
    assert relative_error(torch.as_tensor(routing.balance), balance.mean()) < 1e-12
    cross_entropy = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    want = gradients(model, cross_entropy + 0.3 * balance.sum() + 0.07 * z.sum())
    assert worst(errors(gradients(model, total), want)) < 1e-12
    assert routing.choices is not None and int(routing.choices.sum()) == 2 * 2 * tokens.numel()


def test_statistics_say_how_unequal_experts_are() -> None:
    routing = Routing()
    assert (routing.fullest, routing.idle) == (1.0, 0.0)
    routing.choices = torch.tensor([[4, 4, 4, 4], [10, 6, 0, 0]])
    assert (routing.fullest, routing.idle) == (2.5, 0.25)


def test_reentrant_checkpointing_has_the_gradients_of_auxiliary_losses() -> None:
    tokens, labels = labelled()
    alone, model = tiny_model(**EXPERTS), tiny_model(**EXPERTS)
    want = gradients(alone, alone(tokens, labels=labels))
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=True)
    routing = Routing()
    loss = model(tokens, labels=labels, routing=routing)
    loss.backward()
    grads: dict[str, Any] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst(errors({"loss": loss.detach(), **grads}, want)) < 1e-12
    assert not torch.as_tensor(routing.entropy).requires_grad


SAVERS: dict[str, Any] = {
    "chunks": lambda model: model,
    "recomputed": lambda model: recompute_blocks(model, "layer"),
    "without exchanges": lambda model: recompute_blocks(model, "selective"),
    "whole model recomputed": lambda model: (
        lambda *args, **kwargs: checkpoint(model, *args, use_reentrant=False, **kwargs)
    ),
    "compiled": lambda model: compile_blocks(model, backend="aot_eager"),
    "compiled, recomputed": lambda model: recompute_blocks(compile_blocks(model, backend="aot_eager"), "layer"),
}


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [
        ("chunks", 1),
        ("chunks", 100),
        ("chunks", 7),
        *((name, size) for name in SAVERS if "compiled" not in name and name != "chunks" for size in (0, 7)),
        # Experts are compiled in `tests/ops/test_expert_swiglu.py`, too.
        *(
            pytest.param(name, size, marks=pytest.mark.slow)
            for name, size in (("compiled", 7), ("compiled", 0), ("compiled, recomputed", 0))
        ),
    ],
)
def test_what_saves_memory_changes_nothing(name: str, chunk_size: int) -> None:
    torch._dynamo.reset()
    changes = {**EXPERTS, "num_shared_experts": 1}
    tokens, labels = labelled()
    alone = tiny_model(**changes)
    want = gradients(alone, alone(tokens, labels=labels))
    model = tiny_model(**changes, feed_forward_chunk=chunk_size)
    loss = SAVERS[name](model)(tokens, labels=labels)
    assert worst(errors(gradients(model, loss), want)) < 1e-12
    torch._dynamo.reset()


def test_weights_cast_for_a_layer_are_those_of_its_experts() -> None:
    tokens, labels = labelled()
    found = []
    for changes in ({}, {"feed_forward_chunk": 7}):
        model = compute_in(tiny_model(**EXPERTS, **changes).float(), torch.bfloat16)
        found.append(gradients(model, model(tokens, labels=labels)))
    want, got = found
    assert all(x.dtype == torch.float32 for x in got.values())
    assert worst(errors(got, want)) < 0.05


def test_text_is_written_as_the_whole_sequence_has_it() -> None:
    model = tiny_model(**EXPERTS)
    prompt = random_tokens(1, 20)[0]
    made = list(generate(model, prompt, max_new_tokens=5))
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.tolist(), *made]]))
    assert logits[0, 19:-1].argmax(-1).tolist() == made


def test_packed_documents_are_as_if_each_were_alone() -> None:
    model, tokens = tiny_model(**EXPERTS), random_tokens(1, 40)
    packed = model(tokens, layout=SequenceLayout.local(40, (0, 1, 17, 40)))
    alone = [model(tokens[:, start:stop]) for start, stop in ((0, 1), (1, 17), (17, 40))]
    assert relative_error(packed, torch.cat(alone, dim=1)) < 1e-11


def test_a_copy_and_what_is_loaded_have_experts_of_their_own() -> None:
    model: Any = tiny_model(**EXPERTS)
    tokens, labels = labelled()
    want = model(tokens, labels=labels)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens, labels=labels), want)
        assert other.blocks[0].feed_forward.router.weight is not model.blocks[0].feed_forward.router.weight


def test_the_loss_falls_and_the_experts_stay_balanced() -> None:
    config = LinearLlama3Config(29, dim=32, num_layers=2, pattern="LN", hidden_dim=32, num_experts=4)
    model = LinearLlama3(config)
    tokens = random_tokens(1, 16).repeat(1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        routing = Routing()
        model(tokens[:, :-1], labels=tokens[:, 1:], routing=routing).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(routing.cross_entropy))
    assert abs(losses[0] - torch.tensor(29.0).log()) < 0.2 and losses[-1] < 0.3 * losses[0]
    assert routing.idle == 0.0 and routing.fullest < 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 4, "experts_per_token": 5}, r"experts_per_token 5 is more than num_experts 4: .* Lower it"),
        ({"num_experts": 4, "experts_per_token": 0}, r"experts_per_token must be an integer of at least 1; got 0"),
        ({"num_experts": -1}, r"num_experts must be an integer of at least 1, or 0 for none; got -1"),
        ({"num_experts": True}, r"num_experts must be an integer of at least 1, or 0 for none; got True"),
        ({"num_experts": 4, "num_shared_experts": 1.5}, r"num_shared_experts must be an integer .*; got 1.5"),
        ({"num_experts": 4, "balance_loss_weight": -0.1}, r"balance_loss_weight must be at least 0, .*; got -0.1"),
        ({"num_experts": 4, "z_loss_weight": float("nan")}, r"z_loss_weight must be at least 0, .*; got nan"),
        (
            {"experts_per_token": 4},
            r"experts_per_token is 4, which concerns experts, and num_experts is 0. Set num_experts",
        ),
        ({"z_loss_weight": 0.0}, r"z_loss_weight is 0.0, which concerns experts"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearLlama3Config(100, **changes)


def test_a_routing_without_labels_or_experts_is_refused() -> None:
    tokens, labels = labelled()
    with pytest.raises(InputError, match=r"routing is for a loss; got Routing\(.* and no labels"):
        tiny_model(**EXPERTS)(tokens, routing=Routing())
    with pytest.raises(
        InputError, match=r"routing must be a longspan.models.Routing, for a model with experts; .* and 0"
    ):
        tiny_model()(tokens, labels=labels, routing=Routing())
    wrong: Any = 3
    with pytest.raises(InputError, match=r"routing must be .*; got 3 \(int\)"):
        tiny_model(**EXPERTS)(tokens, labels=labels, routing=wrong)
