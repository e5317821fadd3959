"""The plan of a training step: what layers keep is counted again on real ones, and the rest adds up as it must."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longspan.cli import main
from longspan.commands import plan_train
from longspan.commands.plan_train import operations_of_sequence, parse, sizes_of, step_of
from longspan.data.tokenizer import END_OF_DOCUMENT
from longspan.degrees import MeshDegrees
from longspan.errors import ConfigError
from longspan.layout import SequenceLayout
from longspan.models import MIXERS, LinearLlama3
from longspan.ops.chunked.cross_entropy import chunked_cross_entropy
from longspan.parallel import compute_in
from longspan.plan.activations import block_bytes, kept_loss_bytes, loss_bytes, mixer_bytes, outside_bytes, state_bytes
from longspan.plan.stated import stated_cluster
from longspan.plan.training import DeviceFigures, Step, layer_bytes, plan_memory, plan_time
from longspan.train.config import Config
from tests.train.tiny import write_corpus

TOKENS = 512
SIZES = ["--model.dim", "72", "--model.num_heads", "3", "--model.head_dim", "20", "--model.hidden_dim", "56"]
MODEL = [*SIZES, "--data.vocab_size", "300", "--parallel.sp", "1"]


def saved_bytes(model: LinearLlama3, num_tokens: int) -> int:
    """Bytes that autograd saves of a forward with its loss, parameters apart."""
    known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
        loss = model(tokens, layout=SequenceLayout.local(num_tokens), labels=tokens)
    del loss
    return sum(storage.nbytes() for storage in found.values())


def kept_of_layers(mixer: str, dtype: str, num_layers: int) -> tuple[int, Config]:
    """Bytes that autograd saves for `TOKENS` tokens of a model of such layers, and its config."""
    config = parse([*MODEL, "--model.pattern", mixer, "--model.num_layers", str(num_layers), "--train.dtype", dtype])
    model = LinearLlama3(config.model.build(config.data.vocab_size))
    if dtype == "bfloat16":
        compute_in(model, torch.bfloat16)
    # The difference of two lengths: copies of weights do not depend on them.
    return saved_bytes(model, 2 * TOKENS) - saved_bytes(model, TOKENS), config


# What is wider in float32 is of the same kind in all.
@pytest.mark.slow_rows(r"^(?!softmax|simple_gla|kda|mamba2).*-bfloat16$")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(simple_gla|kda|softmax)-bfloat16$")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_what_a_layer_keeps_is_what_autograd_saves(mixer: str, dtype: str) -> None:
    counted, config = kept_of_layers(mixer, dtype, 2)
    number_bytes = 4 if dtype == "float32" else 2
    sizes = sizes_of(config)
    layer = block_bytes(sizes, mixer, TOKENS, number_bytes)
    layer += state_bytes(sizes, mixer, 2 * TOKENS, number_bytes) - state_bytes(sizes, mixer, TOKENS, number_bytes)
    if mixer in ("hgrn2", "rwkv7"):
        # The first of its layers has no bound, or takes no values, and keeps less: the plan takes it for one of the others.
        assert kept_of_layers(mixer, dtype, 3)[0] - counted == pytest.approx(layer, rel=0.002)
        return
    loss = kept_loss_bytes(sizes, 2 * TOKENS, number_bytes) - kept_loss_bytes(sizes, TOKENS, number_bytes)
    # Labels are not saved, but held.
    expected = 2 * layer + outside_bytes(sizes, TOKENS) + loss - 8 * TOKENS
    assert counted == pytest.approx(expected, rel=0.002)


def test_a_feed_forward_layer_in_chunks_keeps_nothing_of_its_width() -> None:
    pattern = ["--model.pattern", "L", "--model.num_layers", "2", "--model.feed_forward_chunk"]
    saved, planned = [], []
    for chunk in ("0", "100"):
        config = parse([*MODEL, *pattern, chunk])
        saved.append(saved_bytes(LinearLlama3(config.model.build(config.data.vocab_size)), TOKENS))
        planned.append(2 * block_bytes(sizes_of(config), "simple_gla", TOKENS, 4))
    assert saved[0] - saved[1] == planned[0] - planned[1] == 2 * 4 * 56 * 4 * TOKENS


# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^(0-bfloat16|100-float32)$")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", ["0", "100"])
def test_what_a_layer_of_experts_keeps_is_what_autograd_saves(chunk: str, dtype: str) -> None:
    experts = ["--model.num_experts", "6", "--model.experts_per_token", "3", "--model.num_shared_experts", "2"]
    layers = ["--model.pattern", "L", "--model.num_layers", "2", "--model.feed_forward_chunk", chunk]
    config = parse([*MODEL, *experts, *layers, "--train.dtype", dtype])
    model = LinearLlama3(config.model.build(config.data.vocab_size))
    number_bytes = 4 if dtype == "float32" else 2
    if dtype == "bfloat16":
        compute_in(model, torch.bfloat16)
    counted = saved_bytes(model, 2 * TOKENS) - saved_bytes(model, TOKENS)
    sizes = sizes_of(config)
    layer = block_bytes(sizes, "simple_gla", TOKENS, number_bytes)
    layer += state_bytes(sizes, "simple_gla", 2 * TOKENS, number_bytes)
    layer -= state_bytes(sizes, "simple_gla", TOKENS, number_bytes)
    loss = kept_loss_bytes(sizes, 2 * TOKENS, number_bytes) - kept_loss_bytes(sizes, TOKENS, number_bytes)
    expected = 2 * layer + outside_bytes(sizes, TOKENS) + loss - 8 * TOKENS
    assert counted == pytest.approx(expected, rel=0.01)


# Products in bfloat16 copy matrices into an order of their own on some processors.
@pytest.mark.parametrize(("number_bytes", "tolerance"), [(4, 0.05), (2, 0.15)])
def test_the_loss_takes_what_its_chunks_do(number_bytes: int, tolerance: float) -> None:
    """As counted by PyTorch's profiler of memory: the most that is held at once, in forward or in backward."""
    sizes = dataclasses.replace(sizes_of(parse([*MODEL])), vocab_size=3000, loss_chunk=200)
    dtype = torch.float32 if number_bytes == 4 else torch.bfloat16
    hidden = torch.randn(2000, sizes.dim, dtype=dtype, requires_grad=True)
    weight = torch.randn(3000, sizes.dim, dtype=dtype, requires_grad=True)
    labels = torch.arange(2000)

    def step() -> None:
        chunked_cross_entropy(hidden, weight, labels, chunk_size=200).backward()

    assert most_held(step) == pytest.approx(loss_bytes(sizes, 2000, number_bytes), rel=tolerance)


def most_held(step: Callable[[], None]) -> int:
    """The most bytes that tensors made in `step` take at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_a_mixer_that_does_not_say_what_it_keeps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MIXERS["gla"], "footprint", lambda self: None)
    with pytest.raises(
        ConfigError, match="the mixer 'gla' does not say what it keeps for backward: give it a `footprint`"
    ):
        sizes_of(parse([*MODEL, "--model.operator", "gla"]))


def test_the_main_jobs_layer_takes_what_it_took() -> None:
    sizes = sizes_of(parse([*MODEL, "--model.pattern", "L"]))
    heads, channels = 3, 60
    assert mixer_bytes(sizes, "simple_gla", 7, 4) == 7 * 4 * (13 * channels + 4 * heads)
    assert mixer_bytes(sizes, "simple_gla", 7, 2) == 7 * (2 * 7 * channels + 4 * (6 * channels + 4 * heads))
    assert state_bytes(sizes, "simple_gla", 640, 4) == 11 * 4 * channels * 20
    assert state_bytes(sizes, "simple_gla", 640, 2, 2) == 7 * 4 * channels * 20


@pytest.mark.parametrize("experts", [(), ("--model.num_experts", "6", "--model.num_shared_experts", "1")])
@pytest.mark.parametrize("tied", ["True", "False"])
def test_parameters_and_operations_are_those_of_the_model(tied: str, experts: tuple[str, ...]) -> None:
    layers = ["--model.num_layers", "3", "--model.pattern", "LNL", "--model.operator", "gla", "kda", *experts]
    config = parse([*MODEL, *layers, "--model.tie_embeddings", tied])
    model = LinearLlama3(config.model.build(config.data.vocab_size))
    assert sizes_of(config).num_parameters == model.num_parameters()
    expected = model.flops_per_token(config.train.seq_len) * config.train.seq_len
    operations = operations_of_sequence(config)
    assert operations.total == pytest.approx(expected)
    longer = operations_of_sequence(config, 2 * config.train.seq_len)
    assert longer.rest == pytest.approx(2 * operations.rest)
    assert longer.attention == pytest.approx(4 * operations.attention)


def test_attention_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_rate = 7e8

    def seconds_of_model(config: Config, tokens: int) -> float:
        operations = operations_of_sequence(config, tokens)
        return operations.rest / 3e9 + operations.attention / 7e8

    def seconds_of_attention(config: Config, tokens: int) -> float:
        return operations_of_sequence(config, tokens).attention / attention_rate

    monkeypatch.setattr(plan_train, "_seconds_of_model", seconds_of_model)
    monkeypatch.setattr(plan_train, "_seconds_of_attention", seconds_of_attention)
    sizes = [*MODEL, "--train.seq_len", "8192"]
    assert plan_train.measure_flops(parse(sizes)) == pytest.approx((3e9, 7e8))
    assert plan_train.measure_flops(parse([*sizes, "--model.pattern", "L"])) == pytest.approx((3e9, 3e9))
    # Slower by itself than the whole model: one rate, at which the model takes the time that it took.
    attention_rate = 1e7
    config = parse(sizes)
    operations = operations_of_sequence(config, 4096)
    together = operations.total / seconds_of_model(config, 4096)
    assert plan_train.measure_flops(config) == pytest.approx((together, together))


def test_what_is_timed_is_the_attention_of_all_softmax_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse([*MODEL, "--model.pattern", "LN", "--model.num_layers", "6"])
    assert plan_train._seconds_of_attention(config, 64) > 0
    monkeypatch.setattr(plan_train, "_usual", lambda step: 1.0)
    assert plan_train._seconds_of_attention(config, 64) == 3.0


def test_memory_that_is_kept_for_some_steps_has_holes() -> None:
    options = ["--cluster.flops", "1e9", "--parallel.sp"]
    every = "--run.release_memory_every"
    of_ranks, of_one, given_back = (
        plan_train.device_figures(parse([*options, sp, every, steps]))[0].slack
        for sp, steps in (("2", "8"), ("1", "8"), ("2", "1"))
    )
    assert of_ranks > of_one > given_back > 1


def test_the_time_of_a_step_adds_up() -> None:
    config = parse([*MODEL, "--train.seq_len", "8192"])
    operations = operations_of_sequence(config)
    device = DeviceFigures(base_bytes=0, slack=1.0, flops=1e9, attention_flops=1e8)
    planned = plan_time(
        sizes_of(config), MeshDegrees(sp=4), Step(8192, rows=3), operations, device, stated_cluster("cpu", 4, 4)
    )
    assert planned.compute == pytest.approx(3 / 4 * (operations.rest / 1e9 + operations.attention / 1e8))
    assert planned.total > planned.compute


DEVICE = DeviceFigures(base_bytes=1000, slack=1.0, flops=1e9, attention_flops=1e9)


def test_a_mesh_divides_what_it_says() -> None:
    config = parse(["--train.seq_len", "65536", "--train.batch_tokens", "65536"])
    sizes = sizes_of(config)
    whole = plan_memory(sizes, MeshDegrees(), Step(65536), DEVICE).kinds
    split = plan_memory(sizes, MeshDegrees(sp=4), Step(65536), DEVICE).kinds
    assert split["activations"] == pytest.approx(whole["activations"] / 4)
    # A chunk of logits and the gradient of the matrix are the same on every rank.
    assert whole["logits and loss"] - split["logits and loss"] == 0.75 * 65536 * sizes.dim * 4
    # With all logits, their log-probabilities, the gradient of these and their own would be there at once.
    assert whole["logits and loss"] < 0.2 * 3 * 65536 * sizes.vocab_size * 4
    assert split["weights"] == whole["weights"] == 4 * sizes.num_parameters
    assert split["exchange"] > 0 == whole["exchange"]
    shared = plan_memory(sizes, MeshDegrees(sp=4, dp_shard=2, shard_over_sp=True), Step(65536), DEVICE).kinds
    assert shared["optimizer"] == pytest.approx(whole["optimizer"] / 8, rel=1e-3)
    recomputed = plan_memory(sizes, MeshDegrees(), Step(65536, recompute=True), DEVICE)
    assert recomputed.kinds["activations"] < 0.4 * whole["activations"]
    assert recomputed.total < sum(whole.values())


def test_a_large_model_on_few_tokens_is_fullest_as_the_optimizer_steps() -> None:
    sizes = sizes_of(parse(["--model.dim", "1024", "--model.hidden_dim", "4096", "--model.num_heads", "8"]))
    plan = plan_memory(sizes, MeshDegrees(), Step(16), DEVICE)
    assert plan.kinds["gradients"] == 4 * sizes.num_parameters
    assert plan.total == 1000 + 16 * sizes.num_parameters


def test_a_layer_sends_what_its_all_gathers_do() -> None:
    sizes = sizes_of(parse([]))
    sent = layer_bytes(sizes, MeshDegrees(sp=4), Step(8192))
    assert sent["softmax"] == 2 * 3 * 2 * sizes.kv_heads * sizes.head_dim * 2048 * 4
    assert sent["simple_gla"] == 2 * 3 * 2 * 64**2 * 4
    assert set(layer_bytes(sizes, MeshDegrees(), Step(8192)).values()) == {0}
    config = parse(["--model.pattern", "mamba2", "gated_deltanet"])
    sent = layer_bytes(sizes_of(config), MeshDegrees(sp=4), Step(8192, number_bytes=2, segments_per_rank=2))
    # States both ways, three tokens of the convolution's channels both ways; a delta rule's transitions forward.
    assert sent["mamba2"] == 2 * (2 * 3 * 4 * 128 * 64 * 4 + 2 * 3 * (4 * 64 + 256) * 2)
    assert sent["gated_deltanet"] == 2 * (3 * (2 * 2 * 64 * 128 + 2 * 64 * 64) * 4 + 2 * 3 * (4 * 128) * 2)


def test_a_step_is_cut_into_micro_batches() -> None:
    config = parse(["--train.batch_tokens", "65536", "--train.micro_batch_sequences", "3", "--parallel.sp", "2"])
    step = step_of(config, MeshDegrees(sp=2))
    assert (step.rows, step.num_micro_batches, step.segments_per_rank) == (3, 3, 2)


def test_the_command_plans_what_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = [
        "--parallel.sp",
        "512",
        "--parallel.dp_shard",
        "8",
        "--train.seq_len",
        "1048576",
        "--train.batch_tokens",
        "8388608",
    ]
    assert main(["plan", "train", *mesh, "--cluster.device", "NVIDIA H200", "--train.dtype", "bfloat16"]) == 0
    shown = capsys.readouterr().out
    assert "4096 ranks: dp_replicate 1 x dp_shard 8 x sp 512" in shown
    assert "2,048 tokens of each, in bfloat16" in shown
    assert "40% of the peak of NVIDIA H200" in shown


def test_a_plan_of_experts_has_all_weights_and_counts_those_that_compute(capsys: pytest.CaptureFixture[str]) -> None:
    experts = ["--model.num_experts", "8", "--cluster.flops", "1e9"]
    assert main(["plan", "train", *experts]) == 0
    many = sizes_of(parse(experts))
    dense = sizes_of(parse([]))
    one = 3 * dense.dim * dense.hidden_dim
    assert many.num_parameters == dense.num_parameters + 4 * (7 * one + 8 * dense.dim)
    assert many.matrix_parameters == dense.matrix_parameters + 4 * (7 * one + 8 * dense.dim)
    active = dense.num_parameters + 4 * (one + 8 * dense.dim)
    assert (
        f"{many.num_parameters:,} parameters ({active:,} active), vocabulary 2,048; 2 ranks" in capsys.readouterr().out
    )


@pytest.mark.parametrize("kind", ["bytes", "prepared", "tokenizer"])
def test_a_plan_has_the_vocabulary_of_what_is_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Of data that was prepared, and of a tokenizer that exists: neither is as large as data.vocab_size says."""
    data = tmp_path / "data"
    text = ["--source", str(write_corpus(tmp_path / "text")), "--validation-fraction", "0.2"]
    assert main(["prepare", str(data), *text, "--vocab-size", "270", "--tokenizer", "bpe"]) == 0
    options, size = {
        "bytes": (["--data.tokenizer", "bytes"], 257),
        "prepared": (["--data.prepared", str(data)], 270),
        "tokenizer": (
            ["--data.tokenizer", str(data / "tokenizer.json"), "--data.end_of_document", END_OF_DOCUMENT],
            270,
        ),
    }[kind]
    capsys.readouterr()
    assert main(["plan", "train", *SIZES, *options, "--cluster.flops", "1e9"]) == 0
    want = sizes_of(parse([*SIZES, "--data.vocab_size", str(size)])).num_parameters
    assert f"{want:,} parameters, vocabulary {size}; 2 ranks" in capsys.readouterr().out


def test_prepared_data_that_is_not_here_is_said_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train", "--data.prepared", str(tmp_path / "data")]) == 2
    assert f"{tmp_path / 'data'} " in capsys.readouterr().err


def test_the_rate_of_this_cpu_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train", *MODEL, "--train.seq_len", "64", "--train.batch_tokens", "64"]) == 0
    assert "this CPU, measured on short sequences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster.device", "Abacus"], "has no peak in the table"),
        (["--cluster.flops", "-1"], "cluster.flops is -1.0; it must be a finite number greater than 0"),
        (["--cluster.share", "0"], "cluster.share is 0.0; it must be a finite number greater than 0"),
        (["--cluster.share", "1.5"], "cluster.share is 1.5; it must be at most 1"),
        (["--cluster.ranks_per_node", "0"], "cluster.ranks_per_node is 0; it must be at least 1"),
        (
            ["--parallel.sp", "12", "--cluster.flops", "1e9"],
            "12 ranks do not make machines of cluster.ranks_per_node 8 ranks each. The most up to there that do are 6",
        ),
        (["--cluster.flop", "1"], "did you mean --cluster.flops?"),
        (["--parallel.sp", "9000"], "is shorter than parallel.sp 9000"),
        (["--config"], "--config needs a file"),
        (["--cluster.flops", "1e9", "--cluster.latency", "15"], "15"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["plan", "train", *arguments]) == 2
    assert message in capsys.readouterr().err
