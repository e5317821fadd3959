"""The product of two tiles, in the precision of their dtype."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a [M, K] · b [K, N]``, of one dtype, summed in float32; PRECISION: see `longspan.ops.triton.launch.precision`."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PRECISION == "float32":
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def product_with_state(a, state, PRECISION: tl.constexpr):
    """``a [M, K] · state [K, N]`` with a float32 state.

    float16 does not hold what a state may grow to: such products are formed in TF32, which has its digits and float32's range.
    """
    if PRECISION == "native" and a.dtype == tl.float16:
        return tl.dot(a.to(tl.float32), state, input_precision="tf32")
    else:
        return product(a, state.to(a.dtype), PRECISION)
