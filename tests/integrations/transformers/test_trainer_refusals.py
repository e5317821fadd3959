"""What would be silently wrong under Trainer is an error on every rank, before any batch."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longspan.errors import InputError
from longspan.integrations.transformers import SequenceParallelConfig, prepare_trainer
from tests.compare import relative_error
from tests.integrations.transformers.families import build
from tests.integrations.transformers.training import LENGTH, environment, trainer_of
from tests.ranks import raised, run_on_ranks


def other_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.sum()


def no_metrics(prediction: Any) -> dict[str, float]:
    return {}


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
    "a loss of one's own": ({"compute_loss_func": other_loss}, {}, "compute_loss_func"),
    "metrics of a shard's logits": ({"compute_metrics": no_metrics}, {}, "gather_logits=True"),
    "each rank's own mean": ({"average_tokens_across_devices": False}, {}, "average_tokens_across_devices"),
    "noise of embeddings": ({"neftune_noise_alpha": 5.0}, {}, "neftune_noise_alpha"),
    "attention dropout": ({}, {"attention_dropout": 0.1}, "attention_dropout=0"),
    "data handed out by one process": ({"accelerator_config": {"dispatch_batches": True}}, {}, "dispatch_batches"),
    "another parallelism": ({"parallelism_config": None}, {}, "SequenceParallelConfig"),
}


def of_another_trainer(trainer: Any) -> None:
    """A trainer of TRL that has a loss of its own."""
    kind = type("DPOTrainer", (type(trainer),), {"__module__": "trl.trainer.dpo_trainer", "compute_loss": other_loss})
    trainer.__class__ = kind


SET_LATER: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a model made anew": (lambda trainer: setattr(trainer, "model_init", dict), "model_init"),
    "Liger's loss": (lambda trainer: setattr(trainer.args, "use_liger_kernel", True), "use_liger_kernel"),
    "objects of evaluation": (
        lambda trainer: setattr(trainer.args, "eval_use_gather_object", True),
        "eval_use_gather_object",
    ),
    "DeepSpeed": (lambda trainer: setattr(trainer, "is_deepspeed_enabled", True), "DeepSpeed"),
    "a trainer with its own loss": (of_another_trainer, "DPOTrainer computes its loss"),
}
"""What is set in a trainer that was made without it, since it needs packages that the tests do not have."""


def shifted_inside(model: Any) -> Any:
    """A model with a layer that mixes tokens in a way that nothing tells."""
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(torch.cat([x[:, :1], x[:, :-1]], dim=1))
    return model


def refusals(folder: str) -> dict[str, tuple[str, str]]:
    found = {}
    for what, (options, config, _) in REFUSED.items():
        with environment():
            trainer = trainer_of(build("llama", **config), folder, 2, **options)
            found[what] = raised(prepare_trainer, trainer)
    for what, (change, _) in SET_LATER.items():
        with environment():
            trainer = trainer_of(build("llama"), folder, 2)
            change(trainer)
            found[what] = raised(prepare_trainer, trainer)
    with environment():
        trainer = trainer_of(shifted_inside(build("llama")), folder, 2)
        prepare_trainer(trainer, verify=True)
        found["another loss than one process's"] = raised(trainer.train)
    with environment():
        trainer = trainer_of(build("llama"), folder, 2)
        prepare_trainer(trainer)
        assert trainer.model.sequence_parallel.group is not dist.group.WORLD, "gradients are averaged there"
        found["twice"] = raised(prepare_trainer, trainer)
        found["predictions"] = raised(trainer.predict, trainer.eval_dataset)
        packed = {
            "input_ids": torch.ones(1, 9, dtype=torch.int64),
            "labels": torch.ones(1, 9, dtype=torch.int64),
            "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
            "num_items_in_batch": torch.tensor(8),
        }
        found["labels of first tokens"] = raised(lambda: trainer.model(**packed))
    return found


def test_what_would_be_wrong_is_refused_on_every_rank(tmp_path: Path) -> None:
    expected = {what: message for what, (*_, message) in (REFUSED | SET_LATER).items()} | {
        "another loss than one process's": "differs from one process",
        "twice": "parallelized already",
        "predictions": "gather_logits=True",
        "labels of first tokens": "Set them to -100",
    }
    for found in run_on_ranks(2, refusals, str(tmp_path), checked=False, timeout=120.0):
        assert found.keys() == expected.keys()
        for what, (name, message) in found.items():
            assert name == "InputError", (what, name, message)
            assert expected[what] in message, (what, message)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"cp_size": 0}, "cp_size must be a positive integer; got 0"),
        ({"cp_size": "2"}, "cp_size must be a positive integer"),
        ({"cp_size": 2, "tp_size": 2}, "tensor parallelism is not combined"),
        ({"sp_size": 2}, "DeepSpeed's sequence parallelism is not combined"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SequenceParallelConfig(**sizes)


def test_a_mesh_needs_its_processes() -> None:
    with pytest.raises(
        InputError, match=r"cp_size=2 needs 2 processes or a multiple of them; there is 1\. Start the script by"
    ):
        SequenceParallelConfig(cp_size=2).build_device_mesh("cpu")


def test_processes_that_accelerate_does_not_know_of_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(InputError, match=r"there is 1\. torchrun has started this one.* use_cpu=True"):
        SequenceParallelConfig(cp_size=2).build_device_mesh("cpu")


def meshes() -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    found = []
    for options in ({"cp_size": 2}, {"cp_size": 1}, {"cp_size": 1, "dp_shard_size": 2}):
        config = SequenceParallelConfig(**options)
        mesh = config.build_device_mesh("cpu")
        assert mesh is not None
        config.device_mesh = mesh
        assert mesh["cp"].get_group() is not dist.group.WORLD, "gradients are averaged there"
        assert pickle.loads(pickle.dumps(config)).device_mesh is None
        found.append((mesh.mesh_dim_names or (), tuple(mesh.shape)))
    return found


def test_processes_that_share_no_sequence_are_replicas() -> None:
    expected = [(("cp",), (2,)), (("dp_replicate", "cp"), (2, 1)), (("dp_shard", "cp"), (2, 1))]
    assert run_on_ranks(2, meshes, checked=False) == [expected, expected]


def test_one_process_prepares_the_same_script(tmp_path: Path) -> None:
    # Packed documents stay apart in linear layers, which Transformers' own packed forward does not see to.
    ids = torch.arange(1, LENGTH + 1)[None]
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    with environment():
        trainer = trainer_of(build("bamba"), str(tmp_path), 1, compute_metrics=no_metrics, label_smoothing_factor=0.1)

        def last(tokens: Tensor, **given: Any) -> Tensor:
            with torch.no_grad():
                logits: Tensor = trainer.model(input_ids=tokens, **given).logits[:, -1]
            return logits

        alone = last(ids[:, 20:], use_cache=False)
        mixed = last(ids, position_ids=positions, use_cache=False)
        prepare_trainer(trainer)
        apart = last(ids, position_ids=positions)
    torch.testing.assert_close(apart, alone, rtol=1e-6, atol=1e-6)
    assert relative_error(mixed, alone) > 0.1


# Both are found by the same function.
@pytest.mark.slow_rows(r"^SequenceParallelConfig$")
@pytest.mark.parametrize("name", ["SequenceParallelConfig", "prepare_trainer"])
def test_names_that_need_accelerate_load_it_when_asked_for(name: str) -> None:
    code = f"""
import sys
sys.modules["accelerate"] = sys.modules["transformers"] = None
from longspan.integrations import transformers as room
assert "{name}" in room.__all__
try:
    room.{name}
except ImportError:
    print("asked")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "asked\n", result.stderr


def test_prepare_trainer_takes_a_trainer() -> None:
    refuse: Callable[..., Any] = prepare_trainer
    with pytest.raises(InputError, match=r"takes a transformers\.Trainer"):
        refuse(build("llama"))
