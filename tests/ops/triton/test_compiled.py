"""Every kernel compiles for the GPUs that it is meant for, without one: a kernel that does not is seen here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Not in this process: here the kernels are the interpreter's.
CODE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longspan.ops.triton import attend, convolution, gate_gradient, log_decays, norm, states

BF16, F32, I32 = "*bf16", "*fp32", "*i32"
ATTEND = dict(a=BF16, b=BF16, c=BF16, out=BF16, g=F32, log_decay=F32, states=F32, arriving=F32, carried=F32, dotted=BF16, dots=F32,
              other_states=F32, of_end=F32, table=I32, scale_in=F32, scale_out="fp32")
WRITE = dict(left=BF16, right=BF16, g=F32, log_decay=F32, states=F32, totals=F32, table=I32, scale="fp32")
FLAGS = dict(LOWEST=-128.0, PRECISION="native")


def attended(decay, axis, reverse, size=128, block=64, chunk=64, dtype=BF16, **constants):
    state = {"state_row": 1} if axis else {"state_column": 1}
    types = {name: dtype if kind == BF16 else kind for name, kind in ATTEND.items()}
    types["scale_in"] = F32 if reverse else "fp32"
    # Sums of channels are float64 for float32 inputs.
    types["g"] = "*fp64" if decay == 3 and dtype == F32 else F32
    constants = {**FLAGS, **state, "PRECISION": "float32" if dtype == F32 else "native", **constants}
    return types, dict(constants, DECAY=decay, AXIS=axis, REVERSE=reverse, HAS_STATES=True, HAS_ARRIVING=True,
                       HAS_DOTS=decay == 2 or decay == 3 and axis == 1, HAS_OTHER_STATES=axis == 1, INSIDE=True,
                       LOADS_SCALE=reverse,
                       C=chunk, LEVELS=chunk.bit_length() - 1, BK=size, BV=block)


def written(decay, reverse, chunk=64):
    return dict(WRITE), dict(FLAGS, DECAY=decay, REVERSE=reverse, C=chunk, BK=64, BV=64)


def convolved(**constants):
    half = ("x", "weight", "bias", "y", "grad_y", "grad_x", "before", "y_rows", "grad_rows", "grad_before")
    types = {**dict.fromkeys(half, BF16), **dict.fromkeys(("z_heads", "grad_z_heads", "sums"), F32), "rows": I32, "heads": I32}
    return types, dict(constants, SILU=True, W=4, BC=convolution.CHANNELS)


GATES = {
    **dict.fromkeys(("sums", "subtracted_sums", "of_end", "other_end"), F32),
    "g": F32, "out": F32, "table": I32, "sign": "fp32",
}
GATE_FLAGS = dict(LOWEST=-128.0, HAS_SUBTRACTED=True, HAS_END=True, HAS_OTHER_END=True, C=32, BK=64)
NORM = dict.fromkeys(("x", "gate", "weight", "y", "grad_y", "grad_x", "grad_gate"), BF16) | {"sums": F32, "eps": "fp32"}
INSIDE = dict(HAS_BIAS=True, HAS_HEADS=True, BT=convolution.TOKENS)
BACKWARD = dict(INSIDE, NEEDS_X=True, NEEDS_SUMS=True)
ONES = dict(num_tokens=1, num_channels=1, num_head_rows=1)

CASES = {
    "attend, head": (attend.attend_kernel, *attended(1, 0, False), 4),
    "attend, token": (attend.attend_kernel, *attended(2, 1, True), 4),
    "attend, 256": (attend.attend_kernel, *attended(2, 0, False, size=256, chunk=32), 8),
    "attend, channel": (attend.attend_kernel, *attended(3, 0, True, chunk=32), 8),
    "attend, channel of columns": (attend.attend_kernel, *attended(3, 1, False, chunk=32), 8),
    # float16 reads states in TF32, float32 multiplies in three passes.
    "attend, float16": (attend.attend_kernel, *attended(2, 0, False, size=64, dtype="*fp16"), 4),
    "attend, float32": (attend.attend_kernel, *attended(1, 0, True, size=64, block=32, dtype=F32), 4),
    "attend, channel, float32": (attend.attend_kernel, *attended(3, 1, True, size=64, block=32, chunk=32, dtype=F32), 4),
    "cumulate, float64": (log_decays.cumulate_kernel, dict(g=F32, b="*fp64", table=I32), dict(LOWEST=-128.0, C=32, BK=64), 4),
    # A launch makes constants of sizes that are 1.
    "attend, heads of one number": (attend.attend_kernel, *attended(2, 0, False, 16, 16, num_contracted=1, num_columns=1), 4),
    "write, none": (states.write_kernel, *written(0, False), 4),
    "write, token": (states.write_kernel, *written(2, False), 4),
    "write, channel": (states.write_kernel, *written(3, True, 32), 4),
    "scan": (states.scan_kernel, dict(states=F32, totals=F32, starts=F32, ends=F32, pieces=I32),
             dict(HAS_STARTS=True, HAS_ENDS=True, DECAY=3, REVERSE=True, BK=32, BV=32), 4),
    "carry": (states.carry_kernel, dict(totals=F32, carried=F32, pieces=I32), dict(REVERSE=False, BK=128), 4),
    "cumulate": (log_decays.cumulate_kernel, dict(g=F32, b=F32, table=I32), dict(LOWEST=-128.0, C=32, BK=64), 4),
    "gates, channel": (gate_gradient.gate_kernel, GATES, GATE_FLAGS, 4),
    "gates, token": (gate_gradient.gate_kernel, GATES, dict(GATE_FLAGS, BK=1, num_channels=1), 4),
    "convolution": (convolution.inside_kernel, *convolved(**INSIDE), convolution.NUM_WARPS),
    "convolution, backward": (convolution.inside_backward_kernel, *convolved(**BACKWARD), convolution.NUM_WARPS),
    "convolution of one number": (convolution.inside_backward_kernel, *convolved(**BACKWARD, **ONES), convolution.NUM_WARPS),
    "convolution, heads": (convolution.heads_kernel, *convolved(BW=4), 1),
    "norm": (norm.forward_kernel, NORM, dict(SILU=True, ROWS=32, BD=128), 4),
    "norm, backward": (norm.backward_kernel, NORM, dict(SILU=True, ROWS=32, BD=128), 4),
    "norm of a whole row": (norm.backward_kernel, NORM, dict(SILU=False, ROWS=1, BD=8192), 8),
    "convolution, heads, backward": (convolution.heads_backward_kernel, *convolved(BW=4), 1),
}


def compiled(kernel, types, constants, num_warps, capability):
    function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    # As a launch would find them: sizes and strides that 16 divides.
    attributes = {(place,): [["tt.divisibility", 16]] for place, (name, kind) in enumerate(signature.items())
                  if kind not in ("constexpr", "fp32") and not name.endswith("heads")}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": 2}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


capability = int(sys.argv[1])
results = {}
for name, case in CASES.items():
    kernel = compiled(*case, capability)
    results[name] = {"target": f".target sm_{capability}" in kernel.asm["ptx"], "shared": kernel.metadata.shared}
print(json.dumps(results))
"""

# Bytes of shared memory that a block may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_for_ampere_and_hopper_and_fits_its_shared_memory(capability: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(capability)],
        env={"PATH": "/usr/bin:/bin", "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 26
    for name, kernel in results.items():
        assert kernel["target"], name
        assert 0 <= kernel["shared"] <= SHARED_MEMORY[capability], (name, kernel)
