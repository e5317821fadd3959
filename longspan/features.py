"""Feature maps of queries and keys, and log decays: what is computed token by token, or once, before an operator is called.

Shapes: B batch rows, T tokens, H heads, K channels of a head. Everything here works token by token, so that it is the same on
one device and on the tokens of a rank.

A feature map φ turns linear attention into attention with the kernel φ(q)·φ(k). Maps are computed in float32 (float64 for
float64) and rounded once, to the dtype of their input. `taylor` and `Rebased` hold the scale of q·k themselves: call the operator
with ``scale=1``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.checks import check_count, check_number, check_tensors, is_int
from longspan.dtypes import at_least_float32
from longspan.errors import InputError


def identity(x: Tensor) -> Tensor:
    """φ(x) = x, for ``x [B, T, H, K]``: the kernel q·k."""
    check_tensors("identity", x=x)
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1, for ``x [B, T, H, K]``: above zero everywhere (arXiv 2006.16236).

    Computed as max(x, 0) + e^min(x, 0), which does not round small values to zero as a sum with 1 would.
    """
    check_tensors("elu_plus_one", x=x)
    wide = at_least_float32(x)
    return (wide.clamp(min=0.0) + wide.clamp(max=0.0).exp()).to(x.dtype)


def relu(x: Tensor) -> Tensor:
    """φ(x) = max(x, 0), for ``x [B, T, H, K]`` (cosFormer, arXiv 2202.08791; T2R, arXiv 2103.13076)."""
    check_tensors("relu", x=x)
    return F.relu(x)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """φ(x) = x / √(|x|² + eps), for ``x [B, T, H, K]``: what the delta rules want of their keys (arXiv 2406.06484).

    With keys no longer than 1 and beta in [0, 1] their transition never lengthens a state.
    """
    check_tensors("unit_length", x=x)
    check_number("unit_length", "eps", eps, at_least=0.0)
    wide = at_least_float32(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def taylor(x: Tensor) -> Tensor:
    """Based's map, with φ(q)·φ(k) = 1 + s + s²/2 for s = q·k / √K: e^s to second order (arXiv 2402.18668).

    Args:
        x: ``[B, T, H, K]``.

    Returns:
        ``[B, T, H, 1 + K + K (K + 1) / 2]``. Products x_i x_j and x_j x_i are one feature of weight √2: nearly half the size of
        the map that keeps both, with the same products. The kernel is at least 1/2, so that it can be normalized.
    """
    _check_channels("taylor", x)
    scaled = at_least_float32(x) * x.shape[-1] ** -0.25
    ones = torch.ones_like(scaled[..., :1])
    return torch.cat([ones, scaled, *_symmetric_square(scaled * 0.5**0.25)], dim=-1).to(x.dtype)


class Rebased(nn.Module):
    """ReBased's learned quadratic kernel: φ(q)·φ(k) = (q'·k')² / K with x' = γ ⊙ norm(x) + β (arXiv 2402.10644).

    norm is a layer norm over the K channels of a head. γ (`gamma`, ones at first) and β (`beta`, zeros at first) are learned; the
    kernel can reach zero, which Based's cannot. The paper's authors use one module for queries and keys.

    Args:
        head_dim: K.
        num_heads: None for γ and β ``[K]``, shared by all heads; H for one of each a head, ``[H, K]``.
        eps: added to the variance.

    Takes ``[B, T, H, K]``, returns ``[B, T, H, K (K + 1) / 2]`` in the same dtype.
    """

    def __init__(self, head_dim: int, num_heads: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        check_count("Rebased", "head_dim", head_dim, "the channels of a head")
        if num_heads is not None:
            check_count("Rebased", "num_heads", num_heads, "or None for weights that all heads share")
        check_number("Rebased", "eps", eps, at_least=0.0)
        shape = (head_dim,) if num_heads is None else (num_heads, head_dim)
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))

    def reset_parameters(self) -> None:
        """Set γ to one and β to zero."""
        nn.init.ones_(self.gamma)
        nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        check_tensors("Rebased", x=x)
        if x.shape[x.dim() - self.gamma.dim() :] != self.gamma.shape:
            expected = ", ".join(map(str, self.gamma.shape))
            raise InputError(
                f"this ReBased map takes tensors [..., {expected}]; got {tuple(x.shape)}. Make it with the head_dim and num_heads "
                "of the tensor"
            )
        wide = at_least_float32(x)
        normed = F.layer_norm(wide, wide.shape[-1:], eps=self.eps)
        moved = self.gamma.to(wide.dtype) * normed + self.beta.to(wide.dtype)
        return torch.cat(_symmetric_square(moved * x.shape[-1] ** -0.25), dim=-1).to(x.dtype)


def _check_channels(what: str, x: Tensor) -> None:
    check_tensors(what, x=x)
    if x.dim() < 1 or x.shape[-1] == 0:
        raise InputError(
            f"{what} takes x [..., K] with K at least 1; got {tuple(x.shape)}. Give heads one channel at least"
        )


def _symmetric_square(x: Tensor) -> list[Tensor]:
    """Features of ``x [..., K]``, to be joined, whose products are (x·y)²: x_i², then √2 x_i x_j for i < j."""
    # Products of slices: gathering both factors by index takes three times as long on a CPU, and its backward, too.
    doubled = x * 2**0.5
    return [x * x, *(doubled[..., i : i + 1] * x[..., i + 1 :] for i in range(x.shape[-1] - 1))]


def gla_log_decay(logits: Tensor, temperature: float = 16.0) -> Tensor:
    """GLA's log decay, g = log(σ(x)) / τ (arXiv 2312.06635).

    Args:
        logits: x of any shape, ``[B, T, H, K]`` for `longspan.gla`, ``[B, T, H]`` for `longspan.simple_gla`.
        temperature: τ; 16 in the paper, which lets most channels forget slowly.

    Returns:
        g in the shape of x, at most 0, float32 (float64 for float64). Finite for logits of any finite size.
    """
    check_tensors("gla_log_decay", logits=logits)
    if check_number("gla_log_decay", "temperature", temperature, at_least=0.0) == 0.0:
        raise InputError(f"gla_log_decay: temperature must be above 0; got {temperature}. The paper's is 16")
    return F.logsigmoid(at_least_float32(logits)) / temperature


def mamba2_log_decay(dt: Tensor, A_log: Tensor, dt_bias: Tensor | None = None) -> Tensor:
    """Mamba-2's log decay, g = −e^A_log · softplus(dt + dt_bias) (arXiv 2405.21060), also that of Gated DeltaNet and KDA.

    Args:
        dt: logits of the step size, ``[B, T, H]`` for `longspan.simple_gla` and `longspan.gated_delta_rule`; ``[B, T, H, K]`` for
            `longspan.gla` and `longspan.kda`.
        A_log: ``[H]``; or what broadcasts with dt, such as ``[H, 1]`` for a decay per channel.
        dt_bias: what broadcasts with dt, or None.

    Returns:
        g in the shape of dt, at most 0, float32 (float64 for float64).
    """
    check_tensors("mamba2_log_decay", dt=dt, A_log=A_log)
    steps = at_least_float32(dt)
    if dt_bias is not None:
        check_tensors("mamba2_log_decay", dt_bias=dt_bias)
        steps = steps + at_least_float32(dt_bias)
    return -at_least_float32(A_log).exp() * F.softplus(steps)


_BOUND_REMEDY = "Pass a number in [0, 1], or the tensor of longspan.features.hgrn2_lower_bounds"


def hgrn2_log_decay(logits: Tensor, lower_bound: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """HGRN2's forget gate f = lower_bound + (1 − lower_bound) · σ(x), as its logarithm and as 1 − f, the key (arXiv 2404.07904).

    Args:
        logits: x, ``[B, T, H, K]``.
        lower_bound: a number in [0, 1], or a tensor that broadcasts with x, such as ``[H, K]``.

    Returns:
        (g, k): g = log f, at most 0, and k = 1 − f, both in the shape of x and float32 (float64 for float64). Both are exact to
        rounding for logits of any finite size, also where f is near 0 or 1. The gradient of a bound of 0 is e^−x for small f; it is
        held below e^60.

    Raises:
        InputError: for a number outside [0, 1].
    """
    check_tensors("hgrn2_log_decay", logits=logits)
    x = at_least_float32(logits)
    if isinstance(lower_bound, Tensor):
        check_tensors("hgrn2_log_decay", lower_bound=lower_bound)
    else:
        lower_bound = check_number("hgrn2_log_decay", "lower_bound", lower_bound, remedy=_BOUND_REMEDY)
        if not 0.0 <= lower_bound <= 1.0:
            raise InputError(f"lower_bound must be a decay between 0 and 1; got {lower_bound}. {_BOUND_REMEDY}")
        if lower_bound == 0.0:
            return F.logsigmoid(x), torch.sigmoid(-x)
        lower_bound = torch.full((), lower_bound, dtype=x.dtype, device=x.device)
    bound = lower_bound.to(x.dtype)
    rest = 1.0 - bound
    k = rest * torch.sigmoid(-x)
    # From 1 − f where that is the smaller: f near 1 would round it away. Only the bound 0 lets f itself underflow.
    near_one = torch.log1p(-k.clamp(max=0.5))
    has_bound = bound > 0
    f = torch.where(has_bound, bound + rest * torch.sigmoid(x), 1.0)
    # The second term is zero where it counts, and has the bound's gradient.
    unbounded = F.logsigmoid(x) + bound * (-x).clamp(max=60.0).exp()
    near_zero = torch.where(has_bound, f.log(), unbounded)
    return torch.where(k <= 0.5, near_one, near_zero), k


def hgrn2_lower_bounds(logits: Tensor) -> Tensor:
    """Lower bounds of the forget gates of all layers, which rise from 0 with depth (HGRN, arXiv 2311.04823).

    Args:
        logits: one learned parameter for all layers, ``[num_layers, ...]``, such as ``[num_layers, H, K]``.

    Returns:
        The shape of logits: row l is the sum of rows 1 to l of the softmax over layers, and row 0 is 0.
    """
    check_tensors("hgrn2_lower_bounds", logits=logits)
    if logits.dim() < 1 or logits.shape[0] == 0:
        raise InputError(
            f"hgrn2_lower_bounds takes logits [num_layers, ...] of at least one layer; got shape {tuple(logits.shape)}. Make one "
            "parameter for all layers"
        )
    shares = logits.softmax(0)
    return torch.cat([torch.zeros_like(shares[:1]), shares[1:].cumsum(0)])


def retnet_log_decay(num_heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's log decays, log(1 − 2^(−5−h)) for head h, ``[num_heads]`` (arXiv 2307.08621, equation 8)."""
    check_count("retnet_log_decay", "num_heads", num_heads)
    return torch.tensor(retnet_log_decays(num_heads), dtype=torch.float64).to(dtype)


def retnet_log_decays(num_heads: int) -> tuple[float, ...]:
    """`retnet_log_decay` as numbers."""
    return tuple(math.log1p(-(2.0 ** (-5 - head))) for head in range(num_heads))


def lightning_log_decay(
    num_heads: int, layer: int = 0, num_layers: int = 1, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Lightning Attention's log decays, ``[num_heads]``, as in TransNormerLLM and MiniMax-01 (arXiv 2307.14995, 2501.08313).

    −slope_h · (1 − layer / (num_layers − 1) + 1e-5), where the slopes are ALiBi's: 2^(−8 (h + 1) / H) for H a power of two;
    otherwise those of the power of two below, followed by every other one of the power of two above.

    Args:
        num_heads: H.
        layer: number of the layer, from 0; deeper layers forget more slowly, the last one hardly at all.
        num_layers: number of layers.

    Raises:
        InputError: for a layer that is not one of num_layers.
    """
    check_count("lightning_log_decay", "num_heads", num_heads)
    check_count("lightning_log_decay", "num_layers", num_layers)
    if not is_int(layer) or not 0 <= layer < num_layers:
        raise InputError(
            f"layer must be one of {num_layers} layers, 0 to {num_layers - 1}; got {layer!r}. Count layers from 0"
        )
    return torch.tensor(lightning_log_decays(num_heads, layer, num_layers), dtype=torch.float64).to(dtype)


def lightning_log_decays(num_heads: int, layer: int, num_layers: int) -> tuple[float, ...]:
    """`lightning_log_decay` as numbers."""
    factor = 1.0 - layer / max(1, num_layers - 1) + 1e-5
    return tuple(-factor * slope for slope in _alibi_slopes(num_heads))


def _alibi_slopes(num_heads: int) -> list[float]:
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
    above = [2.0 ** (-8 * (head + 1) / (2 * below)) for head in range(0, 2 * below, 2)]
    return slopes + above[: num_heads - below]
