"""Attention transfer: a linear layer learns what the softmax layer gave, of what that was given; nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.conversion import Steps, compare, prepared
from longspan.data.packing import Documents, Sequences
from longspan.data.prepare import prepare_corpus
from longspan.data.prepared import PreparedData, open_prepared
from longspan.data.recipe import Recipe
from longspan.errors import ConfigError
from longspan.launch import Place
from longspan.layout import Order, SequenceLayout
from longspan.models import LinearLlama3
from longspan.models.conversion import Converted, convert, read_llama
from longspan.models.conversion.recipes import OPEN_GATES
from longspan.models.weights import open_weights
from longspan.parallel import MeshDegrees, parallelize
from longspan.train.calibration import calibrate
from longspan.train.config import DataConfig
from longspan.train.layer_tasks import layer_tasks
from longspan.train.ranks import Ranks
from longspan.train.transfer import Transfer, TransferError, Transferred, layer_errors, transfer_attention
from tests.compare import relative_error, worst
from tests.models.llama import random_llama, saved
from tests.models.tiny import LINEAR_MIXERS, each_linear_mixer
from tests.ranks import run_on_ranks
from tests.train.tiny import write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(random_llama(vocab_size=257), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    asked = DataConfig(source=(str(write_corpus(folder / "text")),), tokenizer="bytes", validation_fraction=0.3)
    prepare_corpus(Recipe.of(asked, 0), folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def data(data_folder: Path) -> PreparedData:
    return open_prepared(data_folder)


def converted(folder: Path, operator: str, pattern: str = "LLNL") -> Converted:
    from dataclasses import replace

    llama = read_llama(folder)
    with open_weights(folder) as weights:
        return convert(llama, weights, replace(llama.config, pattern=pattern, operator=operator))


ROWS = Sequences(torch.randint(0, 257, (2, 41), generator=torch.Generator().manual_seed(1)), ((7, 30), ()))


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(mamba2|hgrn2)$")
@pytest.mark.parametrize("operator", each_linear_mixer())
def test_errors_and_gradients_are_those_of_each_layer_by_itself(folder: Path, operator: str) -> None:
    """Beside the whole softmax model, whose layers' inputs and outputs are taken out of it; in float64, with documents."""
    found = converted(folder, operator)
    softmax = converted(folder, "gla", "N").model.double()
    model = found.model.double()
    teachers = {layer: teacher.double() for layer, teacher in found.teachers.items()}
    batch = ROWS.packed()
    layout = SequenceLayout.local(batch.seq_len, batch.documents)
    errors = layer_errors(model, teachers, batch, layout, learns=True)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    assert sorted(errors) == [0, 1, 3]

    taken: dict[int, tuple[Any, Tensor]] = {}
    for number, block in enumerate(softmax.blocks):
        one: Any = block
        one.mixer.register_forward_hook(
            lambda module, given, output, number=number: taken.update({number: (given, output[0])})
        )
    with torch.no_grad():
        softmax(batch.inputs, layout)
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    handed: Tensor | None = None
    for number in errors:
        (x, context), wanted = taken[number]
        shared = {name: module() for name, module in model.shared.items()}
        layer: Any = model.blocks[number]
        own = type(context)(layout, context.positions, context.rotation, shared=shared)
        got, _, *more = layer.mixer(x, own, handed)
        # What a layer hands on teaches it nothing.
        if more:
            handed = more[0].detach()
        error = (got - wanted).square().sum() / wanted.square().sum()
        assert relative_error(errors[number], error.detach()) < 1e-12
        total = total + error
    total.backward()
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        if gradient is None or parameter.grad is None:
            assert gradient is None and parameter.grad is None, name
        else:
            assert relative_error(gradient, parameter.grad, floor=1e-6) < 1e-9, name
    outside = [name for name, gradient in gradients.items() if gradient is not None and ".mixer." not in name]
    assert outside == [name for name in outside if name.startswith("shared.")]


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^gla$")
@pytest.mark.parametrize("operator", each_linear_mixer(quick=("gla", "based")))
def test_errors_fall_and_nothing_else_changes(folder: Path, data: PreparedData, operator: str) -> None:
    found = converted(folder, operator)
    before = {name: parameter.detach().clone() for name, parameter in found.model.named_parameters()}
    teachers = [parameter.clone() for teacher in found.teachers.values() for parameter in teacher.parameters()]
    said: list[tuple[int, float]] = []
    transfer = Transfer(steps=12, seq_len=61, batch_tokens=183, lr=1e-2, validation_sequences=3)
    made = transfer_attention(
        *(found.model, found.teachers, data, transfer, "reset", 0), lambda step, error: said.append((step, error))
    )
    assert [step for step, _ in said] == [*range(1, 13)]
    assert sorted(made.before) == sorted(made.after) == [0, 1, 3]
    for layer, error in made.before.items():
        assert 0 < made.after[layer] < 0.9 * error, (layer, made)
    learning = [f"blocks.{layer}.mixer." for layer in (0, 1, 3)]
    for name, parameter in found.model.named_parameters():
        learns = name.startswith((*learning, "shared."))
        assert torch.equal(parameter, before[name]) != learns, name
    now = [parameter for teacher in found.teachers.values() for parameter in teacher.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(teachers, now, strict=True))


@pytest.mark.slow_rows(r"^lightning$")
@pytest.mark.parametrize("operator", each_linear_mixer(quick=("simple_gla", "lightning", "based")))
def test_calibration_is_of_the_gates_and_sizes_it_names_and_no_further_from_the_softmax_layer(
    folder: Path, operator: str
) -> None:
    """On the batch that it is made on: an output that it has multiplied is further away a hundredth larger, or smaller."""
    found = converted(folder, operator)
    model = found.model.double()
    teachers = {layer: teacher.double() for layer, teacher in found.teachers.items()}
    batch = ROWS.packed()
    layout = SequenceLayout.local(batch.seq_len, batch.documents)

    def errors() -> dict[int, float]:
        return {layer: float(e) for layer, e in layer_errors(model, teachers, batch, layout, learns=False).items()}

    began = errors()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    calibrate(model, teachers, batch, layout)
    names = {f"blocks.{layer}.mixer.{name}" for layer in teachers for name in ("norm.weight", "gate_proj.weight")}
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= names
    assert any("gate_proj" in name for name in changed) == (operator in OPEN_GATES)
    after = errors()
    for layer in teachers:
        assert after[layer] <= 1 + 1e-9 or after[layer] <= began[layer] + 1e-9, (layer, began, after)
        if f"blocks.{layer}.mixer.norm.weight" not in changed:
            continue
        assert after[layer] < 1
        weight = model.get_parameter(f"blocks.{layer}.mixer.norm.weight")
        for factor in (0.99, 1.01):
            with torch.no_grad():
                weight.mul_(factor)
                assert errors()[layer] > after[layer]
                weight.div_(factor)


def test_an_opened_gate_lets_through_what_its_layer_is_given(folder: Path) -> None:
    """One, nearly, where what a layer is given has channels that are the same for every token; in all channels alike."""
    found = converted(folder, "simple_gla")
    model = found.model.double()
    teachers = {layer: teacher.double() for layer, teacher in found.teachers.items()}
    with torch.no_grad():
        # Channels that are the same for every token, as large models have them.
        model.embedding.weight[:, :4] = 5.0
    batch = Sequences(ROWS.tokens).packed()
    layout = SequenceLayout.local(batch.seq_len)
    calibrate(model, teachers, batch, layout)
    for task in layer_tasks(model, teachers, batch, layout):
        mixer: Any = task.block.mixer
        weight = mixer.gate_proj.weight.detach()
        # Of the weights, as a product of alike columns may round each in its own way.
        assert mixer.gate_proj.bias is None and torch.equal(weight, weight[:1].expand_as(weight))
        gate = torch.nn.functional.silu(mixer.gate_proj(task.given)).detach()
        spread = (gate - 1).square().mean(dim=tuple(range(gate.dim() - 1))).sqrt().max()
        assert abs(float(gate.mean()) - 1) < 0.1
        assert spread < (0.02 if task.number == 0 else 0.5), (task.number, spread)


def shares_of_layers(folder: Path, operators: Sequence[str], order: Order | None) -> dict[str, Any]:
    """Of each operator, with documents and without: the errors, and this rank's gradients; an order splits sequences over ranks."""
    found: dict[str, Any] = {}
    for operator in operators:
        made = converted(folder, operator)
        model = made.model.double()
        teachers = {layer: teacher.double() for layer, teacher in made.teachers.items()}
        if order is not None:
            for module in (model, nn.ModuleList(teachers.values())):
                parallelize(module, None)
        for rows in (ROWS, Sequences(ROWS.tokens)):
            batch = rows.packed()
            if order is None:
                layout = SequenceLayout.local(batch.seq_len, batch.documents)
            else:
                layout = SequenceLayout(batch.seq_len, None, order, batch.documents)
            errors = layer_errors(model, teachers, batch, layout, learns=True)
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            found[f"{operator}, documents {batch.documents}"] = (errors, gradients)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "order", "operators"),
    [
        (2, "zigzag", ("gla", "hgrn2", "kda")),
        pytest.param(3, "contiguous", tuple(LINEAR_MIXERS), marks=pytest.mark.slow),
        pytest.param(4, "zigzag", tuple(LINEAR_MIXERS), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_have_the_errors_of_one_process_and_shares_of_its_gradients(
    folder: Path, num_ranks: int, order: Order, operators: tuple[str, ...]
) -> None:
    alone = shares_of_layers(folder, operators, None)
    ranks = run_on_ranks(num_ranks, shares_of_layers, folder, operators, order)
    for name, (errors, gradients) in alone.items():
        for rank in ranks:
            assert sorted(rank[name][0]) == [0, 1, 3]
            for layer, error in errors.items():
                assert relative_error(rank[name][0][layer], error) < 1e-12, (name, layer)
        for parameter, gradient in gradients.items():
            total = torch.stack([rank[name][1][parameter] for rank in ranks]).sum(0)
            assert relative_error(total, gradient, floor=1e-6) < 1e-9, (name, parameter)


def transferred(
    folder: Path, data: Path, operator: str, documents: Documents, order: Order | None
) -> tuple[list[tuple[int, float]], Transferred, dict[str, Tensor]]:
    """In float64, by few steps: what was said, the errors, and the weights; an order splits sequences over ranks."""
    found = converted(folder, operator)
    said: list[tuple[int, float]] = []
    ranks = None
    if order is not None:
        ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
        ranks.arrange(MeshDegrees(sp=ranks.world_size))
    made = transfer_attention(
        found.model.double(),
        {layer: teacher.double() for layer, teacher in found.teachers.items()},
        *(open_prepared(data), Transfer(3, 61, 122, 1e-2, validation_sequences=3), documents, 0),
        lambda step, error: said.append((step, error)),
        *(ranks, order or "zigzag"),
    )
    # As before, the model is one process's own.
    with torch.no_grad():
        found.model(ROWS.tokens)
    return said, made, dict(found.model.state_dict())


@pytest.mark.slow_rows(r"simple_gla")
@pytest.mark.parametrize(
    ("num_ranks", "operator", "documents", "order"),
    [
        (2, "hgrn2", "reset", "zigzag"),
        (2, "simple_gla", "concatenate", "contiguous"),
        pytest.param(3, "gated_deltanet", "concatenate", "contiguous", marks=pytest.mark.slow),
        pytest.param(4, "mamba2", "reset", "contiguous", marks=pytest.mark.slow),
    ],
)
def test_ranks_learn_what_one_process_learns(
    folder: Path, data_folder: Path, num_ranks: int, operator: str, documents: Documents, order: Order
) -> None:
    given = (folder, data_folder, operator, documents)
    said, made, weights = transferred(*given, None)
    for other, of_rank, theirs in run_on_ranks(num_ranks, transferred, *given, order):
        assert [step for step, _ in other] == [1, 2, 3]
        assert worst(abs(one - two) / two for (_, one), (_, two) in zip(other, said, strict=True)) < 1e-9
        for mine, wanted in ((of_rank.before, made.before), (of_rank.after, made.after)):
            assert mine == pytest.approx(wanted, rel=1e-9)
        for name, weight in weights.items():
            assert relative_error(theirs[name], weight) < 1e-7, name


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(folder: Path, data: PreparedData) -> None:
    transfer = Transfer(steps=2, seq_len=61, batch_tokens=122)
    made: list[LinearLlama3] = []
    for seed in (0, 0, 1):
        found = converted(folder, "gla")
        transfer_attention(found.model, found.teachers, data, transfer, "concatenate", seed, lambda step, error: None)
        made.append(found.model)
    same, other = (
        worst(relative_error(a, b) for a, b in zip(made[0].parameters(), model.parameters(), strict=True))
        for model in made[1:]
    )
    assert same == 0
    assert other > 1e-6


def test_an_error_that_is_not_finite_ends_it(folder: Path, data: PreparedData) -> None:
    found = converted(folder, "gla")
    mixer: Any = found.model.blocks[1]
    with torch.no_grad():
        mixer.mixer.out_proj.weight.fill_(float("nan"))
    with pytest.raises(TransferError, match="step 1 has an error of nan"):
        transfer_attention(
            *(found.model, found.teachers, data, Transfer(2, 61, 61), "reset", 0), lambda step, error: None
        )


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": -1}, "transfer.steps is -1; it must be at least 0"),
        ({"lr": 0.0}, "transfer.lr is 0.0"),
        ({"lr": float("nan")}, "transfer.lr is nan"),
        ({"seq_len": 100, "batch_tokens": 250}, "transfer.batch_tokens 250 is no multiple"),
        ({"validation_sequences": 0}, "transfer.validation_sequences is 0"),
    ],
)
def test_values_that_make_no_training_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Transfer(**values).check()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_converted_and_trained_it_is_ahead_of_one_from_scratch(tmp_path: Path, seed: int) -> None:
    found = compare(prepared(tmp_path / "data", 500_000), Steps(150, 40, 40), "gla", "LLLN", seed)
    assert found["error after"] < found["error before"]
    assert found["converted + transfer, 0 steps"] < found["converted, 0 steps"]
    scratch = found["from scratch, 40 steps"]
    assert found["the Llama"] < scratch
    assert found["converted + transfer, 40 steps"] < scratch - 0.1
    assert found["converted, 40 steps"] < scratch
