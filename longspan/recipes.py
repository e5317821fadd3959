"""Published layers as calls of the operators: normalized linear attention, Mamba-2, HGRN2, and the decays of RetNet and Lightning.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads, K key size, V value size. Every function takes
`layout`, `exchange`, `backend` and `chunk_size` as the operators do, and works over ranks and packed documents as they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.attention.linear import check_query
from longspan.checks import (
    check_count,
    check_flag,
    check_not_empty,
    check_number,
    check_same_device,
    check_tensors,
    is_int,
)
from longspan.errors import InputError
from longspan.exchange import Exchange
from longspan.features import at_least_float32, hgrn2_log_decay
from longspan.functional import gla, simple_gla, write
from longspan.layout import SequenceLayout
from longspan.ops.variants import VARIANTS
from longspan.state import Dense
from longspan.tracing import has_no_values

# Normalized linear attention.


@dataclass
class NormalizedMemory:
    """What `write_normalized` has written: read it with queries, once or several times."""

    _memory: Any
    _eps: float

    def read(self, q: Tensor) -> Tensor:
        """o ``[B, T, H, V]`` for φ(q) ``[B, T, H_k, K]``; the first read waits for the exchange."""
        read = self._memory.read(q, scale=1.0)
        numerator, denominator = read[..., :-1], read[..., -1:]
        # float32 joins with a narrower numerator in one pass, and the quotient is rounded once.
        wide = at_least_float32(denominator)
        return (numerator / (wide + self._eps)).to(q.dtype)

    def final_state(self) -> Tensor:
        """The state after the last token (of each document), ``[B, H, K, V + 1]``: S, and in the last column z."""
        state: Tensor = self._memory.final_state()
        return state


def write_normalized(
    k: Tensor, v: Tensor, *, operator: str = "linear_attention", eps: float = 1e-6, **options: Any
) -> NormalizedMemory:
    """The first phase of `normalized_linear_attention`: write, and start the exchange without waiting for it.

    Args:
        k: φ(k) ``[B, T, H_k, K]``.
        v: ``[B, T, H, V]``.
        operator, eps, options: as in `normalized_linear_attention`.

    Returns:
        An object with ``.read(q) -> o [B, T, H, V]``, and ``.final_state()`` where written with ``output_final_state=True``.

    Raises:
        InputError: for an operator that is no decay, or what does not fit the operator. LayoutError: as in the operators.
    """
    check_tensors("write_normalized", k=k, v=v)
    check_number("write_normalized", "eps", eps, at_least=0.0)
    # One column of values more would hide that there was none.
    check_not_empty(str(operator), "v", v)
    decays = [name for name, variant in VARIANTS.items() if variant.transition is not Dense]
    if operator not in decays:
        raise InputError(
            "normalized linear attention divides by a sum of weights, which an operator has whose transition is a decay: one of "
            f"{', '.join(map(repr, decays))}; got {operator!r}. The delta rules have no such sum"
        )
    # The denominator q·z is what a value of 1 would read: one column more, and z travels with S in the same exchange.
    with_ones = F.pad(v, (0, 1), value=1.0)
    return NormalizedMemory(write(operator, k, with_ones, **options), eps)


def normalized_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, operator: str = "linear_attention", eps: float = 1e-6, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention whose weights add up to 1: ``o_t = S_tᵀ q_t / (z_t·q_t + eps)`` (arXiv 2006.16236, without its feature map).

    S_t is the operator's state, and ``z_t = A_t z_{t-1} + k_t`` decays as it does.

    Args:
        q, k: φ(q) and φ(k) ``[B, T, H_k, K]``, after a feature map whose products are not negative, such as
            `longspan.features.elu_plus_one`, `taylor` or `Rebased`: with others a denominator may come out near zero.
        v: ``[B, T, H, V]``, the same dtype.
        operator: ``"linear_attention"``, or another whose transition is a decay, with its gates in `options`.
        eps: added to every denominator.
        options: gates by name (`g`, `log_decay`) and `layout`, `causal`, `initial_state`, `output_final_state`, `exchange`,
            `backend`, `chunk_size`, as in `longspan.write`. States are ``[B, H, K, V + 1]``: S, and in the last column z.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with ``output_final_state=True``, the pair (o, final_state).

    Numerator and denominator gather in float32 states; for bfloat16 inputs each is rounded once, then the quotient. At 8,192
    tokens, with `elu_plus_one`, the result is then 0.30 % (root mean square) from float64's; rounding float64's own result makes
    0.17 %, and a second call for the denominator in float32 would make 0.25 %. Where values share a mean that is large beside
    their spread, q's gradient is a small difference of large numbers: take the mean off v and add it to o, or use float32.

    Raises:
        InputError: for an operator that is no decay, or what does not fit the operator. LayoutError: as in the operators.
    """
    check_tensors("normalized_linear_attention", k=k)
    check_query("normalized_linear_attention", q, k, None)
    memory = write_normalized(k, v, operator=operator, eps=eps, **options)
    o = memory.read(q)
    return (o, memory.final_state()) if options.get("output_final_state") else o


# Mamba-2.


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
    n_groups: int | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchange = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
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
        n_groups: G; None takes it from B.
        initial_state, output_final_state: states are ``[B, H, N, P]``, float32 (float64 for float64). state-spaces/mamba's are
            transposed, ``[B, H, P, N]``.
        layout, exchange, backend, chunk_size: as in `longspan.simple_gla`.

    Returns:
        y ``[B, T, H, P]`` in the dtype of x; with `output_final_state`, the pair (y, final_state).

    Raises:
        InputError: for shapes that do not fit, an A above 0 or a dt below 0 (looked at on the CPU only).
        LayoutError: as in the operators.
    """
    check_tensors("mamba2", x=x, dt=dt, A=A, B=B, C=C)
    check_tensors("mamba2", **{n: t for n, t in (("D", D), ("z", z), ("dt_bias", dt_bias)) if t is not None})
    check_flag("mamba2", "dt_softplus", dt_softplus)
    if n_groups is not None:
        check_count("mamba2", "n_groups", n_groups, "the groups of B and C, or None")
    if x.dim() != 4:
        raise InputError(
            f"mamba2 takes x [B, T, H, P]; got shape {tuple(x.shape)}. Heads are a dimension of their own: x.unflatten(-1, (H, P))"
        )
    check_not_empty("mamba2", "x", x)
    check_same_device("mamba2", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    batch, num_tokens, num_heads, head_dim = x.shape
    B, C = (_grouped(name, value, n_groups, num_heads) for name, value in (("B", B), ("C", C)))
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
    result = simple_gla(
        C,
        B,
        (x * steps.unsqueeze(-1)).to(x.dtype),
        steps * at_least_float32(A),
        scale=1.0,
        initial_state=initial_state,
        output_final_state=output_final_state,
        layout=layout,
        exchange=exchange,
        backend=backend,
        chunk_size=chunk_size,
    )
    y, final_state = result if isinstance(result, tuple) else (result, None)
    if D is not None:
        y = y + x * at_least_float32(D if D.dim() == 2 else D.unsqueeze(-1))
    if z is not None:
        y = y * F.silu(at_least_float32(z))
    y = y.to(x.dtype)
    return y if final_state is None else (y, final_state)


def _grouped(name: str, value: Tensor, n_groups: int | None, num_heads: int) -> Tensor:
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


# HGRN2.


def hgrn2(
    q: Tensor,
    f: Tensor,
    i: Tensor,
    *,
    lower_bound: Tensor | float = 0.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    layout: SequenceLayout | None = None,
    exchange: str | Exchange = "auto",
    backend: str | None = None,
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """HGRN2's recurrence ``S_t = Diag(f_t) S_{t-1} + (1 − f_t) i_tᵀ``, ``o_t = S_tᵀ q_t`` (arXiv 2404.07904).

    It is `longspan.gla` with k = 1 − f, v = i, g = log f and scale 1.

    Args:
        q: ``[B, T, H, K]``, the paper's output gate; float64, float32 or bfloat16.
        f: logits of the forget gate ``[B, T, H, K]``, in any of these dtypes: f_t = lower_bound + (1 − lower_bound) · σ(f).
        i: values ``[B, T, H, V]`` in the dtype of q.
        lower_bound: a number in [0, 1] or a tensor that broadcasts with f, such as ``[H, K]``, from `hgrn2_lower_bounds`.
        initial_state, output_final_state, layout, exchange, backend, chunk_size: as in `longspan.gla`.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with `output_final_state`, the pair (o, final_state).

    Raises:
        InputError, LayoutError: as in `longspan.gla`.
    """
    check_tensors("hgrn2", q=q, f=f, i=i)
    check_same_device("hgrn2", q=q, f=f, i=i)
    g, k = hgrn2_log_decay(f, lower_bound)
    return gla(
        q,
        k.to(q.dtype),
        i,
        g,
        scale=1.0,
        initial_state=initial_state,
        output_final_state=output_final_state,
        layout=layout,
        exchange=exchange,
        backend=backend,
        chunk_size=chunk_size,
    )


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


# Constant decays, for `longspan.retention`.


def retnet_log_decay(num_heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """RetNet's log decays, log(1 − 2^(−5−h)) for head h, ``[num_heads]`` (arXiv 2307.08621, equation 8)."""
    check_count("retnet_log_decay", "num_heads", num_heads)
    heads = torch.arange(num_heads, dtype=torch.float64)
    return torch.log1p(-torch.exp2(-5 - heads)).to(dtype)


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
    factor = 1.0 - layer / max(1, num_layers - 1) + 1e-5
    return (-factor * torch.tensor(_alibi_slopes(num_heads), dtype=torch.float64)).to(dtype)


def _alibi_slopes(num_heads: int) -> list[float]:
    below = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (head + 1) / below) for head in range(below)]
    above = [2.0 ** (-8 * (head + 1) / (2 * below)) for head in range(0, 2 * below, 2)]
    return slopes + above[: num_heads - below]
