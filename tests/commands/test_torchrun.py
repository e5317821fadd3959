"""Commands under torchrun: what all ranks find is said once, and all ranks end with the same code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from longspan import launch
from longspan.cli import main
from longspan.train.config import to_toml
from tests.test_launch import WITHOUT_TORCH
from tests.train.faults import TIMEOUT
from tests.train.tiny import tiny_config

SUBJECTS = [
    "versions",
    "cores",
    "device",
    "backends",
    "kernels",
    "open files",
    "shared memory",
    "disk",
    "group",
    "links",
    "clocks",
]
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


def torchrun(num_ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "longspan", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A TOML file of a tiny run on two ranks that share a sequence."""
    path = tmp_path / "tiny.toml"
    path.write_text(to_toml(tiny_config(tmp_path, tmp_path / "run", parallel__exchange="all_gather")))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", RANKS)
def test_doctor_looks_at_the_ranks_of_torchrun_and_says_each_thing_once(num_ranks: int) -> None:
    done = torchrun(num_ranks, "doctor")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:8].strip() in ("ok", "warning", "error")]
    assert [line[9:23].strip() for line in lines] == SUBJECTS, done.stdout
    assert f"{num_ranks} ranks on 1 host, the same versions everywhere" in done.stdout
    assert "longspan" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", RANKS)
def test_verify_compares_the_ranks_of_torchrun_with_one_process(config: Path, num_ranks: int) -> None:
    # Two ranks share a sequence; there are more copies of them where there are more ranks.
    done = torchrun(num_ranks, "verify", "--config", config)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith(
        f"ok       {num_ranks} ranks (dp_replicate {num_ranks // 2} x dp_shard 1 x sp 2) against one process"
    )
    assert [line.split()[0] for line in rest] == ["loss", "gradient", "gradients"]
    assert "longspan" not in done.stderr


# What another rank says, and does not say, is below.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message", "have_met"),
    [
        (["verify", "--config", "TINY"], "2 ranks are not parallel.dp_replicate 1 x parallel.dp_shard 1 x ", True),
        (["doctor", "--nonsense"], "Unrecognized options: --nonsense", False),
        (["doctor", "--device", "cuda"], "--device is 'cuda', but", False),
        (["verify", "nothing"], "'nothing' has no complete checkpoint", False),
        (["train", "--train.steps", "0"], "train.steps is 0", False),
    ],
)
def test_what_all_ranks_are_refused_for_is_said_once(
    tmp_path: Path, arguments: list[str], message: str, have_met: bool
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    config = tmp_path / "tiny.toml"
    config.write_text(to_toml(tiny_config(tmp_path, tmp_path / "run", parallel__sp=3)))
    num_ranks = 2 if have_met else 3
    done = torchrun(num_ranks, *(config if argument == "TINY" else argument for argument in arguments))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count(message) == 1, done.stderr
    # What torchrun reports: of the other ranks, and of rank 0, which was the first to end.
    *others, first = re.findall(r"exitcode +: (\S+)", done.stderr)
    assert first == "2" and len(others) == num_ranks - 1, done.stderr
    # On a busy machine another rank may be loading still, and is ended before it has come as far.
    assert set(others) <= ({"2"} if have_met else {"2", "-15"}), done.stderr


def as_rank_1(seconds: float) -> subprocess.Popen[str]:
    """A process that is rank 1 of two and is refused, which waits so long for rank 0 to say why."""
    script = """
        import sys
        from longspan import launch
        from longspan.errors import DataError
        launch._SECONDS_FOR_FIRST_RANK = float(sys.argv[1])

        def refused(place, stop):
            print("comes to it", flush=True)
            raise DataError("no text. Give more")

        sys.exit(launch.run_rank(launch.place_of_this_process(), refused))
    """
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_TORCH + textwrap.dedent(script), str(seconds)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_another_rank_than_the_first_is_silent_where_it_is_ended_with_it_and_else_says_why() -> None:
    with as_rank_1(TIMEOUT) as ended:
        assert ended.stdout is not None and ended.stdout.readline() == "comes to it\n"
        time.sleep(0.5)
        ended.terminate()
        assert ended.communicate(timeout=TIMEOUT)[1] == ""
    assert ended.returncode == 2
    with as_rank_1(0.1) as alone:
        assert alone.communicate(timeout=TIMEOUT)[1] == "longspan: error: rank 1 of 2: no text. Give more\n"
    assert alone.returncode == 2


def test_options_that_do_not_fit_are_said_by_another_rank_where_it_is_not_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    printed: list[str] = []
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: printed.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as ending:
        main(["doctor", "--nonsense"])
    assert ending.value.code == 2
    assert printed == [""] and "Unrecognized options: --nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ending:
        main(["doctor", "--help"])
    assert not ending.value.code and capsys.readouterr() == ("", "")
