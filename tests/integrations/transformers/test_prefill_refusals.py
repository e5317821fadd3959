"""What no prompt can be read over ranks with is refused, on all of them, and the way out is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import longspan
from longspan.errors import InputError
from tests.integrations.transformers.families import build, named_as_of_fla
from tests.integrations.transformers.prompts import GREEDY, NUM_TOKENS, empty_cache, prompt
from tests.ranks import raised, run_on_ranks


def refused(what: str) -> tuple[str, str]:
    rank = dist.get_rank()
    ids = prompt()
    model: Any = build("llama")
    given: dict[str, Any] = {}
    match what:
        case "not parallelized":
            return raised(lambda: longspan.prefill(model, ids))
        case "backbone":
            model = model.model
        case "head of another library":
            return raised(lambda: longspan.prefill(nn.Linear(2, 2), ids))
        case "no model":
            return raised(lambda: longspan.prefill("gpt2", ids))  # type: ignore[arg-type]
        case "padding":
            given["attention_mask"] = torch.ones_like(ids)
            given["attention_mask"][0, -3:] = 0
        case "documents":
            ids = ids[:1]
            given["position_ids"] = torch.cat([torch.arange(9), torch.arange(NUM_TOKENS - 9)])[None]
        case "short":
            ids = ids[:, :1]
        case "different prompts":
            ids = ids + rank
        case "target":
            given["to"] = "first"
        case "segments":
            given["segment_tokens"] = 1
    longspan.parallelize(model, None)
    match what:
        case "generate":
            return raised(lambda: model.generate(ids, **GREEDY))
        case "a cache of Transformers":
            return raised(lambda: model.generate(ids, past_key_values=empty_cache(model), **GREEDY))
        case "training":
            model.train()
        case "segments of flash-linear-attention":
            named_as_of_fla(model)
            given["segment_tokens"] = 8
        case "sharded":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return raised(lambda: longspan.prefill(model, ids, **given))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("not parallelized", "longspan.parallelize(model, group) first"),
        ("backbone", "ForCausalLM"),
        ("head of another library", "a Linear"),
        ("no model", "'gpt2'"),
        ("padding", "rows of one length"),
        ("documents", "each prompt by itself"),
        ("short", "1 tokens, fewer than the 2 ranks"),
        ("different prompts", "different batches"),
        ("target", "last, all; got 'first'"),
        ("segments", "an int of at least 2, a token for each rank; got 1"),
        ("segments of flash-linear-attention", "GatedLinearAttention of flash-linear-attention cannot begin with"),
        ("training", "model.eval()"),
        ("sharded", "to='all'"),
        ("generate", "longspan.prefill(model, input_ids[:, :-1])"),
        ("a cache of Transformers", "longspan.prefill(model, input_ids[:, :-1])"),
    ],
)
def test_refusals(what: str, says: str) -> None:
    for kind, message in run_on_ranks(2, refused, what):
        assert kind == "InputError", message
        assert says in message


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_virtual_tokens_are_refused() -> None:
    import peft

    options = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model: Any = longspan.parallelize(peft.get_peft_model(build("llama"), options), None).eval()
    with pytest.raises(InputError, match="PromptTuningConfig puts virtual tokens"):
        longspan.prefill(model, prompt())


def test_a_model_without_a_cache_is_refused() -> None:
    with pytest.raises(InputError, match=r"RwkvForCausalLM takes no cache.*unparallelize"):
        longspan.prefill(longspan.parallelize(build("rwkv"), None), prompt())
