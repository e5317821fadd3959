"""longspan: sequence parallelism for linear-attention and hybrid transformers."""

from typing import TYPE_CHECKING, Any

from longspan.attention.convolution import causal_conv1d
from longspan.attention.halo_of_pieces import halo, tail
from longspan.attention.long_convolution.kernels import ExponentialKernel, FunctionKernel
from longspan.attention.long_convolution.operator import long_conv1d
from longspan.attention.memory import KeyMemory, Memory, StateMemory
from longspan.attention.shift import token_shift
from longspan.errors import CheckpointError, ConfigError, DataError, InputError, LayoutError, LongspanError
from longspan.exchange import record_traffic
from longspan.exchange.all_reduce import sum_over_ranks
from longspan.functional import (
    comba,
    delta_rule,
    dplr_delta_rule,
    gated_delta_product,
    gated_delta_rule,
    gated_slot_attention,
    gla,
    hgrn2,
    kda,
    linear_attention,
    mamba2,
    normalized_linear_attention,
    retention,
    rwkv7,
    selective_scan,
    simple_gla,
    write,
    write_normalized,
)
from longspan.layout import SequenceLayout
from longspan.ops.chunked.cross_entropy import chunked_cross_entropy
from longspan.ops.norm import rms_norm_gated

if TYPE_CHECKING:
    from longspan.attention.softmax import EarlierKeys, softmax_attention
    from longspan.integrations.transformers.prefill import prefill
    from longspan.parallel import parallelize, sum_gradients, unparallelize
    from longspan.streaming import stream

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EarlierKeys",
    "ExponentialKernel",
    "FunctionKernel",
    "InputError",
    "KeyMemory",
    "LayoutError",
    "LongspanError",
    "Memory",
    "SequenceLayout",
    "StateMemory",
    "causal_conv1d",
    "chunked_cross_entropy",
    "comba",
    "delta_rule",
    "dplr_delta_rule",
    "gated_delta_product",
    "gated_delta_rule",
    "gated_slot_attention",
    "gla",
    "halo",
    "hgrn2",
    "kda",
    "linear_attention",
    "long_conv1d",
    "mamba2",
    "normalized_linear_attention",
    "parallelize",
    "prefill",
    "record_traffic",
    "retention",
    "rms_norm_gated",
    "rwkv7",
    "selective_scan",
    "simple_gla",
    "softmax_attention",
    "stream",
    "sum_gradients",
    "sum_over_ranks",
    "tail",
    "token_shift",
    "unparallelize",
    "write",
    "write_normalized",
]

_LAZY = {
    "EarlierKeys": "longspan.attention.softmax",
    "parallelize": "longspan.parallel",
    "prefill": "longspan.integrations.transformers.prefill",
    "softmax_attention": "longspan.attention.softmax",
    "stream": "longspan.streaming",
    "sum_gradients": "longspan.parallel",
    "unparallelize": "longspan.parallel",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'longspan' has no attribute {name!r}")
