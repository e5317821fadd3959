"""The sections of the run itself: [optim], [train], [validation], [checkpoint], [sample] and [run]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, warm-up and cosine."""

    lr: float = 3e-3
    """Highest learning rate."""
    warmup_steps: int = 15
    """Steps until the highest learning rate."""
    final_lr_fraction: float = 0.1
    """Learning rate of the last step, as a fraction of the highest."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean of squared gradients."""
    weight_decay: float = 0.1
    """Decoupled decay, of matrices alone."""
    clip_norm: float = 1.0
    """Scale gradients down to this norm."""


@dataclass(frozen=True)
class TrainConfig:
    """Length of the run and of its sequences."""

    seed: int = 0
    """Decides the initial weights, the data's split and order, and the sampled text."""
    init: str | None = None
    """A run folder whose newest weights this run begins with, such as longspan import makes; None draws them from the seed."""
    steps: int = 150
    """Optimizer steps."""
    seq_len: int = 8192
    """Tokens of a sequence, before it is split over the ranks."""
    batch_tokens: int = 8192
    """Tokens of a global batch, whatever the number of ranks."""
    micro_batch_sequences: int | None = None
    """Sequences that a rank computes at once; None takes all of its part of the batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What layers compute in. Weights, gradients' sums and the optimizer are float32, and so are memory states."""
    segment_tokens: int | None = None
    """Compute sequences in segments of so many tokens, with the activations of one and the whole's gradients; None does not."""
    segment_memory_every: int = 1
    """Keep what enters every n-th segment, and compute it once more for the others: less memory, at most one more forward pass."""
    segment_offload: bool = False
    """Keep keys and values of earlier segments, and their gradients, in host memory, and copy them to the device for each use."""
    segment_reduce_each: bool = False
    """Where weights are divided, sum gradients over ranks after each segment, to hold a share of them; else once, whole before."""
    recompute: Literal["none", "layer", "selective"] = "none"
    """Keep no activations of a layer, and compute them again in backward: all, or but for what exchanges brought (selective)."""
    compile: bool = False
    """Compile each layer by torch.compile; the first steps take longer."""
    check_tokens: int = 65_536
    """Compare this much of the first batch with a single process, which holds all weights, before the first step; 0 does not."""
    check_replicas_every: int = 0
    """Steps between two comparisons of the weights of ranks that must hold the same, bit for bit; 0 makes none."""
    deterministic: bool = False
    """The same bits from run to run: deterministic operations, one CPU thread, an exchange chosen without measuring."""
    max_skipped_steps: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite."""


@dataclass(frozen=True)
class ValidationConfig:
    """The loss on held-out text."""

    every: int = 50
    """Steps between two validations; 0 validates at the end alone."""
    sequences: int = 8
    """Sequences of a validation."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run can go on from."""

    every: int = 50
    """Steps between two checkpoints; 0 writes one at the end alone."""
    keep: int = 2
    """Keep this many of the newest complete checkpoints."""
    asynchronous: bool = True
    """Train on while files are written, from a copy of what a rank writes; a checkpoint counts once it is complete."""
    allow_older: bool = False
    """Go on from an older checkpoint where newer ones are damaged; the run says so, and renames these to damaged-step-...."""


@dataclass(frozen=True)
class SampleConfig:
    """The text that is generated at the end."""

    prompt: str = "def "
    """Text to go on from."""
    tokens: int = 200
    """Tokens to generate; 0 generates none."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""


@dataclass(frozen=True)
class RunConfig:
    """Where a run's files go, and what it prints."""

    dir: str | None = None
    """The run folder; None takes runs/ and the time of the start."""
    go_on: bool = False
    """Where run.dir holds a run, go on with it from its newest checkpoint, or its beginning: for jobs that are started again."""
    measure_alone: bool = True
    """At the end, let one more process make a few steps on whole sequences, and say what the split bought."""
    release_memory_every: int = 8
    """Give freed memory back to the system after this many steps, or passes over a segment of time, on the CPU; 1 keeps a rank
    smallest and costs about a tenth of a step's time, 0 never does."""
    print_every: int = 10
    """Steps between two printed lines where there is no terminal for a progress bar."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too (needs the extra longspan[tensorboard])."""
    wandb: bool = False
    """Send the metrics to Weights & Biases, too (needs the extra longspan[wandb])."""
    wandb_project: str = "longspan"
    """Project of Weights & Biases."""
    memory_snapshot_step: int | None = None
    """Write a snapshot of a GPU's memory over this optimizer step, counted from 1, into traces/, one file per rank."""
    trace_step: int | None = None
    """Write a Chrome trace of this optimizer step, counted from 1, into traces/ in the run folder, one file per rank."""
