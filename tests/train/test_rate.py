"""Operations of a step are those of its documents; a share of a peak is told where a peak is known."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longspan.data.packing import PackedBatch, Sequences
from longspan.errors import ConfigError
from longspan.launch import Place, StopRequest
from longspan.layout import SequenceLayout
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.plan.devices import stated_peak_flops
from longspan.train.config import from_mapping
from longspan.train.config_checks import check
from longspan.train.model import check_device
from longspan.train.ranks import Ranks
from longspan.train.rate import ModelOperations, find_peak, measure_flops
from longspan.train.run import train_on
from longspan.train.step_batch import StepBatch
from tests.train.tiny import metrics, tiny_config, write_corpus


def model() -> LinearLlama3:
    return LinearLlama3(LinearLlama3Config(64, dim=32, num_layers=2, pattern="LN", num_heads=2, hidden_dim=48))


def batch(packed: PackedBatch) -> StepBatch:
    layout = SequenceLayout.local(packed.seq_len, packed.documents)
    return StepBatch(((packed, layout),), packed.num_valid_tokens, torch.zeros(64, dtype=torch.int64).numpy())


def test_operations_are_those_of_the_documents() -> None:
    """A token of a softmax layer reads its own document alone."""
    tokens = torch.zeros(2, 41, dtype=torch.int64)
    operations = ModelOperations(model())
    whole = operations.of_batch(batch(Sequences(tokens).packed()))
    assert whole == pytest.approx(80 * model().flops_per_token(40))
    packed = Sequences(tokens, ((10, 30), ())).packed()
    lengths = [end - start for start, end in pairwise(packed.documents or ())]
    assert sorted(lengths) == [10, 10, 20, 40]
    expected = sum(n * model().flops_per_token(n) for n in lengths)
    assert operations.of_batch(batch(packed)) == pytest.approx(expected)
    assert expected < whole


def test_peaks_of_gpus_are_those_of_the_table() -> None:
    assert stated_peak_flops("NVIDIA H200", torch.bfloat16) == 989e12
    assert stated_peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert stated_peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert stated_peak_flops("NVIDIA A100-SXM4-80GB", torch.float64) is None
    assert stated_peak_flops("NVIDIA GH200 480GB", torch.bfloat16) == 989e12
    for name in ("Some GPU", "NVIDIA L40", "NVIDIA RTX A1000"):
        assert stated_peak_flops(name, torch.bfloat16) is None


def test_the_peak_of_a_cpu_is_measured() -> None:
    peak = find_peak(torch.device("cpu"), torch.float32)
    assert peak.flops is not None and 1e8 < peak.flops < 1e15
    assert "measured" in str(peak)
    assert measure_flops(torch.float32) > 1e8


def test_a_step_says_how_fast_it_was(tmp_path: Path) -> None:
    config = tiny_config(write_corpus(tmp_path / "text"), tmp_path / "run", parallel__sp=1, sample__tokens=0)
    assert train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest()) == 0
    steps = [record for record in metrics(tmp_path / "run") if "loss" in record]
    for step in steps:
        assert step["tokens_per_second_per_rank"] == step["tokens_per_second"]
        assert 0 < step["flops_share"] < 1.5
        assert step["exchange_share"] == 0 == step["wait_share"]
        assert 50e6 < step["memory_bytes"] <= step["peak_memory_bytes"] * 1.01


def test_a_snapshot_of_memory_is_of_gpus_alone() -> None:
    config = from_mapping({"run": {"memory_snapshot_step": 3}})
    check(config)
    with pytest.raises(ConfigError, match="PyTorch records the memory of GPUs alone"):
        check_device(config, torch.device("cpu"))
    with pytest.raises(ConfigError, match="comes after the last step"):
        check(from_mapping({"run": {"memory_snapshot_step": 300}}))
