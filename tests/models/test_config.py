"""What a config promises, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longspan.errors import ConfigError
from longspan.models import LinearLlama3Config
from longspan.models.gates import GATE_BUILDERS
from longspan.ops.variants import VARIANTS


def config(**changes: Any) -> LinearLlama3Config:
    return LinearLlama3Config(**{"vocab_size": 100, **changes})


def test_the_pattern_is_tiled_over_the_layers() -> None:
    assert "".join(config(pattern="LLLN", num_layers=10).layer_kinds) == "LLLNLLLNLL"
    assert "".join(config(pattern="N", num_layers=3).layer_kinds) == "NNN"


def test_each_linear_layer_can_have_its_own_operator() -> None:
    operators = ("retention", "simple_gla", "linear_attention")
    assert config(operator=operators).layer_operators == (*operators, "softmax")
    assert config(operator="retention", num_layers=5).layer_operators == (*["retention"] * 3, "softmax", "retention")


def test_every_operator_of_a_layer_is_a_variant() -> None:
    assert set(GATE_BUILDERS) <= set(VARIANTS)


def test_a_config_survives_json() -> None:
    made = config(operator=("retention", "simple_gla", "retention"), num_kv_heads=2)
    read = LinearLlama3Config(**json.loads(json.dumps(made.to_dict())))
    assert read == made
    assert hash(read) == hash(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ""}, r"pattern must be letters L .* and N .*; got ''"),
        ({"pattern": "LLSN"}, r"pattern must be .* such as LLLN; got 'LLSN'"),
        (
            {"operator": "simple_gal"},
            r"operator must be one of linear_attention, retention, simple_gla.*; got 'simple_gal'",
        ),
        ({"operator": ["retention"]}, r"operator lists 1 names for 3 L layers .*: give one for each, or a single one"),
        ({"operator": "softmax"}, r"operator must be one of .*; got 'softmax'"),
        ({"dim": 250}, r"dim 250 is not a multiple of num_heads 4. Change one of them, or set head_dim"),
        ({"num_kv_heads": 3}, r"num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 33}, r"must be even, .*; got 33"),
        ({"num_layers": 0}, r"num_layers must be an integer of at least 1; got 0"),
        ({"hidden_dim": 12.5}, r"hidden_dim must be an integer of at least 1; got 12.5"),
        ({"feed_forward_chunk": -1}, r"feed_forward_chunk must be an integer of at least 1, or 0 for all .*; got -1"),
        ({"feed_forward_chunk": False}, r"feed_forward_chunk must be an integer .*; got False"),
        ({"vocab_size": True}, r"vocab_size must be an integer of at least 1; got True"),
        ({"window": 0}, r"window must be an integer of at least 1; got 0"),
        ({"num_kv_heads": 0}, r"num_kv_heads must be an integer of at least 1; got 0"),
        ({"rope_theta": 0.0}, r"rope_theta must be greater than 0; got 0.0"),
        ({"norm_eps": float("nan")}, r"norm_eps must be greater than 0; got nan"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_linear_model_may_have_heads_of_odd_size() -> None:
    assert config(pattern="L", head_dim=33).size_of_head == 33
