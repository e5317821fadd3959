"""The variants of linear attention, one a file. A new one is a file and a line here."""

from longspan.ops.variants.comba import COMBA
from longspan.ops.variants.delta_rule import DELTA_RULE
from longspan.ops.variants.dplr_delta_rule import DPLR_DELTA_RULE
from longspan.ops.variants.gated_delta_product import GATED_DELTA_PRODUCT
from longspan.ops.variants.gated_delta_rule import GATED_DELTA_RULE
from longspan.ops.variants.gated_slot_attention import GATED_SLOT_ATTENTION
from longspan.ops.variants.gla import GLA
from longspan.ops.variants.gla_with_bonus import GLA_WITH_BONUS
from longspan.ops.variants.kda import KDA
from longspan.ops.variants.linear_attention import LINEAR_ATTENTION
from longspan.ops.variants.retention import RETENTION
from longspan.ops.variants.simple_gla import SIMPLE_GLA
from longspan.ops.variants.variant import Variant

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        LINEAR_ATTENTION,
        RETENTION,
        SIMPLE_GLA,
        GLA,
        GLA_WITH_BONUS,
        GATED_SLOT_ATTENTION,
        DELTA_RULE,
        GATED_DELTA_RULE,
        KDA,
        GATED_DELTA_PRODUCT,
        DPLR_DELTA_RULE,
        COMBA,
    )
}

__all__ = ["VARIANTS", "Variant"]
