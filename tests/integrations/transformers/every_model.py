"""Every causal language model that Transformers ships, in small, over two ranks: each is right, or refused by name.

    python -m tests.integrations.transformers.every_model [TYPE ...]

prints a table of all model types, or of those that are named. Models are found in Transformers' own lists, and made small by what
their configs call their sizes, so that a release with new ones needs no change here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

import longspan
from longspan.integrations.transformers import layout_of
from tests.compare import relative_error, worst
from tests.integrations.transformers.families import FAMILIES, VOCABULARY, randomised
from tests.integrations.transformers.reference import PACKED, PLAIN, Wide, gradients_of
from tests.ranks import RankError, run_on_ranks, stop_ranks

TOLERANCE = 1e-9
NOISE = 1e-6
"""A gradient smaller than this part of the largest is compared with that part."""
LARGEST = 3_000_000
"""Parameters of a model that counts as small."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "swa_head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 40,
    "ffn_dim": 40,
    "ffn_hidden_size": 40,
    "word_embed_proj_dim": 32,
    "rotary_dim": 4,
    "sliding_window": 9,
    "attention_chunk_size": 8,
    "floor_scale": 8,
    "kv_lora_rank": 10,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "qk_head_dim": 10,
    "v_head_dim": 7,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "moe_intermediate_size": 14,
    "moe_shared_expert_intermediate_size": 14,
    "shared_expert_intermediate_size": 10,
    "shared_intermediate_size": 12,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "num_mem_blocks": 1,
    "hc_mult": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 6,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 6,
    "state_size": 6,
    "time_step_rank": 3,
    "mamba_dt_rank": 3,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "lru_width": 32,
    "is_decoder": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "dropout": 0.0,
    "hidden_dropout": 0.0,
}
"""What configs call their sizes; those that a config does not have are left out."""
WITH_IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
"""Sizes of latent attention: the rotary part of a head is what ``head_dim`` says."""
OTHERS: dict[str, Any] = {
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_ffn_dim": 40,
    "encoder_ffn_dim": 40,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_experts_per_tok": 1,
    "expand": 2,
    "num_heads": 8,
    "attention_types": [[["global", "local"], 2]],
}
"""Of the classes that the others do not fit."""

Outcome = Literal["right", "refused", "wrong", "error", "not small"]


@dataclass(frozen=True)
class Found:
    """What became of a model over ranks.

    outcome: "error" is one that does not say what to do: any but an InputError; "not small" is a model that these sizes do not
    fit, so that nothing can be told. about: the largest relative error, or what was said.
    """

    outcome: Outcome
    about: str


def classes() -> dict[str, tuple[str, str]]:
    """By the type of a model, the names of its config's class and of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for kind, names in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()):
        if kind in CONFIG_MAPPING_NAMES:
            found[kind] = (CONFIG_MAPPING_NAMES[kind], names if isinstance(names, str) else names[0])
    return found


def small(config: Any, model_class: Any) -> nn.Module:
    """A float64 model with random weights; raises what its class raises for sizes of this kind."""
    if _num_parameters(config, model_class) > LARGEST:
        raise ValueError(f"it has {_num_parameters(config, model_class):,} parameters")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        return randomised(model_class(config).double()).eval()
    finally:
        torch.set_default_dtype(before)


def _num_parameters(config: Any, model_class: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def _configs(of_config: Any, model_class: str) -> Iterator[Any]:
    """Configs of small models, one after another: not every class takes the first."""
    for family in FAMILIES.values():
        if (family.model, family.config) == (model_class, of_config.__name__):
            options = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, **family.options}
            yield of_config(vocab_size=VOCABULARY, **options)
    try:
        default = of_config()
    except Exception:
        # It has no default sizes.
        return
    sizes = {name: value for name, value in SIZES.items() if _is_settable(default, name)}
    attempts: list[dict[str, Any]] = [{}, WITH_IDS, {**WITH_IDS, **LATENT}, {**WITH_IDS, **OTHERS}]
    for others in attempts:
        given = {**sizes, **{name: value for name, value in others.items() if _is_settable(default, name)}}
        with contextlib.suppress(Exception):
            yield of_config(**given)


def _is_settable(config: Any, name: str) -> bool:
    try:
        getattr(config, name)
    except Exception:
        # It is not there, or one for each layer.
        return False
    return not isinstance(getattr(type(config), name, None), property)


def built(config_class: str, model_class: str) -> tuple[nn.Module, list[Tensor], dict[str, Tensor]]:
    """A small model that runs in one process, its logits and gradients there."""
    kind: Any = getattr(transformers, model_class)
    of_config: Any = kind.config_class or getattr(transformers, config_class)
    failure: Exception = ValueError("no config of small sizes")
    for config in _configs(of_config, model_class):
        # Products grouped by expert have no float64.
        config._experts_implementation = "eager"
        try:
            model = small(config, kind)
            with Wide():
                return model, [logits.detach() for logits in _logits_alone(model)], _gradients_alone(model)
        except Exception as found:
            failure = found
    raise failure


def refusal_without_weights(config_class: str, model_class: str) -> str | None:
    """What `parallelize` says of a model that cannot be made small: it may be refused whatever its sizes."""
    kind: Any = getattr(transformers, model_class)
    of_config: Any = kind.config_class or getattr(transformers, config_class)
    for make in (of_config, *(functools.partial(_same, one) for one in _configs(of_config, model_class))):
        try:
            with torch.device("meta"):
                model = kind(make())
            longspan.parallelize(model, None)
        except longspan.LongspanError as refusal:
            return str(refusal)
        except Exception:
            continue
    return None


def _same(config: Any) -> Any:
    return config


def outcome_on_this_rank(config_class: str, model_class: str) -> Found:
    """The model in one process, and then over the ranks of the default group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, want, want_gradients = built(config_class, model_class)
        except Exception as failure:
            said = refusal_without_weights(config_class, model_class)
            return Found("not small", _said(failure)) if said is None else Found("refused", said)
        try:
            longspan.parallelize(model, None, order="zigzag", loss="sum")
            errors = list(_errors(model, want, want_gradients))
        except longspan.InputError as refusal:
            return Found("refused", str(refusal))
        except Exception as failure:
            # A LayoutError, too, is of a model that should have been refused before.
            return Found("error", _said(failure))
    error = worst(errors)
    return Found("right" if error < TOLERANCE else "wrong", f"{error:.0e}")


def _logits_alone(model: Any) -> Iterator[Tensor]:
    """Of whole rows, and of packed documents one by one."""
    yield model(input_ids=PLAIN.ids, use_cache=False).logits
    assert PACKED.bounds is not None
    parts = [model(input_ids=PACKED.ids[:, a:b], use_cache=False).logits for a, b in pairwise(PACKED.bounds)]
    yield torch.cat(parts, dim=1)


def _gradients_alone(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=PLAIN.ids, labels=PLAIN.labels, use_cache=False).loss.backward()
    found = gradients_of(model)
    model.zero_grad()
    return found


def _errors(model: Any, want: list[Tensor], want_gradients: dict[str, Tensor]) -> Iterator[float]:
    packed = {"input_ids": PACKED.ids, "position_ids": PACKED.positions}
    for expected, given in zip(want, ({"input_ids": PLAIN.ids}, packed), strict=True):
        with Wide(), torch.no_grad():
            logits = model(**given).logits
        yield relative_error(layout_of(model).gather(logits), expected)
    with Wide():
        try:
            loss = model(input_ids=PLAIN.ids, labels=PLAIN.labels).loss
        except longspan.InputError as refusal:
            if "loss in its own way" in str(refusal):
                return
            raise
        loss.backward()
    longspan.sum_gradients(model)
    found = gradients_of(model)
    # Some are zero but for rounding: those of biases of keys.
    least = NOISE * float(torch.cat([expected.flatten() for expected in want_gradients.values()]).abs().max())
    for name, expected in want_gradients.items():
        yield relative_error(found[name], expected, floor=least)


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip() or 'nothing said'}"


def is_told(kind: str) -> bool:
    """Whether anything can be told of a type of models: it can be made small, or is refused whatever its sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            built(*classes()[kind])
        except Exception:
            return refusal_without_weights(*classes()[kind]) is not None
    return True


def outcome_of(kind: str) -> Found:
    """What became of a type of models, on the rank where it went worst."""
    try:
        found = run_on_ranks(2, outcome_on_this_rank, *classes()[kind], timeout=300.0)
    except RankError as failure:
        return Found("error", str(failure).strip().splitlines()[0])
    order: list[Outcome] = ["error", "wrong", "not small", "refused", "right"]
    return min(found, key=lambda one: order.index(one.outcome))


def main() -> None:
    kinds = sys.argv[1:] or list(classes())
    counts: Counter[str] = Counter()
    sys.stdout.write(
        f"Transformers {transformers.__version__}\n\n| model type | class | over two ranks | |\n|---|---|---|---|\n"
    )
    for kind in kinds:
        found = outcome_of(kind)
        counts[found.outcome] += 1
        about = " ".join(found.about.split())
        sys.stdout.write(f"| {kind} | `{classes()[kind][1]}` | {found.outcome} | {about} |\n")
        sys.stdout.flush()
    sys.stdout.write("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) + "\n")
    stop_ranks()


if __name__ == "__main__":
    # Ranks import what they run by the name of its module.
    from tests.integrations.transformers import every_model

    every_model.main()
