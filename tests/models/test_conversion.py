"""A Llama as a Linear-Llama3: the same logits with softmax layers, a true list for every other mixer, refusals that say all."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.errors import CheckpointError, ConfigError
from longspan.models import MIXERS, LinearLlama3, LinearLlama3Config
from longspan.models.conversion import RECIPES, Converted, convert, read_llama
from longspan.models.conversion.recipes import meeting_channels
from longspan.models.weights import open_weights
from tests.compare import relative_error
from tests.models.llama import LLAMA3, exact_logits, random_llama, saved
from tests.models.tiny import LINEAR_MIXERS


def converted(folder: Path, **layers: Any) -> Converted:
    llama = read_llama(folder)
    config = dataclasses.replace(llama.config, **layers)
    with open_weights(folder) as weights:
        return convert(llama, weights, config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(random_llama(), tmp_path_factory.mktemp("llama"))


TOKENS = torch.randint(0, 61, (2, 37), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 24},
        {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 500.0}},
        {"rope_parameters": LLAMA3, "max_position_embeddings": 2048},
    ],
    ids=["grouped", "tied", "wide heads", "scaled by one", "scaled as Llama 3.1"],
)
def test_softmax_layers_give_the_logits_of_the_llama(tmp_path: Path, changes: dict[str, Any]) -> None:
    """From one file and from shards; to 1e-10 in float64, and as Transformers computes it in float32."""
    theirs = random_llama(**changes)
    saved(theirs, tmp_path / "one")
    saved(theirs, tmp_path / "shards", "20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    models = [converted(tmp_path / name, pattern="N").model for name in ("one", "shards")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert relative_error(models[0](TOKENS), theirs(TOKENS).logits) < 1e-5
        assert relative_error(models[0].double()(TOKENS), exact_logits(theirs, TOKENS)) < 1e-10


def test_a_config_of_an_older_transformers_means_the_same(folder: Path, tmp_path: Path) -> None:
    """rope_theta beside rope_scaling, and one of several tokens that end a text."""
    values = json.loads((folder / "config.json").read_text())
    theta = values.pop("rope_parameters")["rope_theta"]
    old = {"rope_theta": theta, "rope_scaling": None, "eos_token_id": [7, 8]}
    (tmp_path / "config.json").write_text(json.dumps({**values, **old}))
    found = read_llama(tmp_path)
    assert found.config == read_llama(folder).config
    assert (found.config.rope_theta, found.end, found.length) == (12_345.0, 7, 128)


def test_a_scaled_embedding_is_read_in_either_form(folder: Path, tmp_path: Path) -> None:
    """That of an older Transformers, with the length of the model where none is said; times 1 is none."""
    values = json.loads((folder / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    del values["rope_parameters"]

    def read(**changes: Any) -> LinearLlama3Config:
        written = {**values, "rope_theta": 12_345.0, "rope_scaling": {**scaling, **changes}}
        (tmp_path / "config.json").write_text(json.dumps(written))
        return read_llama(tmp_path).config

    wanted = dataclasses.replace(read_llama(folder).config, rope_factor=8.0, rope_original_length=256)
    assert read() == wanted
    assert read(factor=32, low_freq_factor=2, high_freq_factor=8) == dataclasses.replace(
        wanted, rope_factor=32.0, rope_low_freq_factor=2.0, rope_high_freq_factor=8.0
    )
    assert read(original_max_position_embeddings=None).rope_original_length == 128
    assert read(factor=1) == read_llama(folder).config


def test_half_precision_becomes_float32_and_tables_of_angles_are_left_out(folder: Path, tmp_path: Path) -> None:
    tensors = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = converted(tmp_path, pattern="LN", operator="linear_attention").model
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert torch.equal(found.head.weight, tensors["lm_head.weight"].float())


def test_every_mixer_has_a_recipe() -> None:
    assert {*RECIPES, "softmax"} == set(MIXERS)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(retention|simple_gla|lightning|rebased|deltanet|gated_deltanet)$")
@pytest.mark.parametrize("operator", LINEAR_MIXERS)
def test_each_mixer_is_made_of_the_llama_and_learns(folder: Path, operator: str) -> None:
    """What a list says is copied is; the model computes and every weight gets a gradient."""
    found = converted(folder, pattern="LLN", operator=operator)
    model, theirs = found.model, load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert [tensor.name for tensor in found.tensors] == list(parameters)
    assert sorted(found.teachers) == [0, 1, 3]
    for tensor in found.tensors:
        value = parameters[tensor.name].detach()
        assert tensor.shape == tuple(value.shape)
        assert 0 <= tensor.num_taken <= tensor.num_parameters
        assert bool(tensor.sources) == bool(tensor.num_taken)
        if tensor.how == "copied":
            assert torch.equal(value, theirs[tensor.sources[0]]), tensor.name
        if tensor.how == "copied, each head 2 times":
            (source,) = tensor.sources
            heads = theirs[source].unflatten(0, (2, 16))
            assert torch.equal(value.unflatten(0, (4, 16)), heads.repeat_interleave(2, 0)), tensor.name
    missing = set(theirs) - {source for tensor in found.tensors for source in tensor.sources}
    # Mamba has no place for queries and keys: its B and C are made of what stands where values do.
    without = ("q_proj.weight", "k_proj.weight") if operator == "mamba" else ()
    assert len(missing) == 3 * len(without) and all(name.endswith(without) for name in missing)
    loss = model(TOKENS, labels=TOKENS)
    loss.backward()
    for name, parameter in parameters.items():
        # Of a gate of zero weights in two matrices only the second learns at first.
        if name.endswith("gate_proj.0.weight"):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_what_a_recipe_names_is_there(folder: Path) -> None:
    for operator, recipe in RECIPES.items():
        # Some are of all layers but the first.
        blocks: Any = converted(folder, pattern="L", operator=operator).model.blocks
        assert set(recipe) <= {name for block in blocks for name, _ in block.mixer.named_parameters()}, operator


def test_wide_values_and_half_outputs_are_the_same_map(folder: Path) -> None:
    """Both copies of the values through both halves of the output's projection are the Llama's values through its own."""
    theirs = load_file(folder / "model.safetensors")
    wanted = theirs["model.layers.0.self_attn.o_proj.weight"] @ theirs[
        "model.layers.0.self_attn.v_proj.weight"
    ].unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    for operator in ("retention", "gated_deltanet", "linear_attention"):
        mixer: Any = converted(folder, pattern="L", operator=operator).model.blocks[0].mixer
        assert relative_error(mixer.out_proj.weight @ mixer.v_proj.weight, wanted) < 1e-6
    mixer = converted(folder, pattern="L", operator="mamba2").model.blocks[0].mixer
    x = mixer.in_proj.weight[128:256]
    assert relative_error(mixer.out_proj.weight @ x, wanted) < 1e-6
    mixer = converted(folder, pattern="L", operator="mamba").model.blocks[0].mixer
    assert relative_error(mixer.out_proj.weight @ mixer.in_proj.weight[:128], wanted) < 1e-6


def test_few_channels_keep_what_queries_and_keys_have_in_common() -> None:
    """All of it where they are enough, and never more error than the first channels alone have."""
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(3, 8, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = q.transpose(1, 2) @ k
    errors = []
    for size in (2, 4, 8, 9):
        left, right = meeting_channels(q, k, size)
        assert left.shape == right.shape == (3, min(size, 8), 20)
        errors.append(relative_error(left.transpose(1, 2) @ right, wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-12
    first = q[:, :4].transpose(1, 2) @ k[:, :4]
    left, right = meeting_channels(q, k, 4)
    assert (left.transpose(1, 2) @ right - wanted).norm() < (first - wanted).norm()


def test_decays_begin_slow(folder: Path) -> None:
    x = torch.zeros(1, 1, 64)
    for operator, channels in (("simple_gla", 1), ("gla", 8)):
        mixer: Any = converted(folder, pattern="L", operator=operator).model.blocks[0].mixer
        constants = (-1 / mixer.decay(x)["g"]).flatten()
        wanted = torch.logspace(5, 12, 4, base=2.0).repeat_interleave(channels)
        assert relative_error(constants, wanted) < 1e-3
    for operator in ("gated_deltanet", "kda"):
        mixer = converted(folder, pattern="L", operator=operator).model.blocks[0].mixer
        _, g = mixer.decay(torch.zeros(1, 1, len(mixer.decay.dt_bias)))
        assert relative_error((-1 / g).flatten()[:: g.numel() // 4], torch.logspace(5, 12, 4, base=2.0)) < 1e-3


def test_teachers_are_the_attention_of_the_llama(folder: Path) -> None:
    """Also where N layers of the new model have a window."""
    found = converted(folder, pattern="LN", operator="gla", window=5)
    whole = converted(folder, pattern="N").model
    for layer, teacher in found.teachers.items():
        assert teacher.window is None
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        own: Any = whole.blocks[layer]
        for one, other in zip(teacher.parameters(), own.mixer.parameters(), strict=True):
            assert torch.equal(one, other)
    windows: list[Any] = [found.model.blocks[layer] for layer in (1, 3)]
    assert [block.mixer.window for block in windows] == [5, 5]


def changed(folder: Path, tmp_path: Path, **values: Any) -> Path:
    """A folder whose config.json says something else."""
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values}))
    return tmp_path


def refused(folder: Path, **layers: Any) -> str:
    with pytest.raises(CheckpointError) as refusal:
        converted(folder, **(layers or {"pattern": "LN"}))
    return str(refusal.value)


def test_missing_extra_and_misshapen_tensors_are_all_listed(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.self_attn.q_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    tensors["model.layers.4.input_layernorm.weight"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    shown = refused(changed(folder, tmp_path))
    assert "are not those of this model, 4 differ" in shown
    for line in (
        "model.layers.3.self_attn.q_proj.weight: missing there, (64, 64) here",
        "model.norm.weight: missing there, (64,) here",
        "model.layers.1.mlp.up_proj.weight: (95, 64) there, (96, 64) here",
        "model.layers.4.input_layernorm.weight: (64,) there, missing here",
    ):
        assert line in shown


def test_a_head_of_its_own_where_the_config_says_it_is_tied_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    shown = refused(changed(folder, tmp_path, tie_word_embeddings=True))
    assert "lm_head.weight: (61, 64) there, missing here" in shown
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert isinstance(converted(tmp_path, pattern="N").model, LinearLlama3)


def test_other_dtypes_are_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, tmp_path / "model.safetensors")
    assert "model.norm.weight is torch.float64" in refused(changed(folder, tmp_path))


def test_pickled_weights_are_refused_with_a_way_to_convert_them(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    shown = refused(changed(folder, tmp_path))
    assert "pytorch_model.bin alone, which are pickles" in shown
    assert "safetensors.torch.save_file" in shown


def test_another_architecture_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    shown = refused(changed(folder, tmp_path, architectures=["MistralForCausalLM"], model_type="mistral"))
    assert "MistralForCausalLM (model_type 'mistral')" in shown
    assert "LlamaForCausalLM" in shown
    shown = refused(changed(folder, tmp_path, architectures=["LlamaForSequenceClassification"]))
    assert "LlamaForSequenceClassification" in shown


def test_what_linear_llama3_has_not_is_refused_all_at_once(folder: Path, tmp_path: Path) -> None:
    scaled = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0}
    odd = {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rope_parameters": scaled}
    shown = refused(changed(folder, tmp_path, **odd, quantization_config={"bits": 4}))
    assert "5 differ" in shown
    for words in (
        "attention_bias is True",
        "mlp_bias is True",
        "hidden_act is 'gelu'",
        "the rotary embedding is scaled, 'yarn' {'rope_theta': 500000.0, 'factor': 8.0}",
        "quantization_config",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"factor": None}, "is scaled, 'llama3', and factor is not said"),
        ({"low_freq_factor": None, "high_freq_factor": None}, "and low_freq_factor, high_freq_factor is not said"),
        ({"factor": 0.5}, "describes no model: rope_factor must be at least 1"),
        ({"factor": "8"}, "rope_factor must be a number greater than 0; got '8'"),
        ({"low_freq_factor": 4}, "rope_low_freq_factor must be less than rope_high_freq_factor; got 4.0 and 4.0"),
        ({"original_max_position_embeddings": 0}, "rope_original_length must be an integer of at least 1; got 0"),
        ({"rope_type": "dynamic"}, "is scaled, 'dynamic'"),
        ({"rope_type": "longrope"}, "is scaled, 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
    ],
)
def test_a_scaled_embedding_that_is_none_of_llama_3_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    assert words in refused(changed(folder, tmp_path, rope_parameters={**LLAMA3, **changes}))


def test_a_config_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "does not say what model this is" in refused(tmp_path)
    assert "describes no model: dim must be an integer" in refused(changed(folder, tmp_path, hidden_size="wide"))
    assert "num_heads 4 is not a multiple of num_kv_heads 3" in refused(
        changed(folder, tmp_path, num_key_value_heads=3)
    )
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "does not say 'hidden_size'" in refused(tmp_path)


def test_the_code_of_the_page_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "conversion.md"
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "my-llama").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block, str(page), "exec"), names)
    assert names["made"].model.config.layer_operators == (*["gated_deltanet"] * 3, "softmax")
    assert len(names["made"].teachers) == 3


def test_a_mixer_without_a_recipe_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.models.conversion.mapping.RECIPES", {"gla": RECIPES["gla"]})
    with pytest.raises(ConfigError, match=r"no way from softmax attention to hgrn2; there is to gla"):
        converted(folder, pattern="L", operator="hgrn2")
