"""Every mixer behind the Hugging Face classes: padded rows, beams, saved weights, and a run's form and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longspan.models import MIXERS, generate
from longspan.models.hf import LinearLlamaForCausalLM
from longspan.train.hugging_face import import_model, model_section
from tests.compare import relative_error, worst
from tests.models.hf.tiny import alone, padded
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.slow


def model_of(mixer: str) -> LinearLlamaForCausalLM:
    sizes = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    return LinearLlamaForCausalLM.of(tiny_model(pattern=(mixer, mixer), **sizes))


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_of_a_padded_batch_are_what_they_are_alone_and_go_on_alike(mixer: str) -> None:
    model = model_of(mixer)
    tokens, mask, rows = padded([7, 40, 1], "left")
    with torch.no_grad():
        for use_cache in (False, True):
            logits = model(tokens, attention_mask=mask, use_cache=use_cache).logits
            errors = [relative_error(logits[i, mask[i] == 1], alone(model, row)) for i, row in enumerate(rows)]
            assert worst(errors) < 1e-11, (use_cache, errors)
    made = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert made[:, 40:].tolist() == [list(generate(model.model, row, max_new_tokens=5)) for row in rows]
    beams = [
        model.generate(tokens, attention_mask=mask, max_new_tokens=5, num_beams=3, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("mixer", MIXERS)
def test_weights_are_the_same_bits_in_every_form(mixer: str, tmp_path: Path) -> None:
    model = model_of(mixer).float()
    model.save_pretrained(tmp_path / "out", max_shard_size="3KB")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    run = import_model(tmp_path / "out", str(tmp_path / "run")).run
    weights = load_file(run.weights)
    for name, parameter in model.model.named_parameters():
        assert torch.equal(found.model.get_parameter(name), parameter) and torch.equal(weights[name], parameter), name
    assert model_section(model.model.config).build(29).layer_operators == model.model.config.layer_operators
