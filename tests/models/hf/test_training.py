"""Trainer and PEFT train the classes as they train others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from longspan.errors import InputError
from longspan.models.hf import LinearLlamaConfig, LinearLlamaForCausalLM
from tests.compare import relative_error
from tests.models.hf.tiny import tiny_hf
from tests.models.tiny import random_tokens

# PEFT asks Transformers by a name that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def rows(count: int, length: int = 24) -> list[dict[str, Tensor]]:
    """Counting up from somewhere: there is something to learn in it."""
    starts = random_tokens(1, count)[0].tolist()
    made = [(torch.arange(length) + start) % 29 for start in starts]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in made]


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(str(folder), **values | more)


def small_model() -> LinearLlamaForCausalLM:
    torch.manual_seed(0)
    return LinearLlamaForCausalLM(
        LinearLlamaConfig(vocab_size=29, dim=32, num_layers=2, pattern="LN", num_heads=2, hidden_dim=48)
    )


def train(trainer: Trainer) -> list[float]:
    with warnings.catch_warnings():
        # What Accelerate and the learning-rate scheduler say on a CPU.
        warnings.simplefilter("ignore")
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_evaluates_saves_and_goes_on(tmp_path: Path) -> None:
    model = small_model()
    more = {
        "gradient_accumulation_steps": 2,
        "activation_checkpointing": True,
        "save_strategy": "steps",
        "save_steps": 8,
    }
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path / "out", **more),
        train_dataset=rows(64),
        eval_dataset=rows(6),
        data_collator=default_data_collator,
    )
    losses = train(trainer)
    assert losses[-1] < 0.6 * losses[0]
    found = trainer.predict(rows(6))
    assert found.predictions.shape == (6, 24, 29)
    assert abs(found.metrics["test_loss"] - trainer.evaluate()["eval_loss"]) < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-8")
    assert loaded.config.core() == model.config.core()
    assert not torch.equal(loaded.model.head.weight, model.model.head.weight)
    trainer.save_model(str(tmp_path / "last"))
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "last")
    assert all(torch.equal(x, y) for x, y in zip(last.parameters(), model.parameters(), strict=True))


def test_routers_losses_of_batches_of_one_step_are_those_of_one_batch() -> None:
    """As they add up where several batches make a step, and each is told the labels of all."""
    model = tiny_hf("experts", balance_loss_weight=0.0, z_loss_weight=0.5).train()
    tokens = random_tokens(6, 9)
    whole = model(tokens, labels=tokens).loss
    plain = model.eval()(tokens, labels=tokens).loss
    model.train()
    assert whole > plain + 0.01
    parts = [model(rows, labels=rows, num_items_in_batch=48).loss for rows in (tokens[:4], tokens[4:])]
    assert relative_error(torch.stack(parts).sum(), whole) < 1e-12


def test_routers_losses_are_not_left_out_in_silence() -> None:
    from peft import LoraConfig, get_peft_model

    tokens = random_tokens(2, 9)
    model = tiny_hf("experts").train()
    with pytest.raises(InputError, match="the routers' losses would be missing"):
        model.base_model(input_ids=tokens)
    with torch.no_grad():
        assert model.base_model(input_ids=tokens).last_hidden_state.shape == (2, 9, 16)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["head"]))
    with pytest.raises(InputError, match="and the model has experts, whose losses come with that of a plain head"):
        adapted(input_ids=tokens, labels=tokens)


def test_packed_documents_train_as_rows_do(tmp_path: Path) -> None:
    """The loss of a batch that a collator has packed is that of its documents, as Trainer counts their labels."""
    texts = [{"input_ids": row["input_ids"].tolist()} for row in rows(16, 11)]

    def losses(collator: Any) -> list[float]:
        return train(
            Trainer(
                model=small_model(),
                args=arguments(tmp_path / "out", max_steps=4, logging_steps=1, max_grad_norm=0.0),
                train_dataset=texts,
                data_collator=collator,
            )
        )

    def rowwise(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        tokens = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": tokens, "labels": tokens}

    packed, want = losses(DataCollatorWithFlattening(return_flash_attn_kwargs=True)), losses(rowwise)
    assert len(want) == 4 and want[-1] < want[0]
    assert relative_error(torch.tensor(packed), torch.tensor(want)) < 1e-4


@pytest.mark.slow
def test_trl_trains_it_with_its_own_head_and_adapters(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(29)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")
    texts = [row["input_ids"][: 5 + number].tolist() for number, row in enumerate(rows(12))]
    options: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 12,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
    }

    def losses(**more: Any) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = SFTTrainer(
                model=small_model(),
                args=SFTConfig(str(tmp_path / "out"), **options),
                train_dataset=Dataset.from_dict({"input_ids": texts}),
                processing_class=tokenizer,
                **more,
            )
        return train(trainer)

    plain = losses()
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True, -100)
    mask = tokens != -100
    with torch.no_grad():
        want = small_model()(tokens.clamp(min=0), attention_mask=mask, labels=tokens).loss
    # TRL logs four digits.
    assert len(plain) == 6 and plain[-1] < plain[0] and abs(plain[0] - float(want)) < 1e-3
    adapted = losses(peft_config=LoraConfig(r=2, target_modules=["q_proj", "out_proj"]))
    assert abs(adapted[0] - plain[0]) < 1e-3


def test_adapters_on_its_projections_train_merge_and_load(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = small_model()
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == set(names)
    before = {name: weight.clone() for name, weight in base.state_dict().items() if "lora" not in name}
    losses = train(
        Trainer(
            model=model,
            args=arguments(tmp_path / "out", activation_checkpointing=True, max_steps=16),
            train_dataset=rows(64),
            data_collator=default_data_collator,
        )
    )
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        want = model(input_ids=tokens).logits
        made = model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
        model.save_pretrained(tmp_path / "adapter")
        assert all(torch.equal(base.state_dict()[name], weight) for name, weight in before.items())
        merged = model.merge_and_unload()
        assert type(merged) is LinearLlamaForCausalLM
        assert relative_error(merged(tokens).logits, want) < 1e-4
        assert torch.equal(merged.generate(tokens, max_new_tokens=3, do_sample=False), made)
        again = PeftModel.from_pretrained(small_model(), tmp_path / "adapter").eval()
        assert relative_error(again(input_ids=tokens).logits, want) < 1e-5


def test_an_adapter_on_the_head_takes_the_loss_of_its_logits() -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny_hf("hybrid")
    tokens = random_tokens(2, 9)
    want = base(tokens, labels=tokens, num_items_in_batch=20).loss
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["head"], task_type="CAUSAL_LM"))
    # It changes nothing before it is trained.
    loss = model(input_ids=tokens, labels=tokens, num_items_in_batch=20).loss
    assert relative_error(loss, want) < 1e-12
    loss.backward()
    assert sum(parameter.grad is not None for parameter in model.parameters()) == 2


@pytest.mark.parametrize("name", ["gate_proj", "dt_proj"])
def test_gates_take_adapters_too(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_hf("hybrid"), LoraConfig(r=2, target_modules=[name], init_lora_weights=False))
    tokens = random_tokens(2, 9)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
