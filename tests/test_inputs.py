"""What does not fit is refused by every operator, on one device and on every rank, with the way out and before anything is sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import longspan
from longspan import InputError, LayoutError, SequenceLayout, features
from longspan.exchange import record_traffic
from longspan.models import LinearLlama3, LinearLlama3Config
from tests.ranks import raised, run_on_ranks

NUM_TOKENS = 12
NO_NUMBERS: tuple[Any, ...] = (float("nan"), float("inf"), "0.5", [1.0], 1j, True)
NO_COUNTS: tuple[Any, ...] = (0, -1, 2.5, True, "8", [8])
NO_FLAGS: tuple[Any, ...] = (None, 1, "yes", torch.tensor(True))
NO_NAMES: tuple[Any, ...] = ("pigeon", 3, ["torch"])


def learned() -> Tensor:
    return torch.nn.Parameter(torch.tensor(0.5))


@dataclass
class Operator:
    """A public operator: good arguments by name, and bad values of its options.

    tensors: the arguments that are tensors of T tokens or parameters; dims_of_size_0: whether an empty one is refused.
    """

    call: Callable[..., Any]
    tensors: dict[str, Tensor]
    bad: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    takes_layout: bool = True
    takes_empty: bool = False


LINEAR_BAD: dict[str, tuple[Any, ...]] = {
    "scale": (*NO_NUMBERS, learned(), torch.ones(2)),
    "chunk_size": NO_COUNTS,
    "output_final_state": NO_FLAGS,
    "exchange": ("pigeon", 3, None),
    "schedule": ("lasp", 3, None),
    "backend": NO_NAMES,
    "initial_state": (
        0.0,
        [0.0],
        torch.zeros(1),
        torch.zeros(1, 2, 4, 4).bfloat16(),
        torch.zeros(1, 2, 4, 4, device="meta"),
    ),
}
RECIPE_BAD = {name: bad for name, bad in LINEAR_BAD.items() if name != "scale"}
SOFTMAX_BAD: dict[str, tuple[Any, ...]] = {
    "scale": LINEAR_BAD["scale"],
    "window": (0, -1, 2.5, True, "8"),
    "causal": NO_FLAGS,
    "method": NO_NAMES,
    "softcap": (*NO_NUMBERS, 0.0, -1.0),
    "sinks": (0.0, torch.zeros(3), torch.zeros(2).long()),
}


def operators(num_tokens: int) -> dict[str, Operator]:
    """Every public operator with arguments of `num_tokens` tokens."""

    def make(*shape: int) -> Tensor:
        return torch.full((1, num_tokens, *shape), -0.1)

    q, k, v = (make(2, 4) for _ in range(3))
    attention = {"q": q, "k": k, "v": v}
    g, channels, beta = {"g": make(2)}, {"g": make(2, 4)}, {"beta": make(2).abs()}
    conv = {"x": make(6), "weight": torch.ones(6, 3), "bias": torch.ones(6)}
    conv_bad: dict[str, tuple[Any, ...]] = {
        "activation": ("relu", 3, True),
        "output_final_state": NO_FLAGS,
        "backend": NO_NAMES,
        "initial_state": (0.0, torch.zeros(1, 5, 6), torch.zeros(1, 2, 6).double()),
    }
    mamba = {"x": make(2, 4), "dt": make(2).abs(), "A": torch.full((2,), -1.0), "B": make(1, 4), "C": make(1, 4)}
    extras = {"D": torch.ones(2), "z": make(2, 4), "dt_bias": torch.ones(2)}
    two_sided = {**LINEAR_BAD, "causal": NO_FLAGS}
    found = {
        "linear_attention": Operator(longspan.linear_attention, attention, two_sided),
        "retention": Operator(longspan.retention, {**attention, "log_decay": torch.full((2,), -0.1)}, two_sided),
        "simple_gla": Operator(longspan.simple_gla, {**attention, **g}, LINEAR_BAD),
        "gla": Operator(longspan.gla, {**attention, **channels}, LINEAR_BAD),
        "delta_rule": Operator(longspan.delta_rule, {**attention, **beta}, LINEAR_BAD),
        "gated_delta_rule": Operator(longspan.gated_delta_rule, {**attention, **g, **beta}, LINEAR_BAD),
        "kda": Operator(longspan.kda, {**attention, **channels, **beta}, LINEAR_BAD),
        # In one call, u = None is `gla` without a bonus.
        "write gla_with_bonus": Operator(
            lambda **rest: longspan.write("gla_with_bonus", **rest),
            {"k": k, "v": v, **channels, "u": torch.ones(2, 4)},
            {"u": (0.5, torch.ones(4)), "chunk_size": NO_COUNTS},
        ),
        "gated_delta_product": Operator(
            longspan.gated_delta_product,
            {"q": q, "k": make(3, 2, 4), "v": make(3, 2, 4), **g, "beta": make(3, 2).abs()},
            LINEAR_BAD,
        ),
        "dplr_delta_rule": Operator(
            longspan.dplr_delta_rule, {**attention, "a": make(2, 4), "b": make(2, 4), **channels}, LINEAR_BAD
        ),
        "rwkv7": Operator(
            longspan.rwkv7,
            {"r": q, "w": channels["g"], "k": k, "v": v, "kappa": make(2, 4), "a": make(2, 4).abs()},
            LINEAR_BAD,
        ),
        "comba": Operator(longspan.comba, {**attention, "p": make(2, 4), **g, **beta}, LINEAR_BAD),
        "gated_slot_attention": Operator(
            longspan.gated_slot_attention, {**attention, "s": make(2, 3), "g": make(2, 3)}, LINEAR_BAD
        ),
        "softmax_attention": Operator(longspan.softmax_attention, attention, SOFTMAX_BAD),
        "causal_conv1d": Operator(longspan.causal_conv1d, conv, conv_bad),
        "long_conv1d": Operator(
            longspan.long_conv1d,
            {"x": make(6), "kernel": torch.ones(6, 3)},
            {
                "method": ("pigeon", 3, None),
                "exchange": ("pigeon", 3, None, "ring"),
                "output_final_state": NO_FLAGS,
                "initial_state": (0.0, torch.zeros(1, 5, 6), torch.zeros(1, 2, 6).double()),
            },
        ),
        "exponentials": Operator(
            lambda log_decay, coefficients, x, **rest: longspan.long_conv1d(
                x, longspan.ExponentialKernel(log_decay, coefficients), **rest
            ),
            {"x": make(6), "log_decay": torch.full((6, 2), -0.1), "coefficients": torch.ones(6, 2)},
            {
                "method": ("pigeon", "halo"),
                "exchange": ("pigeon", 3, None),
                "initial_state": (0.0, torch.zeros(1, 5, 2), torch.zeros(1, 6, 2).double()),
            },
        ),
        "token_shift": Operator(
            longspan.token_shift,
            {"x": make(6)},
            {"output_final_state": NO_FLAGS, "initial_state": (0.0, torch.zeros(1, 5), torch.zeros(1, 6).double())},
        ),
        "normalized": Operator(
            longspan.normalized_linear_attention,
            attention,
            {**RECIPE_BAD, "eps": (*NO_NUMBERS, -1.0), "operator": ("kda", 3)},
        ),
        "mamba2": Operator(
            longspan.mamba2, {**mamba, **extras}, {**RECIPE_BAD, "n_groups": NO_COUNTS, "dt_softplus": NO_FLAGS}
        ),
        "selective_scan": Operator(
            longspan.selective_scan,
            {
                **{name: make(4) for name in ("u", "B", "C", "z")},
                "delta": make(4).abs(),
                "A": torch.full((4, 4), -1.0),
                "D": torch.ones(4),
                "delta_bias": torch.ones(4),
            },
            {
                **{name: bad for name, bad in RECIPE_BAD.items() if name != "schedule"},
                "initial_state": (
                    0.0,
                    [0.0],
                    torch.zeros(1),
                    torch.zeros(1, 4, 4).bfloat16(),
                    torch.zeros(1, 4, 4).to("meta"),
                ),
                "delta_softplus": NO_FLAGS,
            },
        ),
        "hgrn2": Operator(
            longspan.hgrn2, {"q": q, "f": make(2, 4), "i": v}, {**RECIPE_BAD, "lower_bound": (*NO_NUMBERS, -0.5, 2)}
        ),
        "write": Operator(
            lambda operator="simple_gla", **rest: longspan.write(operator, **rest),
            {"k": k, "v": v, **g},
            {"operator": ("pigeon", 3, None), "window": (3,), "causal": (*NO_FLAGS, False), "chunk_size": NO_COUNTS},
        ),
        "write softmax": Operator(
            lambda **rest: longspan.write("softmax", **rest), {"k": k, "v": v}, {"num_heads": NO_COUNTS, "g": (g["g"],)}
        ),
        "rms_norm_gated": Operator(
            longspan.rms_norm_gated,
            {"x": make(4), "gate": make(4), "weight": torch.ones(4)},
            {"eps": (*NO_NUMBERS, -1.0), "activation": ("relu", None, 3), "backend": NO_NAMES},
            takes_layout=False,
            takes_empty=True,
        ),
    }
    labels = torch.zeros(1, num_tokens, dtype=torch.int64)
    found["chunked_cross_entropy"] = Operator(
        lambda hidden, weight, labels=labels, **rest: longspan.chunked_cross_entropy(hidden, weight, labels, **rest),
        {"hidden": make(4), "weight": torch.ones(5, 4), "bias": torch.ones(5)},
        {
            "labels": (None, 0, [[0]], labels.float(), labels.int(), labels[0], labels[:, 1:], labels + 5, labels - 1),
            "ignore_index": (None, 0.5, True, "-100"),
            "num_valid": (-1, 2.5, True, "8", [8], torch.ones(1), torch.tensor(True), learned()),
            "chunk_size": NO_COUNTS,
            "softcap": (*NO_NUMBERS, 0.0, -1.0),
            "weight": (torch.ones(5, 3), torch.ones(4), torch.ones(5, 4).double()),
        },
        takes_layout=False,
    )
    for name in ("identity", "elu_plus_one", "relu", "unit_length", "taylor"):
        bad = {"eps": (*NO_NUMBERS, -1.0)} if name == "unit_length" else {}
        found[name] = Operator(getattr(features, name), {"x": q}, bad, takes_layout=False, takes_empty=True)
    found["Rebased"] = Operator(features.Rebased(4), {"x": q}, takes_layout=False, takes_empty=True)
    gla_bad = {"temperature": (*NO_NUMBERS, 0.0, -1.0)}
    found["gla_log_decay"] = Operator(features.gla_log_decay, {"logits": q}, gla_bad, False, True)
    mamba_logits = {"dt": make(2), "A_log": torch.ones(2), "dt_bias": torch.ones(2)}
    found["mamba2_log_decay"] = Operator(features.mamba2_log_decay, mamba_logits, {}, False, True)
    found["hgrn2_lower_bounds"] = Operator(features.hgrn2_lower_bounds, {"logits": torch.ones(3, 2)}, {}, False, True)
    return found


NAMES = list(operators(NUM_TOKENS))


def bad_tensors(x: Tensor, takes_empty: bool) -> list[Any]:
    """What stands where the tensor x is expected."""
    bad: list[Any] = [0.5, 3, [0.5], "x", x.long(), x > 0]
    if not takes_empty:
        bad += [x.narrow(dim, 0, 0) for dim in range(x.dim())]
    if dist.is_initialized():
        bad.append(
            DTensor.from_local(x, init_device_mesh("cpu", (dist.get_world_size(),)), [Replicate()], run_check=False)
        )
    return bad


def bad_calls(name: str, layout: SequenceLayout | None) -> list[tuple[str, Callable[[], Any]]]:
    """Calls that do not fit, with a word for each."""
    operator = operators(NUM_TOKENS if layout is None else layout.num_local_tokens)[name]
    optional = {"bias", "D", "z", "dt_bias", "delta_bias"} & set(operator.tensors)
    changes: list[tuple[str, Any]] = []
    for argument, x in operator.tensors.items():
        changes += [(argument, bad) for bad in bad_tensors(x, operator.takes_empty)]
        changes += [] if argument in optional else [(argument, None)]
        changes += [(argument, x.to("meta"))] if operator.takes_layout and len(operator.tensors) > 1 else []
    for option, values in operator.bad.items():
        changes += [(option, value) for value in values]
    if operator.takes_layout:
        changes += [("layout", bad) for bad in (3, "zigzag", [0, 5])]
        changes += [("layout", SequenceLayout.local(99)), ("layout", SequenceLayout.for_rank(2 * NUM_TOKENS, 2, 0))]
    common = {"layout": layout} if operator.takes_layout else {}

    def call(argument: str, value: Any) -> Any:
        return operator.call(**{**common, **operator.tensors, argument: value})

    return [(f"{argument}={value!r}"[:90], partial(call, argument, value)) for argument, value in changes]


def complaints(name: str, over_ranks: bool) -> list[str]:
    """What is wrong with the refusals of an operator's bad calls on this rank; nothing else may be sent meanwhile."""
    found = []
    layout = SequenceLayout(2 * NUM_TOKENS, order="zigzag") if over_ranks else None
    for what, call in bad_calls(name, layout):
        with record_traffic() as traffic:
            try:
                call()
            except (InputError, LayoutError) as error:
                message = str(error)
                # A value, and a sentence after the one that has it.
                if "got" not in message or not re.search(r"[.;)] [A-Z][a-z]", message[message.index("got") :]):
                    found.append(f"{what}: no value or no remedy: {message}")
            except Exception as error:
                found.append(f"{what}: {type(error).__name__}: {error}")
            else:
                found.append(f"{what}: nothing was raised")
        if traffic.num_collectives:
            found.append(f"{what}: {traffic.num_collectives} collectives")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_good_arguments_of_the_table_are_taken(name: str) -> None:
    operator = operators(NUM_TOKENS)[name]
    operator.call(**operator.tensors)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_on_one_device(name: str) -> None:
    assert complaints(name, over_ranks=False) == []


def complaints_of_all() -> list[str]:
    return [
        f"{name}, {'2 ranks' if over_ranks else 'one device'}, {complaint}"
        for name in NAMES
        for over_ranks in (True, False)
        for complaint in complaints(name, over_ranks)
    ]


def test_what_does_not_fit_is_refused_on_every_rank_before_anything_is_sent() -> None:
    """DTensors included."""
    for found in run_on_ranks(2, complaints_of_all, timeout=120.0):
        assert found == []


def layout_calls(layout: Any) -> list[Callable[[], Any]]:
    x = torch.ones(1, layout.num_local_tokens, 3)
    whole = torch.ones(1, layout.seq_len, 3)
    tokens = torch.ones(1, layout.seq_len, dtype=torch.int64)
    calls: list[Callable[[], Any]] = []
    for take, good in ((layout.shard, whole), (layout.gather, x)):
        wrong: list[Any] = [None, 3, [1.0], good[:, :1], torch.cat([good, good], dim=1)]
        if dist.is_initialized():
            wrong.append(bad_tensors(good, True)[-1])
        calls += [partial(take, bad) for bad in wrong]
        calls += [partial(take, good, dim) for dim in (3, -4, 1.0, True, None, "1")]
    calls += [
        partial(layout.shard_labels, bad) for bad in (None, tokens[0], tokens.float(), tokens.bool(), tokens[:, :3])
    ]
    calls += [partial(layout.shard_labels, tokens, ignore_index=bad) for bad in (None, 0.5, True)]
    return calls


def misfits(calls: list[Callable[[], Any]]) -> list[str]:
    found = []
    for number, call in enumerate(calls):
        try:
            kind, message = raised(call)
        except AssertionError:
            kind, message = "nothing", ""
        if kind not in ("InputError", "LayoutError") or "got" not in message:
            found.append(f"{number}: {kind}: {message}")
    return found


def misfits_of_layout() -> list[str]:
    return misfits(layout_calls(SequenceLayout(2 * NUM_TOKENS)))


def test_layouts_refuse_what_does_not_fit() -> None:
    assert misfits(layout_calls(SequenceLayout.local(NUM_TOKENS))) == []
    for found in run_on_ranks(2, misfits_of_layout):
        assert found == []


@pytest.mark.parametrize(
    "documents",
    [
        *(
            [0.0, 5.0, 12.0],
            [0, 5.5, 12],
            ["0", "12"],
            [False, 12],
            [[0, 12]],
            12,
            3.5,
            "012",
            [None, 12],
            [0, float("nan"), 12],
        ),
        *(torch.tensor([0.0, 12.0]), torch.tensor([[0, 12]]), [torch.tensor(0.0), torch.tensor(12.0)], []),
    ],
)
def test_documents_that_are_no_integers_are_refused(documents: Any) -> None:
    with pytest.raises(LayoutError, match=r"documents must be .*got "):
        SequenceLayout.local(12, documents)


def test_documents_may_be_anything_that_holds_integers() -> None:
    for documents in ((0, 5, 12), torch.tensor([0, 5, 12]), [torch.tensor(0), torch.tensor(5), 12], iter([0, 5, 12])):
        assert SequenceLayout.local(12, documents).documents == (0, 5, 12)  # type: ignore[arg-type]


def test_small_functions_and_the_model_refuse_what_does_not_fit() -> None:
    model: Any = LinearLlama3(LinearLlama3Config(vocab_size=16, dim=8, num_layers=1, num_heads=2))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    anything: Any = features
    decays: Any = features.lightning_log_decay
    maker: Any = SequenceLayout
    calls: list[Callable[[], Any]] = []
    calls += [partial(features.retnet_log_decay, bad) for bad in NO_COUNTS]
    calls += [partial(features.lightning_log_decay, bad) for bad in NO_COUNTS]
    calls += [partial(decays, 4, bad, 3) for bad in (3, -1, 1.0, True, "1")]
    calls += [partial(anything.Rebased, bad) for bad in NO_COUNTS]
    calls += [partial(anything.Rebased, 4, bad) for bad in NO_COUNTS]
    calls += [partial(model, bad) for bad in (None, 3, [[1]], tokens.float(), tokens[0], tokens[:, :0], tokens[:0])]
    calls += [partial(model, tokens, layout=bad) for bad in (3, "local", SequenceLayout.local(5))]
    calls += [partial(model, tokens, memory=bad) for bad in (3, "memory", (tokens,))]
    calls += [partial(model, tokens, output_memory=bad) for bad in NO_FLAGS]
    calls += [partial(model, tokens, labels=bad) for bad in (3, tokens.float(), tokens[:, 1:], tokens + 16, tokens - 1)]
    calls += [partial(model, tokens, labels=tokens, num_valid=bad) for bad in (-1, 2.5, True, learned())]
    calls += [partial(model, tokens, num_valid=4)]
    calls += [partial(maker.local, bad) for bad in (0, -1, 2.5, True, "8", None)]
    calls += [partial(maker.for_rank, 8, bad, 0) for bad in (2.0, "2", None, True)]
    calls += [partial(maker.for_rank, 8, 2, bad) for bad in (2.0, "2", None, True)]
    assert misfits([call for call in calls if not _says_shorter(call)]) == []


def _says_shorter(call: Callable[[], Any]) -> bool:
    """True for a length of less than one token a rank, whose message states both numbers."""
    return "is shorter than the number of ranks" in raised(call)[1]


def use_after_the_group() -> list[tuple[str, str, str]]:
    group = dist.new_group([0, 1])
    layout = SequenceLayout(2 * NUM_TOKENS, group)
    # A rank that destroys it first closes the connections that the other one is still making.
    dist.barrier(group)
    dist.destroy_process_group(group)
    found = [("gather", *raised(layout.gather, torch.ones(1, NUM_TOKENS, 2))), ("verify", *raised(layout.verify))]
    for name, operator in operators(NUM_TOKENS).items():
        if operator.takes_layout:
            found.append((name, *raised(partial(operator.call, **operator.tensors, layout=layout))))
    return found


def test_a_layout_whose_group_was_destroyed_says_so() -> None:
    for answers in run_on_ranks(2, use_after_the_group):
        for name, kind, message in answers:
            assert kind == "LayoutError", (name, message)
            assert "a process group of 2 ranks that no longer exists" in message, name
            assert "Build a new SequenceLayout" in message, name


def written(num_tokens: int, layout: SequenceLayout | None) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Arguments of `write`, by operator, and its options."""
    q = torch.full((1, num_tokens, 2, 4), 0.1)
    g, beta = torch.full((1, num_tokens, 2), -0.1), torch.full((1, num_tokens, 2), 0.5)
    both = {"k": q.clone(), "v": q.clone()}
    gates: dict[str, dict[str, Tensor]] = {
        "linear_attention": {},
        "retention": {"log_decay": torch.full((2,), -0.1)},
        "simple_gla": {"g": g},
        "gla": {"g": torch.full((1, num_tokens, 2, 4), -0.1)},
        "delta_rule": {"beta": beta},
        "gated_delta_rule": {"g": g, "beta": beta},
        "softmax": {},
    }
    calls: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        name: ({**both, **more}, {"layout": layout}) for name, more in gates.items()
    }
    calls["retention both ways"] = ({**both, **gates["retention"]}, {"layout": layout, "causal": False})
    return calls


def changes_seen(over_ranks: bool, with_gradients: bool) -> list[str]:
    """What is not noticed. Every memory is read at the end, so that no exchange stays open."""
    layout = SequenceLayout(2 * NUM_TOKENS) if over_ranks else None
    missed = []
    writes: Any = longspan.write
    for name, (tensors, options) in written(NUM_TOKENS, layout).items():
        operator = name.removesuffix(" both ways")
        for changed in tensors:
            with torch.set_grad_enabled(with_gradients):
                own = {key: x.clone() for key, x in tensors.items()}
                if with_gradients:
                    own["k"] = own["k"].requires_grad_().clone()
                memory = writes(operator, **own, **options)
                query = tensors["k"].clone()
                own[changed].mul_(1.0)
                kind, message = raised(memory.read, query)
                if kind != "InputError" or f"{changed} was changed in place (1 times)" not in message:
                    missed.append(f"{name}, {changed}: {kind}: {message}")
    return missed


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_tensor_changed_between_write_and_read_is_named(with_gradients: bool) -> None:
    assert changes_seen(False, with_gradients) == []


def test_a_tensor_changed_between_write_and_read_is_named_on_every_rank() -> None:
    for missed in run_on_ranks(2, changes_seen, True, False):
        assert missed == []


def test_a_final_state_after_a_change_is_refused_too() -> None:
    k = torch.ones(1, 5, 2, 4)
    memory = longspan.write("linear_attention", k, k.clone(), output_final_state=True)
    k.zero_()
    with pytest.raises(InputError, match="k was changed in place"):
        memory.final_state()


def test_tensors_of_inference_mode_are_written_and_read() -> None:
    """They have no counters."""
    with torch.inference_mode():
        k = torch.ones(1, 5, 2, 4)
        assert longspan.write("linear_attention", k, k.clone()).read(k).isfinite().all()
        assert longspan.write("softmax", k, k.clone()).read(k).isfinite().all()
