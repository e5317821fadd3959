"""Models of a user's own: built of mixers, or known by an adapter; and memory that crosses from many ranks to one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import longspan
from longspan import SequenceLayout, parallelize, sum_gradients
from longspan.errors import InputError
from longspan.models import MIXERS, LinearLlama3Config
from longspan.models.initial import InitialWeights
from longspan.models.mixers import (
    Context,
    LayerMemory,
    ParallelOptions,
    SequenceMixer,
    SequenceParallel,
)
from longspan.models.mixers.gla import GLAMixer
from longspan.parallel import adapters, register_adapter
from tests.compare import relative_error, worst
from tests.models.tiny import each_linear_mixer, random_tokens, tiny_model
from tests.ranks import raised, run_on_ranks

DIM = 8


class ShortConvolution(SequenceMixer):
    """A mixer of the test's own: a convolution of three taps, whose last inputs it remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(DIM, 3, generator=torch.Generator().manual_seed(2)))

    def mix(self, x: Tensor, context: Context) -> tuple[Tensor, LayerMemory | None]:
        y, state = longspan.causal_conv1d(
            x,
            self.taps.to(x.dtype),
            layout=context.layout,
            initial_state=context.remembered("taps"),
            output_final_state=True,
        )
        return y, LayerMemory({"taps": state}) if context.outputs_memory else None

    def init_weights(self, initial: InitialWeights) -> None:
        initial.draw(self.taps)

    def flops_per_token(self, seq_len: int) -> float:
        return 6.0 * self.taps.numel()


class OwnModel(nn.Module):
    """Neither a LinearLlama3 nor made of its blocks."""

    def __init__(self) -> None:
        super().__init__()
        config = LinearLlama3Config(vocab_size=4, dim=DIM, num_heads=2, operator="gla")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = ShortConvolution(), GLAMixer(config, 0)
        self.double()

    def forward(self, x: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        context = Context(layout, torch.arange(x.shape[1]))
        hidden, _ = self.first(x, context)
        out: Tensor = self.second(hidden, context)[0]
        return out


def random_x(length: int) -> Tensor:
    return torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own_model_on_a_rank() -> tuple[float, dict[str, tuple[str, str]]]:
    alone, model = OwnModel(), parallelize(OwnModel(), None, exchange="ring")
    x, layout = random_x(21), SequenceLayout(21, order="zigzag")
    out = model(layout.shard(x), layout)
    upstream = random_x(21).flip(0)
    out.backward(layout.shard(upstream))
    sum_gradients(model)
    want = alone(x)
    want.backward(upstream)
    errors = [relative_error(out, layout.shard(want))]
    for parameter, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        errors.append(relative_error(parameter.grad, expected.grad))
    assert model.second.parallel == ParallelOptions(exchange="ring")
    misuses = {"no layout": raised(model, x), "not parallelized": raised(OwnModel(), layout.shard(x), layout)}
    return worst(errors), misuses


def test_any_model_of_mixers_runs_over_ranks_and_its_mixers_refuse_a_wrong_layout() -> None:
    for error, misuses in run_on_ranks(2, own_model_on_a_rank):
        assert error < 1e-10
        assert {kind for kind, _ in misuses.values()} == {"LayoutError"}
        assert "parallelized over 2 ranks and needs a layout" in misuses["no layout"][1]
        assert "the model is not parallelized" in misuses["not parallelized"][1]


class ForeignAttention(nn.Module):
    """Attention as another library has it, which knows no layout; `attend` is what an adapter may replace."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x.unflatten(-1, (2, -1))).flatten(-2)

    def attend(self, x: Tensor) -> Tensor:
        heads = x.transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2)


class ForeignModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = ForeignAttention()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x)
        return out


class AttentionOverRanks(ForeignAttention):
    layout: SequenceLayout | None = None
    options = ParallelOptions()

    def attend(self, x: Tensor) -> Tensor:
        method = self.options.softmax_method
        return longspan.softmax_attention(x, x, x, layout=self.layout, method=method)


def adapt(model: nn.Module, options: ParallelOptions, place: SequenceParallel) -> None:
    attention = AttentionOverRanks()
    attention.options = options
    model.attention = attention


def foreign_model_on_a_rank() -> float:
    register_adapter(ForeignModel, adapt)
    try:
        model = parallelize(ForeignModel(), None, softmax_method="ring")
        attention: Any = model.attention
        assert attention.options == ParallelOptions(softmax_method="ring")
        assert model.sequence_parallel == SequenceParallel(dist.group.WORLD, 2)
        x, layout = random_x(13), SequenceLayout(13)
        attention.layout = layout
        return relative_error(model(layout.shard(x)), layout.shard(ForeignModel()(x)))
    finally:
        adapters._ADAPTERS.clear()


def test_an_adapter_lets_a_foreign_model_run_over_ranks() -> None:
    assert worst(run_on_ranks(2, foreign_model_on_a_rank)) < 1e-12


def test_the_adapter_of_the_nearest_class_is_taken_and_others_are_left_alone() -> None:
    class Derived(ForeignModel):
        pass

    def of_derived(model: nn.Module, options: ParallelOptions, place: SequenceParallel) -> None:
        pass

    try:
        register_adapter(ForeignModel, adapt)
        assert adapters.adapter_of(Derived) is adapt
        register_adapter(Derived, of_derived)
        assert adapters.adapter_of(Derived) is of_derived
        assert adapters.adapter_of(ForeignModel) is adapt
        assert adapters.adapter_of(nn.Linear) is None
    finally:
        adapters._ADAPTERS.clear()


def test_what_is_no_class_or_no_function_is_refused_as_an_adapter() -> None:
    wrong: Any = ForeignModel()
    with pytest.raises(InputError, match=r"takes a class of torch.nn.Module; got ForeignModel\("):
        register_adapter(wrong, adapt)
    nothing: Any = None
    with pytest.raises(InputError, match=r"adapter\(model, options, place\); got None"):
        register_adapter(ForeignModel, nothing)


DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_pages_have_every_mixer() -> None:
    models = (DOCS / "models.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", models, flags=re.MULTILINE)) >= set(MIXERS)
    study = (DOCS / "study.md").read_text(encoding="utf-8")
    sizes = study[study.index("## Sizes") : study.index("## The report")]
    assert set(re.findall(r"`(\w+)`", sizes)) >= set(MIXERS)


def test_the_code_of_the_page_runs() -> None:
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {"__name__": "the page"}
    try:
        with torch.random.fork_rng(devices=[]):
            for block in blocks:
                exec(compile(block, "<models.md>", "exec"), names)
        assert names["theirs"].attention.options.softmax_method == "ring"
        x = random_x(9).float()
        assert relative_error(names["theirs"](x), names["TheirModel"]()(x)) < 1e-5
    finally:
        adapters._ADAPTERS.clear()


def prefilled_and_decoded(operator: str, order: Any, window: int | None) -> dict[str, float]:
    """A prompt over ranks, then two segments over ranks and tokens on each rank alone; the gradients of it all."""
    changes: dict[str, Any] = {"operator": operator, "window": window}
    model, alone = parallelize(tiny_model(**changes), None), tiny_model(**changes)
    tokens = random_tokens(2, 33)
    upstream = torch.randn(2, 33, 29, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = alone(tokens)
    want.backward(upstream)

    memory = None
    errors: dict[str, float] = {}
    losses = []
    for start, stop in ((0, 17), (17, 30)):
        layout = SequenceLayout(stop - start, order=order)
        part = layout.shard(tokens[:, start:stop])
        logits, memory = model(part, layout, memory=memory, output_memory=True)
        errors[f"logits {start}"] = relative_error(logits, layout.shard(want[:, start:stop]))
        losses.append((logits * layout.shard(upstream[:, start:stop])).sum())
    for position in range(30, 33):
        one = SequenceLayout.local(1)
        logits, memory = model(tokens[:, [position]], one, memory=memory, output_memory=True)
        errors[f"logits {position}"] = relative_error(logits, want[:, [position]])
        # Every rank computes them: its loss takes a share.
        losses.append((logits * upstream[:, [position]]).sum() / dist.get_world_size())
    torch.stack(losses).sum().backward()
    sum_gradients(model)
    for (name, parameter), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert parameter.grad is not None and expected.grad is not None
        errors[name] = relative_error(parameter.grad, expected.grad)
    return errors


@pytest.mark.slow_rows(r"mamba2")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^hgrn2$")
@pytest.mark.parametrize("operator", each_linear_mixer())
def test_a_memory_crosses_from_many_ranks_to_one_with_its_gradients(operator: str, window: int | None = None) -> None:
    for order in ("contiguous", "zigzag"):
        for errors in run_on_ranks(2, prefilled_and_decoded, operator, order, window):
            assert worst(errors) < 1e-10, (order, errors)


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^retention$")
@pytest.mark.parametrize("operator", ["gla", "retention"])
def test_so_does_that_of_a_window(operator: str) -> None:
    test_a_memory_crosses_from_many_ranks_to_one_with_its_gradients(operator, 6)


def test_what_an_adapter_returns_undoes_it() -> None:
    calls = []

    def reversible(model: nn.Module, options: ParallelOptions, place: SequenceParallel) -> Callable[[], None]:
        calls.append("applied")
        return lambda: calls.append("undone")

    try:
        register_adapter(nn.Bilinear, reversible)
        model = longspan.parallelize(nn.Bilinear(2, 2, 2), None)
        longspan.unparallelize(model)
        assert calls == ["applied", "undone"]
        register_adapter(nn.Bilinear, lambda model, options, place: None)
        longspan.parallelize(model, None)
        with pytest.raises(InputError, match="returned nothing that undoes its work"):
            longspan.unparallelize(model)
    finally:
        adapters._ADAPTERS.clear()
