"""The same bits from run to run: F16 of docs/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longspan.errors import ConfigError
from longspan.launch import EXIT_DONE
from longspan.train.checkpoint import newest_checkpoint
from longspan.train.config import to_toml
from tests.ranks import run_on_ranks
from tests.train.faults import train
from tests.train.tiny import newest_tensors, tiny_config, train_here, write_corpus


@pytest.mark.slow
def test_a_deterministic_run_is_the_same_bits_whatever_the_cores(tmp_path: Path) -> None:
    """On one core and on two, which without the option is one thread a process and two: an exchange is not measured either."""
    values = {"train__deterministic": True, "parallel__exchange": "auto", "parallel__sp": 1, "train__seq_len": 1024}
    sizes = {
        "model__dim": 128,
        "model__hidden_dim": 352,
        "train__batch_tokens": 2048,
        "train__steps": 2,
        "validation__every": 0,
    }
    found = []
    for cores in (1, 2):
        run = tmp_path / str(cores)
        text = to_toml(tiny_config(write_corpus(tmp_path / f"text-{cores}"), run, **values, **sizes))
        (tmp_path / "config.toml").write_text(text)
        found.append(train("--config", tmp_path / "config.toml", cores=cores))
        assert found[-1].returncode == 0, found[-1].stderr
        assert "1 process on cpu, 1 threads" in found[-1].stdout
    one, two = (newest_tensors(tmp_path / str(cores)) for cores in (1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_deterministic_run_twice_is_the_same_bits_and_measures_no_exchange(corpus: Path, tmp_path: Path) -> None:
    values = {"train__deterministic": True, "train__steps": 3}
    for name in ("once", "again"):
        assert run_on_ranks(2, train_here, tiny_config(corpus, tmp_path / name, **values)) == [EXIT_DONE] * 2
    once, again = (newest_tensors(tmp_path / name) for name in ("once", "again"))
    assert all(torch.equal(once[name], again[name]) for name in once)
    state = newest_checkpoint(tmp_path / "once" / "checkpoints") / "state.json"
    assert json.loads(state.read_text())["exchange"] is None
    with pytest.raises(ConfigError, match=r"train.deterministic is True and parallel.threads 2"):
        tiny_config(corpus, tmp_path, parallel__threads=2, train__deterministic=True)
