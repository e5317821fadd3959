"""Where a family's own kernels are installed, our operators and they compute the same: one step on a GPU, both beside float64.

The packages are those that Transformers' modeling files take their kernels from: causal-conv1d, mamba-ssm, flash-linear-attention.
The comparison itself runs everywhere, with Transformers' PyTorch code in place of the kernels.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import longspan
from tests.compare import relative_error
from tests.integrations.transformers.families import build
from tests.integrations.transformers.reference import PLAIN, batch, expected, gradients_of

LENGTH = 128
# Sizes that the kernels take: heads of 16, 32 or 64, powers of two, channels in multiples of 8.
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_DELTA = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_chunk_size": 64}
KERNELS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "qwen3_next": (("causal_conv1d", "fla"), {"hidden_size": 64, "head_dim": 16, **_HEADS, **_DELTA}),
    "olmo_hybrid": (("causal_conv1d", "fla"), {"hidden_size": 64, **_HEADS, **_DELTA}),
    "kimi_linear": (("causal_conv1d", "fla"), {"hidden_size": 64, "linear_head_dim": 32, "linear_num_heads": 4}),
    "bamba": (("causal_conv1d", "mamba_ssm"), {"hidden_size": 64, "mamba_expand": 2, **_HEADS, **_MAMBA2}),
    "mamba2": (
        ("causal_conv1d", "mamba_ssm"),
        {
            "hidden_size": 64,
            "expand": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "state_size": 32,
            "chunk_size": 64,
        },
    ),
    "mamba": (("causal_conv1d", "mamba_ssm"), {"hidden_size": 64, "intermediate_size": 128, "state_size": 16}),
    "lfm2": (("causal_conv1d",), {"hidden_size": 64, **_HEADS}),
}


def step(model: nn.Module, device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, logits and gradients of a batch, on the CPU, in float64."""
    arguments = {name: value.to(device) for name, value in batch(length=LENGTH).arguments().items()}
    out = model(**arguments, use_cache=False)
    out.loss.backward()
    gradients = {name: gradient.double().cpu() for name, gradient in gradients_of(model).items()}
    return out.loss.detach().double().cpu(), out.logits.detach().double().cpu(), gradients


def compare(name: str, device: str) -> None:
    """Ours is as near to float64 as the family's own code, in float32, give or take what TensorFloat-32 products lose."""
    options = KERNELS[name][1]
    want = expected(build(name, **options), batch(length=LENGTH))
    own = step(build(name, **options).float().to(device), device)
    ours = step(longspan.parallelize(build(name, **options).float().to(device), None), device)
    for what, got, theirs, exact in (
        ("loss", ours[0], own[0], want.loss),
        ("logits", ours[1], own[1], want.logits),
        *((key, ours[2][key], own[2][key], exact) for key, exact in want.gradients.items()),
    ):
        allowed = 1.5 * relative_error(theirs, exact) + 2e-3
        assert relative_error(got, exact) <= allowed, f"{what} of {name}"
        # A kernel that computes something else is no yardstick.
        assert relative_error(theirs, exact) < 5e-2, f"{what} of {name}: its own code is wrong"


@pytest.mark.parametrize(
    "name", ["lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS if name != "lfm2")]
)
def test_the_comparison_holds_with_pytorch_code(name: str) -> None:
    compare(name, "cpu")


@pytest.mark.parametrize("name", KERNELS)
def test_own_kernels_and_ours_agree_on_a_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    missing = [package for package in KERNELS[name][0] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs the kernels of {', '.join(missing)}")
    compare(name, "cuda")


class FusedKernelError(Exception):
    """A kernel of a whole mixer was called."""


def fused(*_: Any, **__: Any) -> None:
    raise FusedKernelError


@pytest.mark.parametrize(
    ("name", "kernel"), [("bamba", "mamba2_split_conv1d_scan_combined"), ("mamba", "mamba_inner_fn")]
)
def test_kernels_of_a_whole_mixer_do_not_run_over_ranks(
    name: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, mamba-ssm does convolution and scan at once, and knows no layout."""
    model = build(name).train()
    # What models of earlier tests replaced is put back once they are gone.
    gc.collect()
    monkeypatch.setattr(sys.modules[type(model).__module__], kernel, fused)
    with pytest.raises(FusedKernelError):
        model(**PLAIN.arguments(), use_cache=False)
    longspan.parallelize(model, None)
    model(**PLAIN.arguments()).loss.backward()
    longspan.unparallelize(model)
    with pytest.raises(FusedKernelError):
        model(**PLAIN.arguments(), use_cache=False)
