"""``longspan verify`` finds a changed byte, and a config whose ranks compute something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from longspan.cli import main
from longspan.launch import Place, StopRequest
from longspan.train.config import Config, from_mapping, to_toml
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.verify import random_sequences, verify_config
from tests.ranks import run_on_ranks
from tests.train.tiny import TINY, tiny_config, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    config = tiny_config(write_corpus(folder / "text"), folder / "run", parallel__sp=1, sample__tokens=0)
    assert train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest()) == 0
    return folder / "run"


def test_checkpoints_as_written_are_ok_and_a_changed_byte_is_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(run)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and all(line.startswith("ok ") and "every byte as written" in line for line in shown)
    assert shown[2].startswith(f"ok       {run / 'data'}: ")
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    file = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(run)]) == 2
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("ok ") and shown[1].startswith(f"DAMAGED  {checkpoint}")
    assert file.name in shown[1]
    assert main(["verify", str(checkpoint)]) == 2
    file.unlink()
    capsys.readouterr()
    assert main(["verify", str(run)]) == 2
    assert f"DAMAGED  {checkpoint}: {file} cannot be read" in capsys.readouterr().out


def test_prepared_data_as_written_is_ok_and_a_damaged_file_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(run / "data", data)
    assert main(["verify", str(data)]) == 0
    assert capsys.readouterr().out == f"ok       {data}: 9 files, 0.0 MiB, every byte as written\n"
    path = data / "train-00-00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    (data / "validation-00-00000.index").unlink()
    assert main(["verify", str(data)]) == 2
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"DAMAGED  {path} holds ")
    assert second.startswith(f"DAMAGED  {path.with_name('validation-00-00000.index')} cannot be read")
    assert last.startswith(f"DAMAGED  {data}: 2 files; 7 files, ") and f"remove {data / 'data.json'} and run" in last
    (data / "data.json").unlink()
    assert main(["verify", str(data)]) == 2
    assert "it has no data.json" in capsys.readouterr().err


def of_tiny(**values: Any) -> Config:
    mapping = {section: dict(entries) for section, entries in TINY.items()} | {"parallel": {"exchange": "all_gather"}}
    for key, value in values.items():
        section, name = key.split("__")
        mapping.setdefault(section, {})[name] = value
    return from_mapping(mapping)


def verified(config: Config, wrong: bool) -> bool:
    import torch.distributed as dist

    ranks = Ranks(Place(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    if wrong:
        ranks.arrange = lambda degrees: _without_sequence_parallelism(ranks, degrees)  # type: ignore[method-assign]
    return verify_config(config, ranks).agrees


def _without_sequence_parallelism(ranks: Ranks, degrees: Any) -> None:
    Ranks.arrange(ranks, degrees)
    # Every rank then takes the whole sequence, and the loss counts each token twice.
    ranks.mesh = None


def test_a_config_is_verified_on_its_ranks() -> None:
    assert run_on_ranks(2, verified, of_tiny(), False) == [True, True]
    assert run_on_ranks(2, verified, of_tiny(), True) == [False, False]


def test_tokens_are_the_same_for_all_and_have_the_documents_of_the_config() -> None:
    config = of_tiny(train__seq_len=4000, train__batch_tokens=8000, train__check_tokens=4000)
    first, second = (random_sequences(config, 2, 1) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    assert first.tokens.shape == (2, 2001) and int(first.tokens.max()) < config.data.vocab_size
    assert first.document_starts is not None and all(len(starts) == 2 for starts in first.document_starts)
    assert random_sequences(of_tiny(data__documents="concatenate"), 2, 1).document_starts is None


def test_the_command_verifies_a_config(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(of_tiny(parallel__sp=1)))
    threads = torch.get_num_threads()
    try:
        assert main(["verify", "--config", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capfd.readouterr().out.startswith(
        "ok       1 ranks (dp_replicate 1 x dp_shard 1 x sp 1) against one process"
    )


def test_segments_of_time_are_verified_as_they_are_trained_in(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, threads = tmp_path / "config.toml", torch.get_num_threads()
    file.write_text(to_toml(of_tiny(parallel__sp=1, train__segment_tokens=20)))
    try:
        assert main(["verify", "--config", str(file)]) == 0
        with mock.patch("longspan.streaming.engine.taken_gradient", torch.zeros_like):
            assert main(["verify", "--config", str(file)]) == 2
    finally:
        torch.set_num_threads(threads)
    told = [line for line in capfd.readouterr().out.splitlines() if "against one process" in line]
    assert [line.split()[0] for line in told] == ["ok", "DIFFERS"] and all(
        "in segments of time" in line for line in told
    )


def test_what_cannot_be_verified_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 2
    assert "verify takes run folders, checkpoints and folders of prepared data" in capsys.readouterr().err
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no complete checkpoint, and no prepared data" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text("[train]\nstep = 3\n")
    assert main(["verify", "--config", str(tmp_path / "config.toml")]) == 2
    assert "unknown key train.step" in capsys.readouterr().err
    # Leaving the comparison out is for a run, which then says that nothing was compared.
    (tmp_path / "config.toml").write_text("[train]\ncheck_tokens = 0\n")
    assert main(["verify", "--config", str(tmp_path / "config.toml")]) == 2
    assert "train.check_tokens is 0, the tokens to compare with one process. Give as many" in capsys.readouterr().err
