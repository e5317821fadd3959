"""Mamba-2's state-space layer over ranks: `mamba2`."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack, overload

import torch.nn.functional as F
from torch import Tensor

from longspan.attention.by_name import apply_operator
from longspan.attention.options import LayerOptions, takes
from longspan.autocast import as_in_product
from longspan.checks import check_count, check_flag, check_not_empty, check_same_device, check_tensors, described
from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.tracing import has_no_values


class Mamba2Options(LayerOptions, total=False):
    """What `mamba2` takes beside x, dt, A, B and C."""

    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    n_groups: int | None


@overload
def mamba2(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    output_final_state: Literal[False] = ..., **options: Unpack[Mamba2Options],
) -> Tensor: ...  # fmt: skip
@overload
def mamba2(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    output_final_state: Literal[True], **options: Unpack[Mamba2Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def mamba2(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *,
    output_final_state: bool, **options: Unpack[Mamba2Options],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@takes(LayerOptions)
def mamba2(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    n_groups: int | None = None,
    output_final_state: bool = False,
    **options: Unpack[LayerOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's state-space layer, with the names of state-spaces/mamba (arXiv 2405.21060).

    ``S_t = e^{dt_t A} S_{t-1} + dt_t B_t x_tᵀ``, ``y_t = S_tᵀ C_t + D x_t``, times silu(z_t): `longspan.simple_gla` with
    q = C, k = B, v = dt · x, g = dt · A and scale 1.

    Args:
        x: ``[B, T, H, P]``, float64, float32 or bfloat16.
        dt: step sizes ``[B, T, H]``, at least 0; or their logits, with `dt_softplus`. Not rounded to the dtype of x: pass float32.
        A: ``[H]``, at most 0: −e^A_log.
        B, C: ``[B, T, G, N]`` in the dtype of x, G groups that share their heads, H a multiple of G; or ``[B, T, G · N]`` with
            `n_groups` G.
        D: ``[H]`` or ``[H, P]``, or None.
        z: gate ``[B, T, H, P]``, or None.
        dt_bias: ``[H]``, added to dt, or None.
        dt_softplus: take the softplus of dt (after dt_bias).
        dt_limit: the smallest and the largest step size: what is beyond (after the softplus) is clamped, and takes no gradient, as
            by torch.clamp. ``time_step_limit`` in the configs of Transformers.
        n_groups: G; None takes it from B.
        initial_state, output_final_state: states are ``[B, H, N, P]``, float32 (float64 for float64). Those of state-spaces/mamba
            and of Transformers' caches are transposed, ``[B, H, P, N]``: pass ``state.mT``.
        layout, exchange, schedule, backend, chunk_size: as in `longspan.simple_gla`.

    Returns:
        y ``[B, T, H, P]`` in the dtype of x; with `output_final_state`, the pair (y, final_state).

    Raises:
        InputError: for shapes that do not fit, a dt_limit that is no pair of rising numbers of at least 0, an A above 0 or a dt
            below 0 before it is clamped (looked at on the CPU only).
        LayoutError: as in the operators.
    """
    check_tensors("mamba2", x=x, dt=dt, A=A, B=B, C=C)
    check_tensors("mamba2", **{n: t for n, t in (("D", D), ("z", z), ("dt_bias", dt_bias)) if t is not None})
    x, B, C = as_in_product(x), as_in_product(B), as_in_product(C)
    check_flag("mamba2", "dt_softplus", dt_softplus)
    smallest, largest = _check_limit(dt_limit)
    if n_groups is not None:
        check_count("mamba2", "n_groups", n_groups, "the groups of B and C, or None")
    if x.dim() != 4:
        raise InputError(
            f"mamba2 takes x [B, T, H, P]; got shape {tuple(x.shape)}. Heads are a dimension of their own: x.unflatten(-1, (H, P))"
        )
    check_not_empty("mamba2", "x", x)
    check_same_device("mamba2", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    batch, num_tokens, num_heads, head_dim = x.shape
    B, C = (_in_groups(name, value, n_groups, num_heads) for name, value in (("B", B), ("C", C)))
    _expect("dt", dt, (batch, num_tokens, num_heads), "[B, T, H]")
    _expect("A", A, (num_heads,), "[H]")
    if D is not None and tuple(D.shape) not in ((num_heads,), (num_heads, head_dim)):
        raise InputError(
            f"mamba2: D must be [H] or [H, P] = {(num_heads, head_dim)}; got {tuple(D.shape)}. Expand it, or leave it out"
        )
    if z is not None:
        _expect("z", z, tuple(x.shape), "[B, T, H, P]")
    steps = at_least_float32(dt)
    if dt_bias is not None:
        _expect("dt_bias", dt_bias, (num_heads,), "[H]")
        steps = steps + at_least_float32(dt_bias)
    if dt_softplus:
        steps = F.softplus(steps)
    _check_signs(A, steps)
    if smallest > 0 or largest < math.inf:
        steps = steps.clamp(smallest, largest)
    v, g = (x * steps.unsqueeze(-1)).to(x.dtype), steps * at_least_float32(A)
    result = apply_operator("simple_gla", C, B, v, {"g": g}, output_final_state, scale=1.0, **options)
    y, final_state = result if isinstance(result, tuple) else (result, None)
    if D is not None:
        y = y + x * at_least_float32(D if D.dim() == 2 else D.unsqueeze(-1))
    if z is not None:
        y = y * F.silu(at_least_float32(z))
    y = y.to(x.dtype)
    return y if final_state is None else (y, final_state)


def _in_groups(name: str, value: Tensor, n_groups: int | None, num_heads: int) -> Tensor:
    """B or C as ``[B, T, G, N]``."""
    if value.dim() == 3 and n_groups is not None and n_groups > 0 and value.shape[-1] % n_groups == 0:
        value = value.unflatten(-1, (n_groups, -1))
    if value.dim() != 4 or (n_groups is not None and value.shape[2] != n_groups):
        raise InputError(
            f"mamba2: {name} must be [B, T, G, N], or [B, T, G * N] with n_groups G; got shape {tuple(value.shape)} and "
            f"n_groups {n_groups}"
        )
    check_not_empty("mamba2", name, value)
    if num_heads % value.shape[2]:
        raise InputError(
            f"mamba2: the {num_heads} heads of x must be a multiple of the {value.shape[2]} groups of {name}. Pass as many groups "
            "as divide the heads"
        )
    return value


def _expect(name: str, value: Tensor, shape: tuple[int, ...], dims: str) -> None:
    if tuple(value.shape) != shape:
        raise InputError(
            f"mamba2: {name} must be {dims} = {shape}; got shape {tuple(value.shape)}. Lay it out as the docstring says"
        )


def _check_limit(dt_limit: Any) -> tuple[float, float]:
    is_pair = isinstance(dt_limit, tuple | list) and len(dt_limit) == 2
    if not is_pair or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in dt_limit):
        raise InputError(
            f"mamba2: dt_limit must be two numbers, the smallest and the largest step size; got {described(dt_limit)}. Leave it "
            "out for (0.0, math.inf)"
        )
    smallest, largest = dt_limit
    # A NaN is in no order.
    if not 0 <= smallest <= largest or smallest == math.inf:
        raise InputError(
            f"mamba2: dt_limit must rise from a number of at least 0; got {described(dt_limit)}. Leave it out for (0.0, math.inf)"
        )
    return smallest, largest


def _check_signs(A: Tensor, steps: Tensor) -> None:
    # On other devices the check would make the host wait; a compiler does not see values.
    if A.device.type != "cpu" or has_no_values(A) or not A.numel() or not steps.numel():
        return
    if not bool(A.detach().amax() <= 0):
        raise InputError(f"mamba2: A must be at most 0, such as -torch.exp(A_log); got {float(A.detach().amax()):g}")
    if not bool(steps.detach().amin() >= 0):
        raise InputError(
            f"mamba2: dt must be at least 0; its smallest value is {float(steps.detach().amin()):g}. If these are logits, pass "
            "dt_softplus=True"
        )
