"""save_pretrained and from_pretrained: every bit, in one file or several; what is no such model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from longspan.errors import CheckpointError, InputError
from longspan.models.hf import LinearLlamaConfig, LinearLlamaForCausalLM
from tests.models.hf.tiny import KINDS, tiny_hf
from tests.models.tiny import random_tokens


def same_bits(a: LinearLlamaForCausalLM, b: LinearLlamaForCausalLM) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"-False-50GB$", r"-True-3KB$")
@pytest.mark.parametrize("size", ["50GB", "3KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_to_the_bit(tmp_path: Path, kind: str, tied: bool, size: str) -> None:
    model = tiny_hf(kind, {"eos_token_id": 3, "max_position_embeddings": 64}, tie_embeddings=tied).float()
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (shards == ["model.safetensors"]) == (size == "50GB") and (len(shards) > 2) == (size != "50GB")
    state = torch.get_rng_state()
    for found in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        LinearLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[0],
    ):
        assert type(found) is LinearLlamaForCausalLM and not found.training
        assert same_bits(found, model)
        assert (found.model.head.weight is found.model.embedding.weight) == tied
        assert found.config.core() == model.config.core() and found.generation_config.eos_token_id == 3
        assert torch.equal(found(random_tokens(1, 9)).logits, model(random_tokens(1, 9)).logits)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_loaded_in_the_dtype_that_is_asked_for(tmp_path: Path) -> None:
    model = tiny_hf("hybrid").float()
    model.save_pretrained(tmp_path)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.model.head.weight, model.model.head.weight.bfloat16())
    narrow.save_pretrained(tmp_path / "narrow")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert again.dtype == torch.bfloat16 and same_bits(again, narrow)


def test_a_model_is_made_of_a_config_by_the_auto_class() -> None:
    config = LinearLlamaConfig(vocab_size=29, dim=16, num_layers=1, num_heads=2, hidden_dim=24)
    assert type(AutoModelForCausalLM.from_config(config)) is LinearLlamaForCausalLM


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny_hf("hybrid").float().save_pretrained(tmp_path)
    return tmp_path


def test_missing_extra_and_misshapen_tensors_are_all_listed(saved: Path, caplog: Any) -> None:
    weights = load_file(saved / "model.safetensors")
    gone = [name for name in weights if ".feed_forward." in name]
    changed: dict[str, torch.Tensor] = {name: weight for name, weight in weights.items() if name not in gone}
    changed |= {"model.norm.weight": torch.zeros(3), **{f"model.extra.{i}": torch.zeros(2) for i in range(12)}}
    save_file(changed, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        AutoModelForCausalLM.from_pretrained(saved)
    shown = str(refused.value)
    assert f"the weights in {saved} are not those of this model, {len(gone) + 13} differ:" in shown
    assert "model.norm.weight: (3,) there, (16,) here" in shown
    assert all(f"{name}: missing there" in shown for name in gone)
    assert all(f"model.extra.{i}: there, and not of this model" in shown for i in range(12))


def test_pickled_weights_are_refused_with_the_way_out(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(weights, saved / "pytorch_model.bin")
    for load in (AutoModelForCausalLM.from_pretrained, LinearLlamaForCausalLM.from_pretrained):
        with pytest.raises(
            CheckpointError, match=r"pytorch_model.bin alone, which are pickles.*safetensors.torch.save_file\("
        ):
            load(saved)
    with pytest.raises(InputError, match="use_safetensors=False asks for pickled weights"):
        LinearLlamaForCausalLM.from_pretrained(saved, use_safetensors=False)
    with pytest.raises(InputError, match="ignore_mismatched_sizes=True would draw tensors anew"):
        LinearLlamaForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=True)


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=29, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a model of the type 'llama'"):
        LinearLlamaForCausalLM.from_pretrained(tmp_path)


def test_a_config_of_another_size_shows_in_the_weights(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"hidden_dim": 25}))
    with pytest.raises(CheckpointError, match="6 differ:"):
        AutoModelForCausalLM.from_pretrained(saved)
