"""What several tests of the trainer need and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.launch import EXIT_DONE
from longspan.train.config import to_toml
from tests.ranks import run_on_ranks
from tests.shared import made_once
from tests.train.faults import train
from tests.train.tiny import tiny_config, train_here, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few small text files."""
    return Path(made_once(tmp_path_factory, "corpus", lambda folder: str(write_corpus(folder / "text"))))


@pytest.fixture(scope="session")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of six steps on two ranks."""

    def make(folder: Path) -> str:
        assert run_on_ranks(2, train_here, tiny_config(corpus, folder / "run")) == [EXIT_DONE] * 2
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "run-finished", make))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TOML file of a tiny run of 9 steps with a checkpoint at each third, without its folder."""

    def write(folder: Path) -> str:
        changes = {"train__steps": 9, "sample__tokens": 0, "parallel__exchange": "all_gather"}
        text = to_toml(tiny_config(write_corpus(folder / "text"), Path("unused"), **changes))
        path = folder / "tiny.toml"
        path.write_text("\n".join(line for line in text.split("\n") if not line.startswith("dir =")))
        return str(path)

    return Path(made_once(tmp_path_factory, "faults-config", write))


@pytest.fixture(scope="session")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks that nothing has interrupted."""

    def make(folder: Path) -> str:
        done = train("--config", config, "--run.dir", folder / "run")
        assert done.returncode == 0, done.stderr
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "faults-uninterrupted", make))
