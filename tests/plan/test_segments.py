"""The plan of a step in segments of time: what is kept between them is what the model remembers, and the rest is of one segment."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from longspan import stream
from longspan.commands.plan_train import parse, report, sizes_of, step_of
from longspan.degrees import MeshDegrees
from longspan.models import LinearLlama3
from longspan.parallel import compute_in
from longspan.plan.stated import stated_cluster
from longspan.plan.training import (
    DeviceFigures,
    Operations,
    Step,
    kept_between_segments,
    layer_bytes,
    plan_memory,
    plan_time,
)
from longspan.streaming import SegmentDone

MODEL = ["--model.dim", "64", "--model.num_heads", "2", "--model.hidden_dim", "56", "--data.vocab_size", "300"]
MODEL += ["--parallel.sp", "1", "--cluster.flops", "1e9"]
ALONE, DEVICE = MeshDegrees(), DeviceFigures(0, 1.0, 1e9, 1e9)
TOKENS = 96
DIVIDED = ["--parallel.dp_shard", "4", "--train.seq_len", "65536", "--train.batch_tokens", "262144"]
DIVIDED += ["--train.segment_tokens", "4096"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layers",
    [["--model.pattern", "LN"], ["--model.pattern", "mamba2", "kda", "softmax", "based", "--model.window", "9"]],
)
def test_what_is_kept_between_segments_is_what_the_model_remembers(layers: list[str], dtype: str) -> None:
    config = parse([*MODEL, *layers, "--train.dtype", dtype])
    model: Any = LinearLlama3(config.model.build(300))
    if dtype == "bfloat16":
        compute_in(model, torch.bfloat16)
    memory, segment = model.empty_memory(), TOKENS // 4
    states = numbers = reached = 0
    with torch.no_grad():
        for _ in range(3):
            tokens = torch.zeros(1, segment, dtype=torch.int64)
            _, memory = model(tokens, memory=memory, logits_to_keep=0, output_memory=True, in_segments=True)
            states = 4 * sum(x.nbytes for x in memory.tensors.values())
            made = [layer.earlier.last for layer in memory.layers if layer.earlier is not None]
            numbers += sum(part.k.numel() + part.v.numel() for part in made)
            # What the last segment sees, and sends gradients to.
            seen = [part for layer in memory.layers if layer.earlier is not None for part in layer.earlier.parts]
            reached = sum(part.k.numel() + part.v.numel() for part in seen)
    step = dataclasses.replace(step_of(config, ALONE), seq_len=TOKENS, segment_tokens=segment)
    want = states + numbers * step.number_bytes + 4 * reached
    assert kept_between_segments(sizes_of(config), step) == want > 0


def test_over_ranks_keys_and_values_are_divided_and_states_are_not() -> None:
    linear, softmax = (sizes_of(parse([*MODEL, "--model.pattern", kind])) for kind in ("L", "N"))
    step = Step(seq_len=4096, segment_tokens=1024)
    assert kept_between_segments(linear, step, 4) == kept_between_segments(linear, step)
    assert 4 * kept_between_segments(softmax, step, 4) == kept_between_segments(softmax, step)


def test_in_host_memory_keys_and_values_do_not_grow() -> None:
    sizes = sizes_of(parse([*MODEL, "--model.pattern", "N", "--model.num_kv_heads", "2"]))
    for length in (2**15, 2**20):
        # Two parts of 1,024 tokens, keys and values of 2 heads of 32, and their gradients.
        assert kept_between_segments(sizes, Step(length, segment_tokens=1024, offload=True)) == 4 * 1024 * 2 * 64 * 4


def test_host_memory_counts_where_the_device_has_its_own() -> None:
    options = [*MODEL, "--train.segment_tokens", "64", "--train.segment_offload", "True"]
    assert not step_of(parse(options), ALONE).offload
    assert step_of(parse([*options, "--cluster.device", "NVIDIA H200"]), ALONE).offload


def test_memory_of_linear_layers_grows_by_states_alone() -> None:
    sizes = sizes_of(parse([*MODEL, "--model.pattern", "L"]))
    short, long = (
        plan_memory(sizes, ALONE, Step(seq_len=length, segment_tokens=4096), DEVICE).kinds for length in (2**14, 2**20)
    )
    different = {name for name in short if short[name] != long[name]}
    assert different == {"between segments"}
    assert long["between segments"] == 64 * short["between segments"]
    every = Step(seq_len=2**20, segment_tokens=4096, memory_every=16)
    assert plan_memory(sizes, ALONE, every, DEVICE).kinds["between segments"] * 8 == long["between segments"]


def test_gradients_are_whole_until_the_last_segment_whoever_holds_the_weights() -> None:
    sizes = sizes_of(parse([*MODEL, "--model.pattern", "L"]))
    for mesh in (ALONE, MeshDegrees(dp_shard=2)):
        plan = plan_memory(sizes, mesh, Step(seq_len=2**16, segment_tokens=4096), DEVICE)
        assert plan.kinds["gradients"] == 4 * sizes.num_parameters


def test_gradients_that_each_segment_sums_are_a_share_and_a_layers() -> None:
    sizes, mesh = sizes_of(parse([*MODEL, "--model.pattern", "L"])), MeshDegrees(dp_shard=4)
    once = step_of(parse([*MODEL, *DIVIDED, "--train.segment_reduce_each", "False"]), mesh)
    each = step_of(parse([*MODEL, *DIVIDED, "--train.segment_reduce_each", "True"]), mesh)
    plan = plan_memory(sizes, mesh, each, DEVICE)
    assert plan.kinds["gradients"] == 4 * (-(-sizes.num_parameters // 4) + sizes.layer_parameters)
    assert plan_memory(sizes, mesh, once, DEVICE).kinds["gradients"] == 4 * sizes.num_parameters
    seconds = [
        plan_time(sizes, mesh, step, Operations(3e9, 0.0), DEVICE, stated_cluster("cpu", 4, 4)).gradients
        for step in (once, each)
    ]
    # 16 segments, each of which brings weights three times but for the last, and then sends gradients.
    assert seconds[1] / seconds[0] == pytest.approx((3 * 16 - 1 + 16) / (3 * 16 - 1 + 1), rel=0.05)


def test_one_segment_is_the_whole_sequence() -> None:
    sizes = sizes_of(parse([*MODEL, "--model.pattern", "LN"]))
    whole, one = Step(seq_len=4096), Step(seq_len=4096, segment_tokens=10_000)
    assert plan_memory(sizes, ALONE, one, DEVICE) == plan_memory(sizes, ALONE, whole, DEVICE)
    assert (one.num_segments, one.num_forward) == (1, 1.0)


@pytest.mark.parametrize("experts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_forward_passes_are_counted_as_they_are_made(experts: int) -> None:
    of_experts = ["--model.num_experts", str(experts), "--model.hidden_dim", "8"] if experts else []
    for num_segments, every in ((1, 1), (4, 1), (4, 2), (5, 2), (7, 3), (3, 9)):
        options = ["--train.seq_len", str(4 * num_segments), "--train.batch_tokens", str(4 * num_segments)]
        options += ["--train.segment_tokens", "4", "--train.segment_memory_every", str(every)]
        config = parse([*MODEL, "--model.pattern", "L", *of_experts, *options])
        tokens = torch.zeros(1, 4 * num_segments, dtype=torch.int64)
        heard: list[SegmentDone] = []
        streamed = stream(LinearLlama3(config.model.build(300)), 4, keep_every=every)
        streamed.forward_backward(tokens, tokens, between=heard.append)
        # Each pass, backward ones too, computes forward once.
        assert step_of(config, ALONE).num_forward == pytest.approx(len(heard) / num_segments)


def test_time_of_computing_grows_by_the_forward_passes() -> None:
    operations, cluster = Operations(3e9, 0.0), stated_cluster("cpu", 1, 1)
    sizes = sizes_of(parse([*MODEL, "--model.pattern", "L"]))
    times = [
        plan_time(sizes, ALONE, Step(seq_len=400, segment_tokens=tokens), operations, DEVICE, cluster).compute
        for tokens in (None, 100)
    ]
    assert times == [3.0, 3.75]


def test_a_segment_sends_what_a_sequence_of_its_length_does() -> None:
    sizes, mesh = sizes_of(parse([*MODEL, "--model.pattern", "LN"])), MeshDegrees(sp=4)
    got = layer_bytes(sizes, mesh, Step(seq_len=2**20, segment_tokens=8192))
    assert got == layer_bytes(sizes, mesh, Step(seq_len=8192))
    long, short = (plan_memory(sizes, mesh, Step(n, segment_tokens=8192), DEVICE).kinds for n in (2**20, 2**14))
    assert long["exchange"] == short["exchange"] > 0


def test_the_command_says_how_sequences_are_cut() -> None:
    options = ["--model.pattern", "L", "--train.seq_len", "65536", "--train.batch_tokens", "65536"]
    printed = report(parse([*MODEL, *options, "--train.segment_tokens", "8192"]))
    assert "in 8 segments of 8,192 tokens" in printed and "between segments" in printed
