"""Linear attention whose weights add up to 1.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads, H_k heads of keys, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack, overload

import torch.nn.functional as F
from torch import Tensor

from longspan.attention.by_name import check_schedule, overlaps, write
from longspan.attention.linear import check_query
from longspan.attention.memory import StateMemory
from longspan.attention.options import Schedule, StateOptions
from longspan.autocast import as_in_product
from longspan.checks import check_not_empty, check_number, check_tensors
from longspan.dtypes import at_least_float32
from longspan.errors import InputError
from longspan.ops.variants import VARIANTS
from longspan.state import Dense


@dataclass
class NormalizedMemory:
    """What `write_normalized` has written: read it with queries, once or several times."""

    memory: StateMemory
    _eps: float

    def read(self, q: Tensor) -> Tensor:
        """o ``[B, T, H, V]`` for φ(q) ``[B, T, H_k, K]``; the first read waits for the exchange."""
        q = as_in_product(q)
        return self._divided(q, self.memory.read(q, scale=1.0))

    def read_overlapped(self, q: Tensor) -> Tensor:
        """`read`, in LASP-2's own schedule."""
        q = as_in_product(q)
        return self._divided(q, self.memory.read_overlapped(q, scale=1.0))

    def _divided(self, q: Tensor, read: Tensor) -> Tensor:
        numerator, denominator = read[..., :-1], read[..., -1:]
        # float32 joins with a narrower numerator in one pass, and the quotient is rounded once.
        wide = at_least_float32(denominator)
        return (numerator / (wide + self._eps)).to(q.dtype)

    def final_state(self) -> Tensor:
        """The state after the last token (of each document), ``[B, H, K, V + 1]``: S, and in the last column z."""
        return self.memory.final_state()


class DecayOptions(StateOptions, total=False):
    """What an operator takes whose transition is a decay: its gates, and options as in `longspan.write`."""

    g: Tensor
    u: Tensor
    log_decay: Tensor | Sequence[float]
    causal: bool


def write_normalized(
    k: Tensor,
    v: Tensor,
    *,
    operator: str = "linear_attention",
    eps: float = 1e-6,
    output_final_state: bool = False,
    **options: Unpack[DecayOptions],
) -> NormalizedMemory:
    """The first phase of `normalized_linear_attention`: write, and start the exchange without waiting for it.

    Args:
        k: φ(k) ``[B, T, H_k, K]``.
        v: ``[B, T, H, V]``.
        operator, eps, output_final_state, options: as in `normalized_linear_attention`.

    Returns:
        An object with ``.read(q) -> o [B, T, H, V]``, and ``.final_state()`` where written with ``output_final_state=True``.

    Raises:
        InputError: for an operator that is no decay, or what does not fit the operator. LayoutError: as in the operators.
    """
    check_tensors("write_normalized", k=k, v=v)
    check_number("write_normalized", "eps", eps, at_least=0.0)
    # One column of values more would hide that there was none.
    check_not_empty(str(operator), "v", v)
    decays = [name for name, variant in VARIANTS.items() if variant.transition is not Dense and not variant.has_slots]
    if operator not in decays:
        raise InputError(
            "normalized linear attention divides by a sum of weights, which an operator has whose transition is a decay: one of "
            f"{', '.join(map(repr, decays))}; got {operator!r}. The delta rules have no such sum, and slots have a softmax"
        )
    # The denominator q·z is what a value of 1 would read: one column more, and z travels with S in the same exchange.
    with_ones = F.pad(v, (0, 1), value=1.0)
    return NormalizedMemory(write(operator, k, with_ones, output_final_state=output_final_state, **options), eps)


@overload
def normalized_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, operator: str = ..., eps: float = ..., schedule: Schedule = ...,
    output_final_state: Literal[False] = ..., **options: Unpack[DecayOptions],
) -> Tensor: ...  # fmt: skip
@overload
def normalized_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, operator: str = ..., eps: float = ..., schedule: Schedule = ...,
    output_final_state: Literal[True], **options: Unpack[DecayOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def normalized_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, operator: str = ..., eps: float = ..., schedule: Schedule = ...,
    output_final_state: bool, **options: Unpack[DecayOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def normalized_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    operator: str = "linear_attention",
    eps: float = 1e-6,
    schedule: Schedule = "auto",
    output_final_state: bool = False,
    **options: Unpack[DecayOptions],
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention whose weights add up to 1: ``o_t = S_tᵀ q_t / (z_t·q_t + eps)`` (arXiv 2006.16236, without its feature map).

    S_t is the operator's state, and ``z_t = A_t z_{t-1} + k_t`` decays as it does.

    Args:
        q, k: φ(q) and φ(k) ``[B, T, H_k, K]``, after a feature map whose products are not negative, such as
            `longspan.features.elu_plus_one`, `taylor` or `Rebased`: with others a denominator may come out near zero.
        v: ``[B, T, H, V]``, the same dtype.
        operator: ``"linear_attention"``, or another whose transition is a decay, with its gates in `options`.
        eps: added to every denominator.
        schedule: as in `longspan.linear_attention`.
        output_final_state: also return the state after the last token (of each document), on every rank.
        options: gates by name (`g`, `log_decay`) and `layout`, `causal`, `initial_state`, `exchange`, `backend`, `chunk_size`, as
            in `longspan.write`. States are ``[B, H, K, V + 1]``: S, and in the last column z.

    Returns:
        o ``[B, T, H, V]`` in the dtype of q; with ``output_final_state=True``, the pair (o, final_state).

    Numerator and denominator gather in float32 states; for bfloat16 inputs each is rounded once, then the quotient. At 8,192
    tokens, with `elu_plus_one`, the result is then 0.30 % (root mean square) from float64's; rounding float64's own result makes
    0.17 %, and a second call for the denominator in float32 would make 0.25 %. Where values share a mean that is large beside
    their spread, q's gradient is a small difference of large numbers: take the mean off v and add it to o, or use float32.

    Raises:
        InputError: for an operator that is no decay, or what does not fit the operator. LayoutError: as in the operators.
    """
    q, k, v = as_in_product(q), as_in_product(k), as_in_product(v)
    check_tensors("normalized_linear_attention", k=k)
    check_query("normalized_linear_attention", q, k, None)
    check_schedule("normalized_linear_attention", schedule, options.get("causal", True))
    memory = write_normalized(k, v, operator=operator, eps=eps, output_final_state=output_final_state, **options)
    o = memory.read_overlapped(q) if overlaps(schedule, memory.memory) else memory.read(q)
    return (o, memory.final_state()) if output_final_state else o
