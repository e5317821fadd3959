"""How blocks compute: in bfloat16 beside float32 weights, again in backward, compiled; whatever the mesh."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longspan import SequenceLayout, parallelize, record_traffic, sum_gradients
from longspan.errors import ConfigError, InputError
from longspan.models import LinearLlama3
from longspan.parallel import (
    MeshDegrees,
    ParallelMesh,
    compile_blocks,
    compute_in,
    gathered,
    recompute_blocks,
    shard_weights,
)
from longspan.parallel.compiled import check_compiler
from longspan.train.config import Config, OptimConfig
from longspan.train.model import check_device
from longspan.train.optimizer import build_optimizer
from tests.compare import relative_error, worst
from tests.models.tiny import random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks

LENGTH = 39


def model_of() -> Any:
    return tiny_model(num_layers=2, pattern="LN", operator="simple_gla", tie_embeddings=True).float()


def loss_of(model: LinearLlama3, layout: SequenceLayout, tokens: Tensor) -> Tensor:
    logits = model(layout.shard(tokens[:, :-1]), layout=layout)
    assert logits.dtype == torch.float32
    labels = layout.shard_labels(tokens)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / tokens[:, 1:].numel()


def in_bfloat16() -> tuple[list[str], float, bool]:
    """Dtypes that are met; the error against float32; and whether FSDP2's gradients are those of casts, bit by bit."""
    tokens = random_tokens(2, LENGTH + 1)
    alone = model_of()
    loss_of(alone, SequenceLayout.local(LENGTH), tokens).backward()
    found: list[dict[str, Tensor]] = []
    dtypes: set[str] = set()

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        dtypes.add(f"{inputs[0].dtype} {output.dtype}")

    for degrees in (MeshDegrees(sp=2), MeshDegrees(sp=2, shard_over_sp=True)):
        mesh = ParallelMesh(degrees)
        layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
        model = parallelize(model_of(), mesh["sp"], exchange="all_gather", softmax_method="all_gather")
        for block in model.blocks:
            block.mixer.q_proj.register_forward_hook(note)
        if degrees.shards_weights:
            shard_weights(model, mesh, dtype=torch.bfloat16)
            loss_of(model, layout, tokens).backward()
        else:
            compute_in(model, torch.bfloat16)
            loss_of(model, layout, tokens).backward()
            sum_gradients(model)
        found.append(
            {n: g.clone() for n, g in gathered([(n, p.grad) for n, p in model.named_parameters()], True).items()}
        )
        optimizer = build_optimizer(model, OptimConfig())
        optimizer.step()
        dtypes |= {f"weight {p.dtype}" for p in model.parameters()} | {
            f"gradient {p.grad.dtype}" for p in model.parameters()
        }
        dtypes |= {f"state {x.dtype}" for state in optimizer.state.values() for x in state.values()}
    casts, shares = found
    errors = {n: float((casts[n] - p.grad).norm()) for n, p in alone.named_parameters()}
    size = float(torch.stack([p.grad.norm() for p in alone.parameters()]).norm())
    same = all(torch.equal(casts[name], shares[name]) for name in casts)
    return sorted(dtypes), worst(errors) / size, same


def test_layers_compute_in_bfloat16_and_weights_gradients_and_optimizer_stay_float32() -> None:
    for dtypes, error, same in run_on_ranks(2, in_bfloat16):
        assert dtypes == [
            "gradient torch.float32",
            "state torch.float32",
            "torch.bfloat16 torch.bfloat16",
            "weight torch.float32",
        ]
        # A digit of bfloat16 is 0.4 %.
        assert 1e-3 < error < 0.05
        assert same


def test_one_process_computes_with_casts_and_the_weights_are_as_before() -> None:
    tokens, layout = random_tokens(1, LENGTH + 1), SequenceLayout.local(LENGTH)
    model, other = compute_in(model_of(), torch.bfloat16), model_of()
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        lower, full = loss_of(model, layout, tokens), loss_of(other, layout, tokens)
    assert 1e-6 < relative_error(lower, full) < 0.02
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    # A class of blocks is that of other models, too.
    with torch.no_grad():
        assert torch.equal(loss_of(model_of(), layout, tokens), full)


MESHES = (MeshDegrees(sp=2), MeshDegrees(sp=2, shard_over_sp=True))


def recomputed(degrees: MeshDegrees, method: Any) -> list[tuple[bool, int, int]]:
    """For each kind of recomputation: whether gradients are the same bits, and exchanges of forward and backward in backward."""
    mesh = ParallelMesh(degrees)
    layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
    tokens = random_tokens(2, LENGTH + 1)
    found: list[tuple[bool, int, int]] = []
    want: dict[str, Tensor] = {}
    for what in (None, "layer", "selective"):
        model = parallelize(
            tiny_model(num_layers=2, pattern="LN"), mesh["sp"], exchange="all_gather", softmax_method=method
        )
        kinds: Any = what
        if what is not None:
            recompute_blocks(model, kinds)
        if degrees.shards_weights:
            shard_weights(model, mesh)
        loss = loss_of_float64(model, layout, tokens)
        with record_traffic() as traffic:
            loss.backward()
        if not degrees.shards_weights:
            sum_gradients(model)
        grads: Any = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        got = {name: grad.clone() for name, grad in gathered(grads, True).items()}
        want = want or got
        found.append(
            (all(torch.equal(got[n], want[n]) for n in want), traffic.count("forward"), traffic.count("backward"))
        )
    return found


def loss_of_float64(model: LinearLlama3, layout: SequenceLayout, tokens: Tensor) -> Tensor:
    logits = model(layout.shard(tokens[:, :-1]), layout=layout)
    return F.cross_entropy(logits.flatten(0, 1), layout.shard_labels(tokens).flatten(), reduction="sum")


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(degrees1-ring|degrees0-all_gather)$")
@pytest.mark.parametrize("method", ["all_gather", "ring", pytest.param("ulysses", marks=pytest.mark.slow)])
@pytest.mark.parametrize("degrees", MESHES)
def test_recomputed_layers_give_the_same_bits_and_a_selective_one_runs_no_collective(
    degrees: MeshDegrees, method: str
) -> None:
    for plain, layer, selective in run_on_ranks(2, recomputed, degrees, method):
        assert plain[:2] == (True, 0)
        assert layer[0] and layer[1] > 0 and layer[2] == plain[2]
        assert selective == plain


# PyTorch's own, hidden from a user, but not from an error filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_each_kind_of_block_is_compiled_once_as_one_graph_and_gives_the_same() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tokens, layout = random_tokens(2, LENGTH + 1), SequenceLayout.local(LENGTH)
    model, other = tiny_model(num_layers=4), tiny_model(num_layers=4)
    recompute_blocks(compute_in(compile_blocks(model, backend="aot_eager"), torch.float64), "layer")
    for one in (model, other):
        for _ in range(2):
            loss_of_float64(one, layout, tokens).backward()
    gradients = [(p.grad, q.grad) for p, q in zip(model.parameters(), other.parameters(), strict=True)]
    assert worst(relative_error(p, q) for p, q in gradients if p is not None and q is not None) < 1e-10
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch._dynamo.reset()


def compiled_over_ranks() -> list[float]:
    torch._dynamo.reset()
    tokens = random_tokens(2, LENGTH + 1)
    alone = tiny_model(num_layers=2, pattern="LN")
    loss_of_float64(alone, SequenceLayout.local(LENGTH), tokens).backward()
    errors = []
    for degrees in MESHES:
        mesh = ParallelMesh(degrees)
        model = parallelize(tiny_model(num_layers=2, pattern="LN"), mesh["sp"], exchange="all_gather")
        recompute_blocks(compile_blocks(model, backend="aot_eager"), "selective")
        layout = SequenceLayout(LENGTH, mesh["sp"], order="zigzag")
        if degrees.shards_weights:
            shard_weights(model, mesh)
        loss_of_float64(model, layout, tokens).backward()
        if not degrees.shards_weights:
            sum_gradients(model)
        grads: Any = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        got = gathered(grads, True)
        errors += [relative_error(got[n], p.grad) for n, p in alone.named_parameters() if p.grad is not None]
    torch._dynamo.reset()
    return errors


@pytest.mark.slow
def test_blocks_over_ranks_are_compiled_between_their_exchanges_and_give_the_same() -> None:
    with warnings.catch_warnings():
        # The ranks take the filters of this process.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        assert worst(worst(errors) for errors in run_on_ranks(2, compiled_over_ranks, timeout=180.0)) < 1e-10


def test_what_cannot_be_compiled_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any) -> Any:
        raise RuntimeError("\n no compiler is found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(
        ConfigError, match=r"torch.compile does not work here on cpu: no compiler is found. It needs a C\+\+"
    ):
        check_compiler(torch.device("cpu"))


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.train.model.computes_in_bfloat16", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    from longspan.train.config import from_mapping

    config = from_mapping({"train": {"dtype": "bfloat16"}})
    with pytest.raises(
        ConfigError, match=r"'bfloat16', which Tesla V100 does not compute in. Use train.dtype 'float32'"
    ):
        check_device(config, torch.device("cuda"))
    check_device(config, torch.device("cpu"))
    check_device(Config(), torch.device("cuda"))


def wrong_orders() -> list[tuple[str, str]]:
    model = shard_weights(model_of(), ParallelMesh(MeshDegrees(dp_shard=2)))
    return [
        raised(recompute_blocks, model, "layer"),
        raised(compile_blocks, model),
        raised(compute_in, model, torch.bfloat16),
    ]


def test_what_must_come_before_weights_are_divided_says_so() -> None:
    for answers in run_on_ranks(2, wrong_orders):
        assert {kind for kind, _ in answers} == {"InputError"} and all("shard_weights()" in text for _, text in answers)
    wrong: Any = "some"
    with pytest.raises(InputError, match="takes 'layer' or 'selective'; got 'some'"):
        recompute_blocks(model_of(), wrong)
    with pytest.raises(InputError, match=r"takes a floating dtype; got torch.int32"):
        compute_in(model_of(), torch.int32)
