"""What would be silently wrong over ranks is refused by name, on all ranks, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import longspan
from longspan.errors import InputError
from longspan.integrations.transformers.attention import attention
from longspan.integrations.transformers.call import CALL, ParallelCall
from longspan.models.mixers import ParallelOptions
from tests.integrations.transformers.families import VOCABULARY, build
from tests.integrations.transformers.reference import PLAIN
from tests.ranks import raised, run_on_ranks

IDS = PLAIN.ids
TINY = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}


def refused_call(name: str, options: dict[str, Any], given: dict[str, Any], training: bool) -> tuple[str, str]:
    model = longspan.parallelize(build(name, **options), None).train(training)
    with longspan.record_traffic() as traffic:
        found = raised(lambda: model(**{"input_ids": IDS, **given}))
    assert not traffic.events, "something was sent before"
    return found


LEFT = torch.ones_like(IDS)
LEFT[0, :4] = 0
HOLES = torch.ones_like(IDS)
HOLES[0, 5] = 0
RIGHT = torch.ones_like(IDS)
RIGHT[0, -4:] = 0


@pytest.mark.parametrize(
    ("name", "options", "given", "training", "says"),
    [
        ("llama", {}, {"attention_mask": LEFT}, False, "Pad on the right"),
        ("qwen3_next", {}, {"attention_mask": HOLES}, False, "Pad on the right"),
        ("llama", {}, {"attention_mask": torch.ones(2, 1, 37, 37)}, False, "pack documents"),
        ("llama", {}, {"attention_mask": {"full_attention": None}}, False, "pack documents"),
        ("llama", {"attention_dropout": 0.1}, {}, True, "attention_dropout to 0"),
        ("qwen3_next", {"attention_dropout": 0.1}, {}, True, "attention_dropout to 0"),
        ("llama", {}, {"output_attentions": True}, False, "unparallelize"),
        ("llama", {"output_attentions": True, "attn_implementation": "eager"}, {}, False, "unparallelize"),
        ("llama", {}, {"logits_to_keep": 1}, False, "Leave it out"),
        ("llama", {}, {"past_key_values": object()}, False, "longspan.prefill"),
        ("mamba", {}, {"cache_params": object()}, False, "longspan.prefill"),
        ("llama", {}, {"token_type_ids": torch.zeros_like(IDS)}, False, "token_type_ids"),
        ("llama", {}, {"input_ids": None}, False, "input_ids"),
        ("bamba", {"z_loss_coefficient": 0.1}, {"attention_mask": RIGHT}, False, "set z_loss_coefficient to 0"),
    ],
)
def test_calls(name: str, options: dict[str, Any], given: dict[str, Any], training: bool, says: str) -> None:
    for kind, message in run_on_ranks(2, refused_call, name, options, given, training):
        assert kind == "InputError", message
        assert says in message


def alibi() -> nn.Module:
    import transformers

    config = transformers.FalconConfig(**TINY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    return transformers.FalconForCausalLM(config)


def bloom() -> nn.Module:
    import transformers

    return transformers.BloomForCausalLM(transformers.BloomConfig(**TINY, hidden_size=24, n_layer=2, n_head=4))


def mpt() -> nn.Module:
    import transformers

    return transformers.MptForCausalLM(transformers.MptConfig(vocab_size=VOCABULARY, d_model=24, n_layers=1, n_heads=4))


def encoder() -> nn.Module:
    import transformers

    options = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **options))


def encoder_as_decoder() -> nn.Module:
    import transformers

    options = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.RobertaConfig(vocab_size=VOCABULARY, is_decoder=True, **options)
    return transformers.RobertaForCausalLM(config)


def bidirectional() -> nn.Module:
    return build("gemma3", use_bidirectional_attention=True)


def convolution_in_attention() -> nn.Module:
    import transformers

    options = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
    }
    return transformers.ZayaForCausalLM(transformers.ZayaConfig(**TINY, **options, num_experts=4, pad_token_id=None))


def sparse_indexer() -> nn.Module:
    import transformers

    options = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
    config = transformers.DeepseekV32Config(
        **TINY,
        **options,
        **latent,
        num_key_value_heads=4,
        index_n_heads=2,
        index_head_dim=8,
        index_topk=4,
        pad_token_id=None,
    )
    return transformers.DeepseekV32ForCausalLM(config)


def classifier() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        **TINY, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    return transformers.LlamaForSequenceClassification(config)


def cross_attention() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(**TINY, n_embd=24, n_layer=2, n_head=4, add_cross_attention=True)
    return transformers.GPT2LMHeadModel(config)


def decoder_of_another() -> nn.Module:
    import transformers

    options = {"d_model": 24, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 40}
    return transformers.BartForCausalLM(transformers.BartConfig(**TINY, **options, pad_token_id=0))


def encoder_decoder() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        **TINY, d_model=24, d_kv=6, d_ff=40, num_layers=1, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def activated_lora() -> nn.Module:
    import peft

    options = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    return peft.get_peft_model(build("llama"), options)


# PEFT asks for it.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (activated_lora, "'default' of LlamaForCausalLM is an activated LoRA"),
        (alibi, "ALiBi"),
        (bloom, "ALiBi"),
        (mpt, "ALiBi"),
        (encoder, "a BertSelfAttention, reads later tokens"),
        (encoder_as_decoder, "counts positions from its padding token"),
        (bidirectional, "a Gemma3Attention, reads later tokens"),
        (convolution_in_attention, r"'layers\.0\.self_attn\.\S+conv_qk\S+' of ZayaModel, a Conv1d.*register_adapter"),
        (sparse_indexer, "indexed_attention"),
        (classifier, "ForCausalLM"),
        (encoder_decoder, "encoder"),
        (cross_attention, r"'h\.0\.crossattention', a GPT2Attention"),
        (decoder_of_another, r"encoder_attn', a BartAttention"),
    ],
)
def test_models(make: Any, says: str) -> None:
    model = make()
    keys = [set(vars(module)) for module in model.modules()]
    with pytest.raises(InputError, match=says):
        longspan.parallelize(model, None)
    assert [set(vars(module)) for module in model.modules()] == keys, "a model that was refused was changed"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"position_bias": torch.zeros(1, 2, 5, 5)}, "a position bias"),
        ({"indices": torch.zeros(1, 5, 2, dtype=torch.int64)}, "keys by an indexer"),
        ({"block_indices": torch.zeros(1, 5, 2, dtype=torch.int64)}, "keys by an indexer"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "a mask that is not causal"),
        ({"dropout": 0.1}, "attention dropout 0.1"),
    ],
)
def test_what_a_layer_may_ask_of_attention(given: dict[str, Any], says: str) -> None:
    call = ParallelCall(longspan.SequenceLayout.local(5), ParallelOptions())
    q = torch.randn(1, 2, 5, 4)
    options: dict[str, Any] = {"attention_mask": None, CALL: call}
    attention(nn.Module(), q, q, q, **options)
    with pytest.raises(InputError, match=says):
        attention(nn.Module(), q, q, q, **{**options, **given})


def test_options() -> None:
    for wrong in (
        {"order": "spiral"},
        {"loss": "product"},
        {"exchange": "carrier pigeon"},
        {"softmax_method": "cubic"},
    ):
        with pytest.raises((InputError, longspan.LayoutError), match=str(next(iter(wrong.values())))):
            longspan.parallelize(build("llama"), None, **wrong)  # type: ignore[arg-type]


def lost_layout(name: str, mixer: str) -> tuple[str, str]:
    """A mixer whose code was changed so that the layout does not reach what it calls."""
    model = longspan.parallelize(build(name), None)
    module = next(module for module in model.modules() if type(module).__name__ == mixer)
    forward = module.forward

    def without_keywords(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{key: value for key, value in kwargs.items() if not key.startswith("longspan")})

    module.forward = without_keywords
    return raised(lambda: model(input_ids=IDS))


@pytest.mark.parametrize(("name", "mixer"), [("qwen3_next", "Qwen3NextGatedDeltaNet"), ("lfm2", "Lfm2ShortConv")])
def test_a_mixer_that_lost_the_layout_raises(name: str, mixer: str) -> None:
    for kind, message in run_on_ranks(2, lost_layout, name, mixer):
        assert kind == "LayoutError"
        assert mixer in message and "whole sequence" in message


def skipped_layer() -> tuple[str, str]:
    model: Any = longspan.parallelize(build("llama"), None)
    model.model.layers[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return raised(lambda: model(input_ids=IDS))


def test_a_mixer_that_did_not_run_raises() -> None:
    for kind, message in run_on_ranks(2, skipped_layer):
        assert kind == "LayoutError"
        assert "LlamaAttention" in message and "did not run with the layout" in message


def mixer_alone() -> tuple[str, str]:
    model: Any = longspan.parallelize(build("qwen3_next"), None)
    return raised(lambda: model.model.layers[0].linear_attn(torch.zeros(1, 5, 24, dtype=torch.float64)))


def test_a_mixer_outside_of_its_model_raises() -> None:
    kind, message = mixer_alone()
    assert kind == "LayoutError" and "Call the whole model" in message


def test_a_process_of_torchrun_without_a_group_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.warns(UserWarning, match=r"Call torch\.distributed\.init_process_group\(\) before"):
        longspan.parallelize(build("llama"), None)


def test_an_untested_release_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.warns(UserWarning, match=r"5\.99\.0"):
        longspan.parallelize(build("llama"), None)
