"""The public operators, one a piece of mathematics, and the two-phase form that serves them all.

Shapes: B batch rows, T tokens (this rank's tokens where a layout is given), H heads of v, H_k heads of q and k (H a multiple of
H_k), K key size, V value size.
"""

from longspan.attention.by_name import write
from longspan.attention.hgrn2 import hgrn2
from longspan.attention.mamba2 import mamba2
from longspan.attention.normalized import normalized_linear_attention, write_normalized
from longspan.attention.rwkv7 import rwkv7
from longspan.attention.selective_scan import selective_scan
from longspan.functional.decay import gla, retention, simple_gla
from longspan.functional.delta import delta_rule, gated_delta_product, gated_delta_rule, kda
from longspan.functional.linear import linear_attention
from longspan.functional.low_rank import comba, dplr_delta_rule
from longspan.functional.slots import gated_slot_attention

__all__ = [
    "comba",
    "delta_rule",
    "dplr_delta_rule",
    "gated_delta_product",
    "gated_delta_rule",
    "gated_slot_attention",
    "gla",
    "hgrn2",
    "kda",
    "linear_attention",
    "mamba2",
    "normalized_linear_attention",
    "retention",
    "rwkv7",
    "selective_scan",
    "simple_gla",
    "write",
    "write_normalized",
]
