"""What of Transformers' models cannot run in segments of time is refused by its name, with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import longspan
from longspan.integrations.transformers import stream_batch
from tests.integrations.transformers.families import build, named_as_of_fla
from tests.integrations.transformers.reference import PLAIN
from tests.integrations.transformers.test_losses import BALANCED
from tests.ranks import raised, run_on_ranks


def refused_model(what: str) -> Any:
    """A model that is refused before it is given any sequence."""
    model: Any = build("llama")
    match what:
        case "not parallelized":
            return model
        case "backbone":
            return longspan.parallelize(model.model, None)
        case "virtual tokens":
            import peft

            options = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
            return longspan.parallelize(peft.get_peft_model(model, options), None)
    longspan.parallelize(model, None)
    match what:
        case "bidirectional":
            model.model.layers[1].self_attn.is_causal = False
        case "flash-linear-attention":
            named_as_of_fla(model)
        case "DistributedDataParallel":
            wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
            nn.Module.__init__(wrapped)
            wrapped.module = model
            return wrapped
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("not parallelized", "LlamaForCausalLM, which was not"),
        ("backbone", "LlamaModel has no head"),
        ("virtual tokens", "PromptTuningConfig puts virtual tokens"),
        ("bidirectional", "LlamaAttention reads later tokens"),
        ("flash-linear-attention", "GatedLinearAttention of flash-linear-attention does not hand"),
        ("DistributedDataParallel", r"model\.module"),
    ],
)
def test_models(what: str, says: str) -> None:
    with pytest.raises(longspan.InputError, match=says):
        longspan.stream(refused_model(what), 8)


def with_dropout(model: Any) -> None:
    model.train().model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))


def run_refused(what: str) -> None:
    of_experts = what == "padding beside a balance loss"
    model: Any = longspan.parallelize(build("qwen3_next", **BALANCED) if of_experts else build("llama"), None)
    batch: dict[str, Any] = PLAIN.arguments()
    options: dict[str, Any] = {}
    match what:
        case "positions":
            batch["position_ids"] = torch.arange(5, 5 + PLAIN.ids.shape[1])[None]
        case "no labels":
            del batch["labels"]
        case "other arguments":
            batch["output_attentions"] = True
        case "reentrant":
            model.train().activation_checkpointing_enable({"use_reentrant": True})
        case "other numbers in a recomputation":
            with_dropout(model)
            model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        case "dropout on another device":
            with_dropout(model)
            model.lm_head.to("meta")
        case "noise":
            model.train().get_input_embeddings().neftune_noise_alpha = 5.0
        case "attention dropout":
            model.train().model.layers[1].self_attn.attention_dropout = 0.1
        case "padding beside a balance loss":
            batch["attention_mask"] = torch.ones_like(PLAIN.ids)
            batch["attention_mask"][0, -3:] = 0
        case "routing":
            options["routing"] = object()
    longspan.stream(model, 8).forward_backward(**stream_batch(model, batch), **options)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("positions", "restart at 0"),
        ("no labels", "there is no labels"),
        ("other arguments", "got output_attentions, too"),
        ("reentrant", "'use_reentrant': False"),
        ("other numbers in a recomputation", r"LlamaForCausalLM has dropout \(Dropout\).*preserve_rng_state out"),
        ("dropout on another device", r"LlamaForCausalLM has dropout \(Dropout\) and is on meta, beside tokens on cpu"),
        ("noise", "the noise of NEFTune in LlamaForCausalLM"),
        ("attention dropout", r"LlamaAttention: attention dropout 0\.1"),
        ("routing", "config.output_router_logits"),
        ("padding beside a balance loss", r"padding.*Qwen3NextForCausalLM asks for a balance loss.*Pack documents"),
    ],
)
def test_sequences(what: str, says: str) -> None:
    with pytest.raises(longspan.InputError, match=says):
        run_refused(what)


def too_short() -> tuple[str, str]:
    model = longspan.parallelize(build("llama"), None)
    return raised(lambda: longspan.stream(model, 1).forward_backward(**stream_batch(model, PLAIN.arguments())))


def test_a_segment_without_a_token_for_each_rank() -> None:
    for kind, message in run_on_ranks(2, too_short):
        assert kind == "InputError" and "fewer than the 2 ranks" in message
