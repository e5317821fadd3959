"""Accelerate's mesh of processes with a dimension of sequence parallelism that Accelerate itself leaves alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from torch.distributed.device_mesh import DeviceMesh

from longspan.checks import described
from longspan.errors import InputError

SEQUENCE = "cp"
"""The mesh dimension whose ranks share a batch, by the name that Accelerate's data loaders and Trainer look for."""

_SIZES = ("dp_replicate_size", "dp_shard_size", "cp_size")
_NOT_COMBINED = {"tp_size": "tensor parallelism", "sp_size": "DeepSpeed's sequence parallelism"}


@dataclass(repr=False)
class SequenceParallelConfig(ParallelismConfig):
    """How many processes share a sequence, for Accelerate and Transformers' Trainer.

        TrainingArguments(..., parallelism_config=SequenceParallelConfig(cp_size=4))     then `prepare_trainer(trainer)`
        Accelerator(parallelism_config=SequenceParallelConfig(cp_size=4))                then `longspan.parallelize(model, mesh)`
                                                                                         of ``accelerator.torch_device_mesh["cp"]``

    Args:
        cp_size: processes that share a sequence. Data loaders give them the same batches; the model splits these.
        dp_replicate_size: processes, or groups of them, that have batches of their own; what is left of all processes if not said.
        dp_shard_size: those over which FSDP2 shards a model, beside the processes that share a sequence.

    The order of ranks is dp_replicate, dp_shard, cp: neighbours share a sequence. Accelerate's own context parallelism splits
    batches before the model and knows softmax attention alone; it stays off, so ``cp_enabled`` is False.

    Raises:
        InputError: for sizes that do not multiply to the number of processes, and for tensor parallelism or DeepSpeed's sequence
            parallelism.
    """

    def __post_init__(self) -> None:
        replicate = self.__dict__["dp_replicate_size"]
        for name in (*_SIZES, *_NOT_COMBINED):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise InputError(f"SequenceParallelConfig: {name} must be a positive integer; got {described(size)}")
        # Accelerate refuses replicas beside its own context parallelism, which has FSDP sum the gradients.
        self.dp_replicate_size = 1
        super().__post_init__()
        self.cp_handler = None
        for name, what in _NOT_COMBINED.items():
            if getattr(self, name) != 1:
                raise InputError(
                    f"SequenceParallelConfig: {name}={getattr(self, name)}: {what} is not combined with longspan's sequence "
                    "parallelism. Leave it out; cp_size is the number of processes that share a sequence"
                )
        self._takes_what_is_left = replicate is None
        if replicate is not None:
            self._set_size("dp_replicate", replicate)

    def __getstate__(self) -> dict[str, Any]:
        """Without the mesh: Trainer pickles its arguments into checkpoints, which other numbers of processes go on from."""
        return {name: value for name, value in self.__dict__.items() if name != "device_mesh"}

    @property
    def cp_enabled(self) -> bool:
        """False: the model splits the batches, and not Accelerate."""
        return False

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Dimensions whose ranks are given the same batch."""
        return [SEQUENCE]

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Dimensions over which FSDP2 shards a model."""
        return [*(["dp_shard"] if self.dp_shard_enabled else []), SEQUENCE]

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Dimensions over which losses and gradients are averaged."""
        return [*self.dp_dim_names, SEQUENCE]

    def build_device_mesh(self, device_type: str) -> DeviceMesh | None:
        """The mesh of all processes; None where there is only one."""
        num_processes = dist.get_world_size() if dist.is_initialized() else 1
        self._check_sizes(num_processes)
        mesh = super().build_device_mesh(device_type) if dist.is_initialized() else None
        if mesh is None or num_processes == 1 or mesh.ndim > 1:
            return mesh
        # A mesh of one dimension is the default group, where gradients are averaged: exchanges must not wait for them, nor come
        # between them in another order on another rank.
        own = DeviceMesh.from_group(dist.new_group(), device_type, mesh_dim_names=mesh.mesh_dim_names)
        for name in ("dp_shard_cp", "dp_cp"):
            own._flatten(name)
        return own

    def _check_sizes(self, num_processes: int) -> None:
        others = self.dp_shard_size * self.cp_size
        if self._takes_what_is_left and num_processes % others == 0:
            self._set_size("dp_replicate", num_processes // others)
        if self.total_size != num_processes:
            sizes = " · ".join(f"{name}={getattr(self, name)}" for name in _SIZES)
            advice = "Start the script by torchrun --nproc-per-node with as many, or change cp_size"
            if num_processes == 1 and dist.is_torchelastic_launched():
                advice = (
                    "torchrun has started this one, and Accelerate does not know of others: without a GPU it has to be told, by "
                    "TrainingArguments(..., use_cpu=True) or Accelerator(cpu=True). Else start as many, or change cp_size"
                )
            raise InputError(
                f"SequenceParallelConfig: {sizes} needs {self.total_size} processes or a multiple of them; there "
                f"{'is' if num_processes == 1 else 'are'} {num_processes}. {advice}"
            )

    def _validate_accelerator(self, accelerator: Accelerator) -> None:
        self._check_sizes(accelerator.num_processes)
