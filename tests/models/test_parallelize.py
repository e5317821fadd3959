"""A model over ranks is the model on one process: logits, loss and every gradient; and misuse is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import longspan.parallel.apply as parallel_module
from longspan import SequenceLayout, parallelize, record_traffic, sum_gradients, unparallelize
from longspan.errors import InputError
from longspan.models import LinearLlama3
from tests.compare import relative_error, worst
from tests.models.tiny import each_linear_mixer, random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks

TOLERANCE = 1e-10


def compare(
    num_tokens: int, order: Any, documents: tuple[int, ...] | None, changes: dict[str, Any]
) -> dict[str, float]:
    """Relative differences between this rank's sequence-parallel run and one process."""
    tokens = random_tokens(1 if documents else 2, num_tokens + 1)
    inputs = tokens[:, :-1]

    alone = tiny_model(**changes)
    local = SequenceLayout.local(num_tokens, documents)
    want = alone(inputs, layout=local)
    labels = local.shard_labels(tokens)
    num_valid = int((labels >= 0).sum())
    want_loss = F.cross_entropy(want.flatten(0, 1), labels.flatten(), reduction="sum") / num_valid
    want_loss.backward()

    model = parallelize(tiny_model(**changes), None)
    layout = SequenceLayout(num_tokens, order=order, documents=documents)
    logits = model(layout.shard(inputs), layout=layout)
    loss = F.cross_entropy(logits.flatten(0, 1), layout.shard_labels(tokens).flatten(), reduction="sum") / num_valid
    loss.backward()
    sum_gradients(model)
    total = loss.detach().clone()
    dist.all_reduce(total)

    differences = {
        "logits": relative_error(logits, layout.shard(want)),
        "loss": relative_error(total, want_loss),
    }
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert expected.grad.abs().max() > 0, name
        differences[name] = relative_error(parameter.grad, expected.grad)
    return differences


def assert_equal(answers: list[dict[str, float]]) -> None:
    for answer in answers:
        assert worst(answer) <= TOLERANCE, sorted(answer.items(), key=lambda item: -item[1])[:3]


@pytest.mark.slow_rows(r"^2-zigzag", r"^2-contiguous-(kda|simple_gla|hgrn2)", r"^3-contiguous")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^3-zigzag-(mamba2|hgrn2)$")
@pytest.mark.parametrize("operator", each_linear_mixer())
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_hybrid_over_ranks_equals_one_process(operator: str, order: str, num_ranks: int) -> None:
    assert_equal(run_on_ranks(num_ranks, compare, 157, order, None, {"operator": operator}))
    assert_equal(run_on_ranks(num_ranks, compare, 157, order, (0, 5, 60, 61, 130, 157), {"operator": operator}))


def test_a_pattern_with_an_operator_for_each_layer_equals_one_process() -> None:
    changes = {
        "pattern": "NLL",
        "num_layers": 5,
        "operator": ("retention", "simple_gla", "linear_attention"),
        "tie_embeddings": True,
    }
    assert_equal(run_on_ranks(3, compare, 40, "zigzag", None, changes))


def test_one_rank_equals_one_process() -> None:
    assert_equal(run_on_ranks(1, compare, 40, "contiguous", None, {}))


# A data-parallel pair of sequence-parallel pairs.


def compare_on_a_mesh() -> float:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    tokens = random_tokens(2, 31)
    alone, model = tiny_model(), parallelize(tiny_model(), mesh["sp"])
    num_valid = tokens[:, 1:].numel()
    (F.cross_entropy(alone(tokens[:, :-1]).mT, tokens[:, 1:], reduction="sum") / num_valid).backward()
    layout = SequenceLayout(30, mesh["sp"], order="zigzag")
    row = mesh["dp"].get_local_rank()
    own = tokens[row : row + 1]
    logits = model(layout.shard(own[:, :-1]), layout=layout)
    (F.cross_entropy(logits.mT, layout.shard_labels(own), reduction="sum") / num_valid).backward()
    sum_gradients(model)
    errors = []
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        errors.append(relative_error(parameter.grad, expected.grad))
    return worst(errors)


def test_gradients_are_summed_over_data_and_sequence() -> None:
    assert worst(run_on_ranks(4, compare_on_a_mesh)) <= 1e-12


def traffic_of_a_step() -> tuple[int, int]:
    model = parallelize(tiny_model(), None, exchange="all_gather", softmax_method="all_gather")
    layout = SequenceLayout(40)
    with record_traffic() as traffic:
        model(layout.shard(random_tokens(1, 40)), layout=layout).sum().backward()
    return traffic.count("forward"), traffic.count("backward")


def test_each_layer_takes_one_collective_forward_and_one_backward() -> None:
    assert run_on_ranks(2, traffic_of_a_step) == [(4, 4)] * 2


def misuses() -> dict[str, tuple[str, str]]:
    model = parallelize(tiny_model(), None)
    tokens = random_tokens(1, 8)
    layout = SequenceLayout(8)
    other = dist.new_group([0, 1])
    answers = {
        "no layout": raised(model, tokens),
        "global tokens": raised(call, model, tokens, layout),
        "another group": raised(call, model, layout.shard(tokens), SequenceLayout(8, other)),
        "two-dimensional mesh": raised(
            parallelize, tiny_model(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("sp", "dp"))
        ),
    }
    alone = model(tokens, layout=SequenceLayout.local(8))
    assert torch.equal(alone, tiny_model()(tokens))
    return answers


def call(model: LinearLlama3, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    logits: torch.Tensor = model(tokens, layout=layout)
    return logits


def test_misuse_is_refused_on_all_ranks_and_a_local_layout_is_not() -> None:
    for answers in run_on_ranks(2, misuses):
        assert {kind for kind, _ in answers.values()} == {"LayoutError"}
        assert "parallelized over 2 ranks and needs a layout" in answers["no layout"][1]
        assert "model(layout.shard(tokens), layout=layout)" in answers["no layout"][1]
        assert "take layout.shard(x) first" in answers["global tokens"][1]
        assert "another group, of 2 ranks" in answers["another group"][1]
        assert 'mesh["sp"]' in answers["two-dimensional mesh"][1]


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match=r"exchange must be 'auto', one of 'all_gather'.*; got 'rign'"):
        parallelize(tiny_model(), None, exchange="rign")
    wrong: Any = "ulises"
    with pytest.raises(InputError, match="softmax_method must be one of auto, all_gather, ring, ulysses; got 'ulises'"):
        parallelize(tiny_model(), None, softmax_method=wrong)


def test_a_model_without_mixers_and_without_an_adapter_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"got Linear, which has none. Derive .*register_adapter\(\), or give the layout"
    ):
        parallelize(nn.Linear(2, 2), None)
    other: Any = 3
    with pytest.raises(InputError, match=r"takes a torch.nn.Module; got 3 \(int\)"):
        parallelize(other, None)


def test_without_a_process_group_a_parallelized_model_is_the_model() -> None:
    tokens = random_tokens(1, 8)
    model = parallelize(tiny_model(), None, exchange="all_gather", softmax_method="all_gather")
    assert torch.equal(model(tokens), tiny_model()(tokens))
    assert torch.equal(model(tokens, layout=SequenceLayout(8)), tiny_model()(tokens))


def summed_gradients(bucket_bytes: int) -> tuple[list[Any], int]:
    parallel_module.BUCKET_BYTES = bucket_bytes
    rank = dist.get_rank()
    parameters = [
        nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)),
        nn.Parameter(torch.zeros(5)),
        nn.Parameter(torch.zeros(4), requires_grad=False),
        nn.Parameter(torch.zeros((), dtype=torch.float64)),
        nn.Parameter(torch.zeros(2, 2).T),
    ]
    for index in (0, 1, 4):
        parameters[index].grad = torch.full_like(parameters[index], 1.0 + rank + 10 * index)
    if rank == 1:
        parameters[3].grad = torch.tensor(7.0, dtype=torch.float64)
        parameters[1].grad = None
    with record_traffic() as traffic:
        sum_gradients(parameters, dist.group.WORLD)
    return [None if p.grad is None else p.grad.unique().tolist() for p in parameters], traffic.num_collectives


@pytest.mark.parametrize(("bucket_bytes", "num_collectives"), [(2**20, 2), (20, 4)])
def test_gradients_are_summed_and_a_missing_one_is_zero(bucket_bytes: int, num_collectives: int) -> None:
    for summed, collectives in run_on_ranks(2, summed_gradients, bucket_bytes):
        assert summed == [[3.0], [11.0], None, [7.0], [83.0]]
        assert collectives == num_collectives


def test_a_group_of_one_sums_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    with record_traffic() as traffic:
        sum_gradients([parameter])
    assert parameter.grad is None
    assert traffic.num_collectives == 0


def test_parallelizing_again_replaces_the_group() -> None:
    model = parallelize(parallelize(tiny_model(), None), None)
    assert isinstance(model(random_tokens(1, 4)), torch.Tensor)


def undone() -> None:
    model = tiny_model()
    tokens = random_tokens(2, 20)
    want = model(tokens)
    parallelize(model, None, exchange="ring", softmax_method="ring")
    assert unparallelize(model) is model
    assert torch.equal(model(tokens), want)
    layout = SequenceLayout(20)
    kind, message = raised(lambda: model(layout.shard(tokens), layout=layout))
    assert kind == "LayoutError" and "not parallelized" in message
    parallelize(model, None)
    assert relative_error(layout.gather(model(layout.shard(tokens), layout=layout)), want) < TOLERANCE


def test_what_was_parallelized_can_be_undone() -> None:
    run_on_ranks(2, undone)


def test_nothing_to_undo_is_said() -> None:
    with pytest.raises(InputError, match="not parallelized"):
        unparallelize(tiny_model())
    with pytest.raises(InputError, match=r"torch\.nn\.Module"):
        unparallelize("model")  # type: ignore[type-var]


@pytest.mark.parametrize("option", [{"order": "zigzag"}, {"rank_order": [0]}, {"loss": "sum"}, {"verify": True}])
def test_an_option_that_does_not_concern_the_model_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))}=.* concerns models of Hugging Face"):
        parallelize(tiny_model(), None, **option)
