"""Models of flash-linear-attention over ranks equal the unmodified model in one process: loss, logits and every gradient.

Its kernels need a GPU. Here its models run over PyTorch functions in their place (`fla_on_cpu`): in the reference and, where
nothing of ours stands in, over ranks. The last test is with the kernels, on a GPU.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import longspan
from longspan.errors import InputError
from longspan.integrations.transformers import layout_of, mixers
from longspan.integrations.transformers.fla_functions import FLA_FUNCTIONS
from longspan.integrations.transformers.fla_methods import COMPUTE_LOSS
from longspan.integrations.transformers.mixers import FLA_MIXERS, FLA_MODELS
from longspan.layout import Order
from tests.compare import relative_error, worst_of
from tests.integrations.transformers.families import FLA_FAMILIES, build
from tests.integrations.transformers.fla_on_cpu import fla_on_cpu, ignores_warnings, needs_fla
from tests.integrations.transformers.reference import PACKED, PLAIN, Expected, Wide, batch, expected, gradients_of
from tests.integrations.transformers.test_checkpointing import compared
from tests.integrations.transformers.test_families import KINDS, TOLERANCE, errors_over_ranks, grid_of
from tests.integrations.transformers.training import Run, train
from tests.ranks import raised, run_on_ranks

pytestmark = [needs_fla, ignores_warnings]


@functools.lru_cache(maxsize=4)
def expected_of(name: str, kind: str) -> Expected:
    with fla_on_cpu():
        return expected(build(name), KINDS[kind])


def on_cpu(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with fla_on_cpu():
        return function(*args, **options)


def check(name: str, kind: str, num_ranks: int, order: Order, **options: Any) -> None:
    want = expected_of(name, kind)
    for rank, errors in enumerate(run_on_ranks(num_ranks, on_cpu, errors_over_ranks, name, kind, order, options, want)):
        error, what = worst_of(errors)
        assert error < TOLERANCE, f"{name} on rank {rank} of {num_ranks}: {what} is off by {error:.1e}"


@pytest.mark.parametrize("name", FLA_FAMILIES)
def test_two_ranks_are_one_process(name: str) -> None:
    check(name, "packed", 2, "zigzag")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "num_ranks", "order"), grid_of(FLA_FAMILIES))
def test_any_ranks_in_any_order(name: str, kind: str, num_ranks: int, order: Order) -> None:
    check(name, kind, num_ranks, order)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fla_gated_deltanet", {"exchange": "ring", "softmax_method": "ring"}),
        ("fla_retnet", {"exchange": "pipelined", "softmax_method": "all_gather"}),
        ("fla_linear_attn", {"exchange": "all_to_all"}),
    ],
)
def test_any_exchange_and_softmax_method(name: str, options: dict[str, Any]) -> None:
    check(name, "packed", 4, "zigzag", **options)


def of_bounds(loss: Any, given: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """What a rank's gradients add up to, the loss that it returns, and the loss without gradients."""
    model = longspan.parallelize(build("fla_gated_deltanet"), None, loss=loss)
    with Wide():
        out = model(**given)
        out.loss.backward()
        with torch.no_grad():
            alone = model(**given).loss
    longspan.sum_gradients(model)
    return out.loss.detach(), gradients_of(model), alone


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_documents_by_their_bounds_and_each_kind_of_loss(loss: str) -> None:
    """``cu_seqlens`` is what the package's models take; labels are not shifted again inside of the head."""
    want = expected_of("fla_gated_deltanet", "packed")
    assert PACKED.bounds is not None
    given: dict[str, Any] = {
        "input_ids": PACKED.ids,
        "labels": PACKED.labels,
        "cu_seqlens": torch.tensor(PACKED.bounds, dtype=torch.int32),
    }
    found = run_on_ranks(2, on_cpu, of_bounds, loss, given)
    times = 2 if loss == "mean" else 1
    assert relative_error(sum(own for own, _, _ in found) / times, want.loss) < TOLERANCE
    for _, gradients, alone in found:
        assert relative_error(alone, want.loss) < TOLERANCE
        for key, gradient in gradients.items():
            assert relative_error(gradient / times, want.gradients[key]) < TOLERANCE, key


def counted_by_trainer(num_items: int) -> Tensor:
    model = longspan.parallelize(build("fla_gla"), None)
    with Wide():
        loss: Tensor = model(input_ids=PLAIN.ids, labels=PLAIN.labels, num_items_in_batch=torch.tensor(num_items)).loss
    return loss.detach()


def test_the_loss_is_divided_by_what_trainer_has_counted() -> None:
    num_valid = int((PLAIN.labels[:, 1:] != -100).sum())
    losses = run_on_ranks(2, on_cpu, counted_by_trainer, 3 * num_valid)
    assert relative_error(3 * sum(losses), expected_of("fla_gla", "plain").loss) < TOLERANCE


def fused() -> tuple[Tensor, dict[str, Tensor], bool]:
    model = longspan.parallelize(
        build("fla_gated_deltanet", fuse_linear_cross_entropy=True), None, loss="sum", exchange="ring"
    )
    with Wide():
        out = model(**PACKED.arguments())
        out.loss.backward()
    longspan.sum_gradients(model)
    return out.loss.detach(), gradients_of(model), out.logits is None


def test_a_loss_that_makes_no_logits_is_given_the_same_labels() -> None:
    want = expected_of("fla_gated_deltanet", "packed")
    found = run_on_ranks(2, on_cpu, fused)
    assert relative_error(sum(own for own, _, _ in found), want.loss) < TOLERANCE
    for _, gradients, has_none in found:
        assert has_none
        for key, gradient in gradients.items():
            assert relative_error(gradient, want.gradients[key]) < TOLERANCE, key


def logits_of_ranks(name: str, ids: Tensor, **options: Any) -> Tensor:
    model = longspan.parallelize(build(name, **options), None)
    with Wide(), torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return layout_of(model).gather(logits)


def logits_of_one_process(name: str, ids: Tensor, **options: Any) -> Tensor:
    model = build(name, **options)
    with Wide(), torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", ["fla_delta_net", "fla_mamba2"])
def test_a_rank_with_one_token_is_in_the_middle_of_a_sequence(name: str) -> None:
    """Without gradients the package takes one token for a step of decoding, which has no tokens before it."""
    ids = PLAIN.ids[:, :2]
    want = on_cpu(logits_of_one_process, name, ids)
    for got in run_on_ranks(2, on_cpu, logits_of_ranks, name, ids):
        assert relative_error(got, want) < TOLERANCE


def with_residuals_of_depth(ids: Tensor) -> Tensor:
    return logits_of_ranks("fla_delta_net", ids, attnres_block_size=2)


def test_residuals_over_depth_are_of_each_token() -> None:
    want = on_cpu(logits_of_one_process, "fla_delta_net", PLAIN.ids, attnres_block_size=2)
    for got in run_on_ranks(2, on_cpu, with_residuals_of_depth, PLAIN.ids):
        assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [
        ("fla_linear_attn", True),
        ("fla_retnet", False),
        *(
            pytest.param(name, reentrant, marks=pytest.mark.slow)
            for name in FLA_FAMILIES
            for reentrant in (True, False)
            # Its layers share a tensor that is given by keyword, which reentrant checkpointing goes back through twice.
            if (name, reentrant) != ("fla_hgrn2", True)
        ),
    ],
)
def test_recomputed_gradients_are_the_same_bits(name: str, reentrant: bool) -> None:
    run_on_ranks(2, on_cpu, compared, name, reentrant, True, False)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_trainer_trains_as_in_one_process(tmp_path: Path, packed: bool) -> None:
    run = Run("fla_linear_attn" if packed else "fla_gated_deltanet", packed=packed, num_rows=13)
    want = on_cpu(train, run, str(tmp_path / "alone"), 0)
    arguments = (train, run, str(tmp_path / "ranks"), 2)
    for trained in run_on_ranks(2, on_cpu, *arguments, timeout=240.0, checked=False):
        error, what = worst_of(trained.errors(want))
        assert error < TOLERANCE, f"{what} is off by {error:.1e}"


def restored() -> None:
    gla, convolution = import_module("fla.layers.gla"), import_module("fla.modules.causal_conv1d.ops")
    before = (gla.chunk_gla, gla.fused_recurrent_gla, convolution.causal_conv1d)
    first, second, alone = (build("fla_gla") for _ in range(3))
    keys = [set(vars(module)) for module in first.modules()]
    want = logits(alone)
    longspan.parallelize(first, None)
    longspan.parallelize(second, None)
    assert torch.equal(logits(alone), want), "a model that is not parallelized computes something else"
    longspan.unparallelize(first)
    assert gla.chunk_gla is not before[0]
    longspan.unparallelize(second)
    assert (gla.chunk_gla, gla.fused_recurrent_gla, convolution.causal_conv1d) == before
    assert [set(vars(module)) for module in first.modules()] == keys
    assert torch.equal(logits(first), want)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=PLAIN.ids, use_cache=False).logits
    return found


def test_the_package_is_as_it_was_when_the_last_model_is_unparallelized() -> None:
    on_cpu(restored)


class Scan:
    """mamba-ssm's `mamba_chunk_scan_combined`, token by token; heads that share B and C lie next to each other."""

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **given: Any) -> Any:
        assert given["z"] is None and given["dt_softplus"]
        steps = F.softplus(dt + given["dt_bias"]).clamp(*given["dt_limit"])
        B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
        outputs = []
        for t in range(x.shape[1]):
            added = (steps[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            state = (steps[:, t] * A).exp()[..., None, None] * state + added
            outputs.append((state * C[:, t, :, None]).sum(-1) + D * x[:, t])
        return torch.stack(outputs, dim=1), None


def mamba2_of_groups() -> float:
    layers: Any = import_module("fla.layers.mamba2")
    model: Any = build("fla_mamba2", n_groups=3)
    layer, x = model.backbone.layers[0].mixer, torch.randn(2, 11, 24, dtype=torch.float64)
    before = layers.mamba_chunk_scan_combined
    layers.mamba_chunk_scan_combined = Scan()
    try:
        with Wide():
            want, _, _ = layer.cuda_kernels_forward(x)
    finally:
        layers.mamba_chunk_scan_combined = before
    seen: list[Tensor] = []
    longspan.parallelize(model, None)
    layer.register_forward_pre_hook(lambda module, args, kwargs: ((), {**kwargs, "hidden_states": x}), with_kwargs=True)
    layer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with Wide():
        model(input_ids=PLAIN.ids[:, :11])
    return relative_error(seen[0], want)


def test_groups_of_mamba2_are_those_of_its_kernels() -> None:
    """The package's PyTorch code takes heads and groups in another order than mamba-ssm's kernels, which it uses on a GPU."""
    assert on_cpu(mamba2_of_groups) < TOLERANCE


# ------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("name", FLA_MIXERS)
def test_each_class_calls_what_the_table_says(name: str) -> None:
    file, _, class_name = name.rpartition(".")
    module = import_module(f"fla.{file}")
    source = inspect.getsource(getattr(module, class_name))
    kind = FLA_MIXERS[name]
    for path in kind.methods:
        assert path == "forward" or f"self.{path.split('.')[0]}(" in source
    called = [function for function in FLA_FUNCTIONS if f" {function}(" in source]
    assert called or "forward" in kind.methods, f"{name} calls nothing that is replaced"
    for function in called:
        assert hasattr(module, function), f"{module.__name__} has no {function}"
    others = [function for function in vars(import_module("fla.ops")) if f" {function}(" in source]
    assert set(others) - set(called) <= {"fused_chunk_gla"}, f"{name} calls a kernel that is not replaced"


def of_the_package(function: str) -> Any:
    if function == "flash_attn_func" or function.endswith("_cuda"):
        pytest.skip("of another package, which needs CUDA")
    places = {
        "conv1d": "fla.modules.causal_conv1d.ops",
        "hgrn": "fla.ops.hgrn",
        "rwkv6": "fla.ops.rwkv6",
        "token_shift": "fla.modules.token_shift",
    }
    place = next((place for part, place in places.items() if part in function), "fla.ops")
    return inspect.unwrap(getattr(import_module(place), function))


@pytest.mark.parametrize("function", FLA_FUNCTIONS)
def test_each_stand_in_takes_what_it_is_called_with(function: str) -> None:
    theirs = inspect.signature(of_the_package(function)).parameters
    ours = list(inspect.signature(FLA_FUNCTIONS[function]).parameters.values())[1:]
    if [p.name for p in ours] == ["args", "kwargs"]:
        stand_in = import_module("longspan.integrations.transformers.fla_functions")._gated_delta_rule
        ours = list(inspect.signature(stand_in).parameters.values())[2:]
    known = {p.name for p in ours}
    required = [p.name for p in theirs.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert set(required) <= known, f"{function} needs {set(required) - known}"
    # What changes a result, or would, must not be dropped.
    harmless = {"kwargs", "cu_seqlens", "cu_seqlens_cpu", "chunk_indices", "cp_context", "backend"}
    harmless |= {"reverse", "safe_gate", "disable_recompute", "return_intermediate_states", "use_graph", "max_num_seqs"}
    assert set(theirs) - known <= harmless, f"{function}: {set(theirs) - known - harmless}"


def test_the_models_of_the_table_are_in_the_package() -> None:
    for name in FLA_MODELS:
        import_module(f"fla.models.{name}")
    shown = {type(build_quietly(name).base_model).__module__.split(".")[2] for name in FLA_FAMILIES}
    assert shown == FLA_MODELS


def build_quietly(name: str) -> Any:
    with fla_on_cpu():
        return build(name)


def test_heads_compute_their_loss_where_it_is_replaced() -> None:
    for name in FLA_FAMILIES:
        head = type(build_quietly(name))
        parameters = inspect.signature(getattr(head, COMPUTE_LOSS)).parameters
        assert list(parameters)[:4] == ["self", "hidden_states", "labels", "logits_to_keep"]
        assert parameters["shift_labels"].kind is inspect.Parameter.KEYWORD_ONLY


# ------------------------------------------------------------------------------------------------- what is refused


def of_package(name: str, **options: Any) -> nn.Module:
    package = import_module("fla.models")
    config = getattr(package, f"{name}Config")
    small = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 61, "fuse_cross_entropy": False}
    with fla_on_cpu():
        model: nn.Module = getattr(package, f"{name}ForCausalLM")(config(**{**small, **options}))
    return model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RWKV7", {"head_dim": 32, "num_hidden_layers": 2, "use_l2warp": False}),
        ("NSA", {"num_heads": 16, "num_kv_heads": 1, "head_dim": 4}),
        ("GSA", {"num_heads": 2, "num_slots": 8}),
        ("LightNet", {"num_heads": 2}),
        ("Comba", {"num_heads": 2, "head_dim": 16}),
        ("LogLinearMamba2", {"head_dim": 16, "state_size": 16, "num_heads": 8, "chunk_size": 64}),
    ],
)
def test_models_that_mix_tokens_otherwise_are_refused(name: str, options: dict[str, Any]) -> None:
    model = of_package(name, **options)
    with pytest.raises(InputError, match=rf"how {name}Model of flash-linear-attention mixes tokens.*gated_deltanet"):
        longspan.parallelize(model, None)


def test_a_layer_of_the_package_that_is_not_known_is_refused() -> None:
    model: Any = build_quietly("fla_gla")
    model.model.layers[1].attn = import_module("fla.layers.gsa").GatedSlotAttention(hidden_size=24, num_heads=4)
    with pytest.raises(
        InputError, match=r"the layer 'layers\.1\.attn' of GLAModel, a GatedSlotAttention.*register_adapter"
    ):
        longspan.parallelize(model, None)


def test_a_penalty_that_depends_on_the_length_of_a_call_is_refused() -> None:
    with pytest.raises(InputError, match="use_l2warp"):
        longspan.parallelize(of_package("GLA", num_heads=2, use_l2warp=True), None)


def refused(what: str) -> tuple[str, str]:
    model: Any = longspan.parallelize(build("fla_gla"), None)
    if what == "a cache":
        cache = import_module("fla.models.utils").Cache()
        return raised(lambda: model(input_ids=PLAIN.ids, past_key_values=cache))
    return raised(lambda: model(input_ids=PLAIN.ids, cu_seqlens=torch.tensor([0, 5, 37])))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("a cache", "leave the cache out in training"),
        ("rows", "cu_seqlens must be of one row"),
    ],
)
def test_calls_that_would_be_wrong_are_refused_on_every_rank(what: str, says: str) -> None:
    for kind, message in run_on_ranks(2, on_cpu, refused, what):
        assert kind == "InputError" and says in message


def lost_layout() -> tuple[str, str]:
    """A layer that calls a kernel under a name which is not replaced."""
    model: Any = longspan.parallelize(build("fla_hgrn"), None)
    layers: Any = import_module("fla.layers.hgrn")
    dispatcher, layers.chunk_hgrn = layers.chunk_hgrn, layers.chunk_hgrn.__wrapped__
    try:
        return raised(lambda: model(input_ids=PLAIN.ids))
    finally:
        layers.chunk_hgrn = dispatcher


def test_a_layer_that_lost_the_layout_raises() -> None:
    for kind, message in run_on_ranks(2, on_cpu, lost_layout):
        assert kind == "LayoutError" and "HGRNAttention did not call hgrn" in message


def test_short_convolutions_of_a_layer_are_counted() -> None:
    with_convolutions, without = (
        mixers.class_in_table(
            build_quietly(
                "fla_gla",
            )
            .model.layers[0]
            .attn
        ),
        mixers.class_in_table(build_quietly("fla_linear_attn").model.layers[0].attn),
    )
    assert with_convolutions is not None and mixers.CONVOLUTION in with_convolutions.calls
    assert without is not None and mixers.CONVOLUTION not in without.calls


def test_an_untested_release_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_quietly("fla_gla")
    monkeypatch.setattr(sys.modules["fla"], "__version__", "0.9.1")
    with pytest.warns(UserWarning, match=r"flash-linear-attention 0\.6, and 0\.9\.1"):
        longspan.parallelize(model, None)


# ------------------------------------------------------------------------------------------------- with its kernels


# Sizes that kernels take: heads of 16 or 32. Softmax layers need another package, flash-attn.
WITH_KERNELS: dict[str, dict[str, Any]] = {
    "fla_gla": {"expand_k": 1.0},
    "fla_simple_gla": {},
    "fla_retnet": {"attn": None},
    "fla_linear_attn": {"expand_v": 1.0},
    "fla_delta_net": {"expand_v": 1.0},
    "fla_gated_deltanet": {"head_dim": 16, "attn": None},
    "fla_kda": {"head_dim": 16},
    "fla_hgrn": {},
    "fla_hgrn2": {},
    "fla_mamba": {"state_size": 16},
    "fla_mamba2": {"head_dim": 16, "state_size": 16},
    "fla_samba": {"state_size": 16, "attn": None},
    "fla_rwkv6": {"expand_k": 1.0},
}


def compare_in_half_precision(name: str, device: str) -> None:
    """Loss, logits and gradients beside float64: ours are as near as the package's own, within a factor of two in the median."""
    options, what = {"hidden_size": 64, **WITH_KERNELS[name]}, batch(length=128)
    with fla_on_cpu():
        want = expected(build(name, **options), what)
    medians = []
    for parallel in (False, True):
        model = build(name, **options).to(device, torch.bfloat16)
        if parallel:
            longspan.parallelize(model, None)
        out = model(**{key: value.to(device) for key, value in what.arguments().items()}, use_cache=False)
        out.loss.backward()
        errors = [relative_error(out.logits.double().cpu(), want.logits)]
        for key, gradient in gradients_of(model).items():
            errors.append(relative_error(gradient.double().cpu(), want.gradients[key]))
        medians.append(float(torch.tensor(errors).median()))
    theirs, ours = medians
    assert theirs < 0.5, "the package's own code is no yardstick"
    assert ours < 2 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_in_half_precision_it_is_as_near_as_its_own_references(name: str) -> None:
    on_cpu(compare_in_half_precision, name, "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels of flash-linear-attention need a GPU")
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_on_a_gpu_it_is_as_near_as_its_own_kernels(name: str) -> None:
    compare_in_half_precision(name, "cuda")
