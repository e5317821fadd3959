"""A model of Transformers with sequences shared and weights divided over a mesh: gradients are one process's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longspan import parallelize
from longspan.parallel import MeshDegrees, ParallelMesh, gathered, shard_weights
from tests.compare import relative_error, worst
from tests.ranks import run_on_ranks

pytest.importorskip("transformers")


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double()


def errors_of(all_degrees: list[MeshDegrees]) -> list[float]:
    tokens = torch.randint(0, 37, (2, 22), generator=torch.Generator().manual_seed(1))
    alone = llama()
    alone(input_ids=tokens, labels=tokens).loss.backward()
    errors = []
    for degrees in all_degrees:
        mesh = ParallelMesh(degrees)
        model = shard_weights(parallelize(llama(), mesh["sp"], loss="sum"), mesh)
        own = tokens.chunk(degrees.data)[mesh.coordinate("data")]
        # A group's loss is the mean over its own sequences, which are as many as another one's.
        (model(input_ids=own, labels=own).loss / degrees.data).backward()
        grads: Any = [(name, parameter.grad) for name, parameter in model.named_parameters()]
        got = gathered(grads, True)
        errors.append(worst(relative_error(got[name], p.grad) for name, p in alone.named_parameters()))
    return errors


def test_gradients_are_sums_over_data_and_sequence() -> None:
    degrees = [MeshDegrees(1, 2, 2), MeshDegrees(1, 1, 4, True), MeshDegrees(2, 1, 2, True)]
    for errors in run_on_ranks(4, errors_of, degrees):
        assert worst(errors) < 1e-12
