"""What a config promises, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longspan.errors import ConfigError
from longspan.models import LinearLlama3Config, num_parameters


def config(**changes: Any) -> LinearLlama3Config:
    return LinearLlama3Config(**{"vocab_size": 100, **changes})


def test_the_pattern_is_tiled_over_the_layers() -> None:
    assert "".join(config(pattern="LLLN", num_layers=10).layer_kinds) == "LLLNLLLNLL"
    assert "".join(config(pattern="N", num_layers=3).layer_kinds) == "NNN"


def test_each_linear_layer_can_have_its_own_operator() -> None:
    operators = ("retention", "simple_gla", "linear_attention")
    assert config(operator=operators).layer_operators == (*operators, "softmax")
    assert config(operator="retention", num_layers=5).layer_operators == (*["retention"] * 3, "softmax", "retention")


def test_a_list_names_the_mixer_of_each_layer() -> None:
    named = config(pattern=["gla", "softmax", "mamba2", "softmax"])
    assert named.layer_operators == ("gla", "softmax", "mamba2", "softmax")
    assert "".join(named.layer_kinds) == "LNLN"
    assert config(pattern=["gla", "softmax", "mamba2"], num_layers=6).layer_operators[3:] == (
        "gla",
        "softmax",
        "mamba2",
    )
    assert config(pattern="softmax") == config(pattern=["softmax"])
    assert config(pattern="hgrn2", num_layers=2).layer_operators == ("hgrn2", "hgrn2")


def test_letters_and_names_make_the_same_model() -> None:
    lettered, named = config(pattern="LN", operator="gla"), config(pattern=("gla", "softmax"))
    assert lettered.layer_operators == named.layer_operators == ("gla", "softmax", "gla", "softmax")
    assert num_parameters(lettered) == num_parameters(named)


def test_a_config_survives_json() -> None:
    for changes in ({"operator": ("retention", "simple_gla", "retention")}, {"pattern": ["gla", "softmax"]}):
        made = config(num_kv_heads=2, **changes)
        read = LinearLlama3Config(**json.loads(json.dumps(made.to_dict())))
        assert read == made
        assert hash(read) == hash(made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ""}, r"pattern must be letters L .* and N .*; got ''"),
        ({"pattern": "LLSN"}, r"pattern must be .* such as LLLN, or .*; got 'LLSN'. Did you mean 'LLNN'\?"),
        (
            {"operator": "simple_gal"},
            r"operator must be one of linear_attention, lightning.*; got 'simple_gal'. Did you mean 'simple_gla'\?",
        ),
        ({"pattern": "llln"}, r"; got 'llln'. Did you mean 'LLLN'\?"),
        ({"pattern": "LX"}, r"; got 'LX'. Did you mean 'LN'\?"),
        ({"pattern": "mamb2"}, r"; got 'mamb2'. Did you mean 'mamba2'\?"),
        ({"pattern": ["gla", "sofmax"]}, r"pattern must be .*; got 'sofmax' among 2 names. Did you mean 'softmax'\?"),
        ({"pattern": ["L", "N"]}, r"pattern must be .* names of mixers.*; got 'L' among 2 names"),
        ({"pattern": [["gla"]]}, r"pattern must be a string or a list of strings; got \[\['gla'\]\]"),
        ({"operator": None}, r"operator must be a string or a list of strings; got None"),
        ({"pattern": []}, r"pattern lists 0 names for 4 layers"),
        (
            {"pattern": ["gla"] * 3},
            r"pattern lists 3 names for 4 layers: give one for each, or as many as can be repeated",
        ),
        (
            {"pattern": ["gla", "softmax"], "operator": "kda"},
            r"pattern names the mixer of each layer .*Leave one of them out",
        ),
        ({"operator": "delta_rule"}, r"got 'delta_rule'. Did you mean 'deltanet'\?"),
        ({"operator": "gated_delta_rule"}, r"got 'gated_delta_rule'. Did you mean 'gated_deltanet'\?"),
        ({"operator": "gla", "head_dim": 5, "pattern": "L"}, r"must be even, for the keys of gla.*; got 5"),
        (
            {"operator": "retention", "head_dim": 5, "pattern": "L"},
            r"must be even, for the rotary embedding of ret.*; got 5",
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
        ({"rope_factor": 0.5}, r"rope_factor must be at least 1, which leaves all as it is; got 0.5"),
        ({"rope_factor": float("nan")}, r"rope_factor must be a number greater than 0; got nan"),
        ({"rope_factor": True}, r"rope_factor must be a number greater than 0; got True"),
        (
            {"rope_factor": 8.0, "rope_low_freq_factor": 5.0},
            r"rope_low_freq_factor must be less than .*; got 5.0 and 4.0",
        ),
        (
            {"rope_factor": 8.0, "rope_original_length": 0},
            r"rope_original_length must be an integer of at least 1; got 0",
        ),
        (
            {"rope_original_length": 4096},
            r"rope_original_length is 4096, which concerns a scaled rotary embedding, and rope_factor is 1. Set rope_factor, or",
        ),
        ({"norm_eps": float("nan")}, r"norm_eps must be greater than 0; got nan"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_a_linear_model_may_have_heads_of_odd_size() -> None:
    assert config(pattern="L", head_dim=33).size_of_head == 33
