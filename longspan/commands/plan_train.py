"""``longspan plan train``: memory of a rank and time of a step, for a mesh of any size, without starting one."""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from longspan.attention.softmax import softmax_attention
from longspan.commands.options import refuse
from longspan.commands.table import columns
from longspan.commands.units import bytes_per_second, seconds
from longspan.data.prepared import open_tokenizer_of
from longspan.data.tokenizer import BPE, BYTES, ByteTokenizer, open_tokenizer
from longspan.degrees import MeshDegrees
from longspan.errors import ConfigError, LongspanError
from longspan.launch import EXIT_DONE
from longspan.models import LinearLlama3
from longspan.models.block import HybridBlock
from longspan.models.counts import on_meta
from longspan.ops.chunked.cross_entropy import chunk_size_of
from longspan.plan import Cluster, Link
from longspan.plan.activations import MixerSizes, ModelSizes, block_bytes, state_bytes
from longspan.plan.devices import stated_peak_flops
from longspan.plan.stated import gpu_cluster, stated_cluster
from longspan.plan.training import (
    DeviceFigures,
    MemoryPlan,
    Operations,
    Step,
    TimePlan,
    layer_bytes,
    plan_memory,
    plan_time,
)
from longspan.train.config import Config, DataConfig, check_arguments, read_toml, take_preset
from longspan.train.config_checks import check, check_degrees, num_ranks_asked_for
from longspan.train.memory import release_freed_memory
from longspan.train.model import compute_dtype
from longspan.train.rate import operations_of_model

_DESCRIPTION = """Memory of a rank by kind, bytes sent per layer, and time of a step, for a mesh of any size: arithmetic, no ranks.

Takes the options of longspan train (--config FILE.toml, --model.preset linear-llama3-8b, --parallel.sp 64, --train.seq_len 1048576,
...), which say what is trained and on which mesh, and those of cluster, which say on what. The vocabulary is that of
data.prepared, of bytes or of a tokenizer.json, which must be here, or else data.vocab_size. A sequence is taken for one document:
softmax attention within several shorter ones takes less time. docs/performance.md has plans beside measurements.
"""

# Of a process on the CPU, by measurements in docs/performance.md ("Memory against length").
_CPU_BASE_BYTES = 465 * 2**20
_CPU_SLACK = 1.07
# Where freed memory is kept for some steps, there are holes as well.
_CPU_SLACK_WITH_HOLES = 1.42
# Between ranks that exchange, what is sent and received lies between layers' tensors, and leaves larger ones.
_CPU_SLACK_WITH_HOLES_OF_RANKS = 1.70
# What PyTorch allocates on a GPU for itself is little; its caching allocator reuses what was freed. Not measured.
_GPU_BASE_BYTES = 0
_GPU_SLACK = 1.05
# Of the sequences that are timed for the rate of this CPU.
_MODEL_TOKENS, _ATTENTION_TOKENS = 4096, 8192


@dataclass(frozen=True)
class ClusterConfig:
    """The machines of the plan, which need not be here. Rates have units, 400gbit or 45GB a second, and so have times, 15us."""

    device: str = "cpu"
    """cpu, or the name of a GPU as torch.cuda.get_device_name gives it, such as "NVIDIA H200"."""
    ranks_per_node: int = 8
    """Ranks that share a machine."""
    flops: float | None = None
    """Operations of the model that a rank computes a second; None takes `share` of a GPU's peak, and measures this CPU."""
    share: float = 0.4
    """Share of a GPU's peak that training reaches."""
    intra_bandwidth: str | None = None
    """Of one rank to others of its machine, a second, such as 300GB; None takes the figures of longspan plan exchange."""
    inter_bandwidth: str | None = None
    """Of one rank to other machines, a second, such as 400gbit."""
    latency: str | None = None
    """Of a message, such as 15us."""


@dataclass(frozen=True)
class PlanConfig(Config):
    """A training run, and the machines that it is planned for."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)


def run(arguments: Sequence[str]) -> int:
    """Print the plan that the arguments ask for, and return the exit code."""
    try:
        sys.stdout.write(report(_with_its_vocabulary(parse(arguments))))
    except LongspanError as error:
        return refuse(error)
    return EXIT_DONE


def parse(arguments: Sequence[str]) -> PlanConfig:
    """What the arguments of ``longspan plan train`` ask for.

    Raises:
        ConfigError: for an unknown option, or a config file that does not fit.
    """
    import tyro

    remaining, default = list(arguments), Config()
    for place, argument in enumerate(remaining):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals and place + 1 == len(remaining):
                raise ConfigError("--config needs a file: --config FILE.toml")
            default = read_toml(Path(value if equals else remaining[place + 1]))
            del remaining[place : place + (1 if equals else 2)]
            break
    own = [f"cluster.{entry.name}" for entry in dataclasses.fields(ClusterConfig)]
    check_arguments(remaining, others=("help", "config", "model.preset", *own))
    remaining, default = take_preset(remaining, default)
    return tyro.cli(
        PlanConfig,
        prog="longspan plan train",
        description=_DESCRIPTION,
        default=PlanConfig(**vars(default)),
        args=remaining,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )


def _with_its_vocabulary(config: PlanConfig) -> PlanConfig:
    """The config that asks for the vocabulary which the run will find in its data or its tokenizer.

    Raises:
        ConfigError: for values that do not fit each other.
        DataError: for prepared data or a tokenizer that is not here, or cannot be read.
    """
    check(config)
    data = config.data
    if data.task != "text":
        return config
    if data.prepared is not None:
        size = open_tokenizer_of(Path(data.prepared)).vocab_size
    elif data.tokenizer == BYTES:
        size = ByteTokenizer().vocab_size
    elif data.tokenizer != BPE:
        size = open_tokenizer(Path(data.tokenizer), data.end_of_document)[0].vocab_size
    else:
        return config
    # Of the data the plan needs the size alone, which is not one to train a BPE to.
    return dataclasses.replace(config, data=DataConfig(tokenizer=BYTES, vocab_size=size))


def plan(config: PlanConfig) -> tuple[MemoryPlan, TimePlan]:
    """The memory of a rank and the time of a step; where the rate of this CPU is not given, it is measured.

    Raises:
        ConfigError: for values that do not fit each other.
    """
    mesh = _mesh_of(config)
    sizes, step = sizes_of(config), step_of(config, mesh)
    device, _ = device_figures(config)
    return plan_memory(sizes, mesh, step, device), _planned_time(config, mesh, device)


def _planned_time(config: PlanConfig, mesh: MeshDegrees, device: DeviceFigures) -> TimePlan:
    sizes, step = sizes_of(config), step_of(config, mesh)
    return plan_time(sizes, mesh, step, operations_of_sequence(config), device, cluster_of(config, mesh.world_size))


def _mesh_of(config: PlanConfig) -> MeshDegrees:
    check(config)
    cluster = config.cluster
    if cluster.ranks_per_node < 1:
        raise ConfigError(f"cluster.ranks_per_node is {cluster.ranks_per_node}; it must be at least 1")
    for name, value in (("flops", cluster.flops), ("share", cluster.share)):
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigError(f"cluster.{name} is {value}; it must be a finite number greater than 0")
    if cluster.share > 1.0:
        raise ConfigError(f"cluster.share is {cluster.share}; it must be at most 1, the whole of a GPU's peak")
    return check_degrees(config, num_ranks_asked_for(config))


def report(config: PlanConfig) -> str:
    """What the command prints.

    Raises:
        ConfigError: for values that do not fit each other.
    """
    mesh = _mesh_of(config)
    sizes, step = sizes_of(config), step_of(config, mesh)
    device, source = device_figures(config)
    memory = plan_memory(sizes, mesh, step, device)
    timing = _planned_time(config, mesh, device)
    return "\n".join(
        [
            f"{sizes.num_parameters:,} parameters{_active(config)}, vocabulary {sizes.vocab_size:,}; {mesh.world_size} ranks: "
            f"dp_replicate {mesh.dp_replicate} x dp_shard {mesh.dp_shard} x sp {mesh.sp}"
            f"{', weights divided over sp, too' if mesh.shard_over_sp else ''}",
            f"a rank computes {step.num_micro_batches} x {step.rows} sequences of {step.seq_len:,} tokens a step, "
            f"{step.tokens_of_rank(mesh.sp) // step.rows:,} tokens of each{_shares(config)}, in {config.train.dtype}"
            + (", layers recomputed" if step.recompute else "")
            + _segments(step),
            "",
            _memory_table(memory),
            _layer_table(sizes, mesh, step),
            _time_lines(timing, config.train.batch_tokens, source),
        ]
    )


def _segments(step: Step) -> str:
    """How sequences are cut in time, where they are."""
    if step.segment_tokens is None:
        return ""
    return f", in {step.num_segments:,} segments of {min(step.segment_tokens, step.seq_len):,} tokens"


def _shares(config: Config) -> str:
    if config.parallel.balance == ("even",) or config.parallel.sp == 1:
        return ""
    if config.parallel.weights is None:
        return " (equal shares: no rank is here to be measured)"
    return " (the rank with most, which is taken for the fastest)"


def _active(config: Config) -> str:
    """How many parameters a token meets, where it does not meet all."""
    full = config.model.build(config.data.vocab_size)
    if not full.num_experts:
        return ""
    return f" ({on_meta(full).num_active_parameters():,} active)"


def sizes_of(config: Config) -> ModelSizes:
    """The sizes of the config's model; no weight is made.

    Raises:
        ConfigError: for a mixer that does not say what it takes.
    """
    full = config.model.build(config.data.vocab_size)
    model, table = on_meta(full), full.vocab_size * full.dim
    blocks = dict(zip(full.layer_operators, _blocks(model), strict=True))
    mixers: dict[str, MixerSizes] = {}
    for name, block in blocks.items():
        footprint = block.mixer.footprint()
        if footprint is None:
            raise ConfigError(
                f"the mixer {name!r} does not say what it keeps for backward: give it a `footprint`, as longspan/models/mixers have"
            )
        mixers[name] = footprint
    return ModelSizes(
        dim=full.dim,
        hidden_dim=full.hidden_dim,
        kv_heads=full.kv_heads,
        head_dim=full.size_of_head,
        vocab_size=full.vocab_size,
        operators=full.layer_operators,
        mixers=mixers,
        num_parameters=model.num_parameters(),
        layer_parameters=max(sum(p.numel() for p in block.parameters()) for block in blocks.values()),
        matrix_parameters=table + sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1),
        loss_chunk=chunk_size_of(full.vocab_size),
        feed_forward_chunk=full.feed_forward_chunk,
        num_experts=full.num_experts,
        experts_per_token=full.experts_per_token,
        num_shared_experts=full.num_shared_experts,
        window=full.window,
    )


def _blocks(model: LinearLlama3) -> list[HybridBlock]:
    return [block for block in model.blocks if isinstance(block, HybridBlock)]


def step_of(config: Config, mesh: MeshDegrees) -> Step:
    """What a rank of the mesh computes in a step of the config."""
    rows = config.batch_sequences // mesh.data
    at_once = min(config.train.micro_batch_sequences or rows, rows)
    weights = config.parallel.weights
    return Step(
        seq_len=config.train.seq_len,
        rows=at_once,
        num_micro_batches=-(-rows // at_once),
        number_bytes=4 if compute_dtype(config) is None else 2,
        recompute=config.train.recompute != "none",
        segments_per_rank=2 if config.parallel.order == "zigzag" and mesh.sp > 1 else 1,
        largest_share=None if weights is None else max(weights) / sum(weights),
        segment_tokens=config.train.segment_tokens,
        memory_every=config.train.segment_memory_every,
        offload=config.train.segment_offload and isinstance(config, PlanConfig) and config.cluster.device != "cpu",
        counts_first=config.train.segment_tokens is not None and config.model.num_experts > 0,
        reduce_each=config.train.segment_reduce_each,
    )


def operations_of_sequence(config: Config, seq_len: int | None = None) -> Operations:
    """Operations of the model for one sequence of `seq_len` tokens, the config's own if None."""
    return operations_of_model(
        config.model.build(config.data.vocab_size), config.train.seq_len if seq_len is None else seq_len
    )


def device_figures(config: PlanConfig) -> tuple[DeviceFigures, str]:
    """What a rank's device takes and reaches, and where its rate comes from.

    Raises:
        ConfigError: for a GPU whose peak is not listed, where no rate is given.
    """
    cluster = config.cluster
    on_cpu = cluster.device == "cpu"
    base, slack = _GPU_BASE_BYTES, _GPU_SLACK
    if on_cpu:
        base = _CPU_BASE_BYTES
        with_holes = _CPU_SLACK_WITH_HOLES if _mesh_of(config).world_size == 1 else _CPU_SLACK_WITH_HOLES_OF_RANKS
        slack = _CPU_SLACK if config.run.release_memory_every == 1 else with_holes
    if cluster.flops is not None:
        return DeviceFigures(base, slack, cluster.flops, cluster.flops), "cluster.flops"
    if on_cpu:
        return DeviceFigures(base, slack, *measure_flops(config)), "this CPU, measured on short sequences"
    peak = stated_peak_flops(cluster.device, compute_dtype(config) or torch.float32)
    if peak is None:
        raise ConfigError(
            f"cluster.device {cluster.device!r} has no peak in the table of longspan/plan/devices.py. Give what a rank computes a "
            "second: --cluster.flops 2e14"
        )
    reached = peak * cluster.share
    return DeviceFigures(base, slack, reached, reached), f"{cluster.share:.0%} of the peak of {cluster.device}"


def measure_flops(config: Config) -> tuple[float, float]:
    """Operations a second on one rank of this CPU, of the config's model: those of softmax attention, as second, and all others.

    Attention is timed by itself on a long sequence, the whole model on a short one, of which attention then is a small part.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.parallel.threads or 1)
    try:
        short, long = (min(tokens, config.train.seq_len) for tokens in (_MODEL_TOKENS, _ATTENTION_TOKENS))
        operations = operations_of_sequence(config, short)
        seconds = _seconds_of_model(config, short)
        if not operations.attention:
            return operations.rest / seconds, operations.rest / seconds
        attention = operations_of_sequence(config, long).attention / _seconds_of_attention(config, long)
    finally:
        torch.set_num_threads(threads)
    # Where attention by itself takes longer than within the model, there is one rate.
    rest = seconds - operations.attention / attention
    if rest <= 0:
        return operations.total / seconds, operations.total / seconds
    return operations.rest / rest, attention


def _seconds_of_model(config: Config, tokens: int) -> float:
    """Of a forward and a backward on one sequence."""
    model = LinearLlama3(config.model.build(config.data.vocab_size))
    # Tokens all alike would make numbers that are quicker to compute with.
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(config.data.vocab_size, (1, tokens), generator=random)

    def step() -> None:
        model(rows, labels=rows).backward()
        model.zero_grad(set_to_none=True)
        if config.run.release_memory_every == 1:
            # As the run does; getting it again takes a tenth of a step.
            release_freed_memory()

    return _usual(step)


def _seconds_of_attention(config: Config, tokens: int) -> float:
    """Of all softmax layers' attention on one sequence, forward and backward."""
    full = config.model.build(config.data.vocab_size)
    q, k, v = (
        torch.randn(1, tokens, num_heads, full.size_of_head, requires_grad=True)
        for num_heads in (full.num_heads, full.kv_heads, full.kv_heads)
    )

    def step() -> None:
        softmax_attention(q, k, v, window=full.window).sum().backward()

    return full.layer_operators.count("softmax") * _usual(step)


def _usual(step: Callable[[], None]) -> float:
    """Seconds of a call: the median of three, after one that finds memory cold."""
    seconds = []
    for _ in range(4):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds[1:])


def cluster_of(config: PlanConfig, num_ranks: int) -> Cluster:
    """The machines of the plan.

    Raises:
        LongspanError: for numbers that make none.
    """
    given = config.cluster
    per_node = min(given.ranks_per_node, num_ranks)
    if num_ranks % per_node:
        most = next(size for size in range(per_node, 0, -1) if num_ranks % size == 0)
        raise ConfigError(
            f"{num_ranks} ranks do not make machines of cluster.ranks_per_node {per_node} ranks each. The most up to there that "
            f"do are {most}"
        )
    kind: Literal["cpu", "cuda"] = "cpu" if given.device == "cpu" else "cuda"
    cluster = stated_cluster(kind, num_ranks, per_node) if kind == "cpu" else gpu_cluster(num_ranks, per_node)

    def changed(link: Link, bandwidth: str | None) -> Link:
        if bandwidth is not None:
            link = dataclasses.replace(link, bandwidth=bytes_per_second(bandwidth))
        return link if given.latency is None else dataclasses.replace(link, latency=seconds(given.latency))

    return dataclasses.replace(
        cluster,
        intra=changed(cluster.intra, given.intra_bandwidth),
        inter=changed(cluster.inter, given.inter_bandwidth),
    )


def _memory_table(plan: MemoryPlan) -> str:
    rows = [[name, f"{num_bytes / 2**20:,.0f}"] for name, num_bytes in plan.kinds.items()]
    return columns(["memory of a rank", "MiB"], [*rows, ["all, at most", f"{plan.total / 2**20:,.0f}"]])


def _layer_table(sizes: ModelSizes, mesh: MeshDegrees, step: Step) -> str:
    tokens = step.tokens_at_once(mesh.sp)
    sent = layer_bytes(sizes, mesh, step)
    rows = []
    for name in dict.fromkeys(sizes.operators):
        kept = block_bytes(sizes, name, tokens, step.number_bytes)
        kept += state_bytes(sizes, name, tokens, step.number_bytes, step.segments_per_rank)
        rows.append([name, str(sizes.operators.count(name)), f"{kept / 2**20:,.1f}", f"{sent[name] / 2**20:,.3f}"])
    return columns(["layer", "layers", "MiB kept", "MiB sent"], rows)


def _time_lines(plan: TimePlan, batch_tokens: int, source: str) -> str:
    return (
        f"a step: {plan.total:.3g} s = {plan.compute:.3g} s computing ({source}) + {plan.exchange:.3g} s exchanging in layers, "
        f"hidden where there is something to compute + {plan.gradients:.3g} s for weights and gradients\n"
        f"tokens/s of all ranks: {batch_tokens / plan.total:,.0f}\n"
    )
