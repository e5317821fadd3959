"""The main job through the command line: own ranks, torchrun, resume, signals, failures, errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from longspan.cli import main
from longspan.models import LinearLlama3, LinearLlama3Config
from longspan.train.config import to_toml
from tests import copied
from tests.shared import made_once
from tests.train.faults import TIMEOUT, has_made_steps
from tests.train.tiny import COMPUTED, metrics, newest_tensors, tiny_config, write_corpus


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TOML file of a tiny run of 30 steps, without its folder."""
    return Path(made_once(tmp_path_factory, "cli-config", _write_config))


def _write_config(folder: Path) -> str:
    changes = {"train__steps": 30, "validation__every": 10, "checkpoint__every": 10}
    text = to_toml(tiny_config(write_corpus(folder / "text"), Path("unused"), **changes))
    path = folder / "tiny.toml"
    path.write_text("\n".join(line for line in text.split("\n") if not line.startswith("dir =")))
    return str(path)


def train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longspan", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.fixture(scope="session")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run on two ranks, and what it printed."""

    def make(folder: Path) -> list[str]:
        run = folder / "run"
        done = copied.run(["train", "--config", config, "--run.dir", run])
        assert done.returncode == 0, done.stderr
        assert done.stderr == b""
        return [str(run), done.stdout.decode()]

    run, printed = made_once(tmp_path_factory, "cli-finished", make)
    return Path(run), printed


def test_the_command_trains_on_its_own_ranks_and_leaves_a_run_folder(finished: tuple[Path, str]) -> None:
    run, printed = finished
    assert "2 ranks on cpu: data 1 x sequence 2 (zigzag)" in printed
    assert "first batch on 2 ranks | on one: loss" in printed
    assert printed.count("nats/token") >= 6
    assert "A sample, from 'def ':" in printed
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = metrics(run)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 31))
    assert [record["step"] for record in records if "validation_loss" in record] == [10, 20, 30]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(0 <= record["wait_share"] <= 1 and record["exchanges"] > 0 for record in steps)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_loss"] == records[-1]["validation_loss"]
    assert "validation bits per byte" in (run / "summary.md").read_text()


def test_the_weights_are_a_model(finished: tuple[Path, str]) -> None:
    path = finished[0] / "weights.safetensors"
    with safe_open(path, "pt") as file:
        values = json.loads(file.metadata()["LinearLlama3Config"])
    model = LinearLlama3(LinearLlama3Config(**values))
    model.load_state_dict(load_file(path), strict=not values["tie_embeddings"])
    assert model(torch.randint(257, (1, 5))).isfinite().all()
    newest = newest_tensors(finished[0])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, newest[f"model/{name}"])


@pytest.mark.slow
def test_what_is_measured_of_the_ranks_is_said_and_taken_again(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ["--parallel.balance", "measured", "--parallel.exchange_max_relative_error", "0.05"]
    done = train("--config", config, "--run.dir", run, "--train.steps", "4", *asked)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    shares = r"rank 0 [\d.]+%, rank 1 [\d.]+%; GFLOP/s in layers and of softmax attention, by rank: [\d., and]+"
    assert re.search(rf"^balance +{shares}; measured now, and kept in the checkpoints$", done.stdout, re.MULTILINE)
    assert re.search(r"^exchange +\w+.* for ScalarDecay states of .*; as measured now", done.stdout, re.MULTILINE)
    balance = json.loads((run / "summary.json").read_text())["balance"]
    ((first, second),) = balance["groups"]
    assert first + second == pytest.approx(1.0, abs=1e-3) and all(min(speeds) > 0 for speeds in balance["speeds"])
    again = train("--resume", run, "--train.steps", "6")
    assert again.returncode == 0 and again.stderr == "", again.stderr
    assert "; measured before, as the checkpoint has them" in again.stdout
    assert json.loads((run / "summary.json").read_text())["balance"] == balance


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(config: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("--config", config, "--run.dir", run, "--checkpoint.every", "3") as process:
        wait_for(lambda: list(run.glob("checkpoints/step-*")), process)
        process.kill()
    wait_for(lambda: not alive(process.ranks))
    assert not (run / "weights.safetensors").exists()
    done = train("--resume", run)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert metrics(run, *COMPUTED) == metrics(finished[0], *COMPUTED)
    expected = newest_tensors(finished[0])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in newest_tensors(run).items())


# The hang-up is what a terminal sends that goes, the interrupt is its Ctrl-C.
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        signal.SIGHUP,
    ],
)
def test_a_signal_ends_a_run_with_a_checkpoint_and_only_loopback_listens(
    config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    with started("--config", config, "--run.dir", run, "--train.steps", "100000") as process:
        wait_for(lambda: has_made_steps(run), process)
        addresses = {address for rank in process.ranks for address in listening_addresses(rank)}
        process.send_signal(number)
        printed, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, errors
    assert errors == ""
    assert f"longspan train --resume {run}" in printed
    stopped_after = metrics(run)[-1]["step"]
    assert (run / "checkpoints" / f"step-{stopped_after:08d}" / "manifest.json").exists()
    assert addresses
    assert addresses <= {"0100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_a_run_at_once(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("--config", config, "--run.dir", run, "--train.steps", "100000") as process:
        wait_for(lambda: len(process.children()) == 2, process)
        os.kill(process.ranks[1], signal.SIGSTOP)
        # Rank 0 waits for the other one, wherever it has come to.
        time.sleep(2.0)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped before the first step: nothing was saved" in errors
    assert not alive(process.ranks)


@pytest.mark.slow
def test_a_second_signal_ends_a_run_at_once(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("--config", config, "--run.dir", run, "--train.steps", "100000") as process:
        wait_for(lambda: has_made_steps(run), process)
        # A stopped rank cannot come to the end of its step.
        os.kill(process.ranks[1], signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT) == 128 + signal.SIGTERM
    wait_for(lambda: not alive(process.ranks))


@pytest.mark.slow
def test_a_dead_rank_ends_the_run_and_is_named(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started("--config", config, "--run.dir", run, "--train.steps", "100000") as process:
        wait_for(lambda: has_made_steps(run), process)
        os.kill(process.ranks[1], signal.SIGKILL)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "rank 1 of 2 was killed by SIGKILL" in errors
    assert not alive(process.ranks)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_reported_after_the_deadline(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("--config", config, "--run.dir", run, "--train.steps", "100000", "--parallel.timeout_seconds", "10")
    with started(*arguments) as process:
        wait_for(lambda: has_made_steps(run), process)
        os.kill(process.ranks[1], signal.SIGSTOP)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "rank 0 of 2 failed" in errors
    assert "rank 0 of 2, step" in errors
    assert "rank 1 had not ended" in errors
    assert not alive(process.ranks)


@pytest.mark.slow
def test_torchrun_ranks_are_used(config: Path, finished: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("-m", "longspan", "train", "--config", str(config), "--run.dir", str(run)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on cpu: data 1 x sequence 2") == 1
    assert metrics(run, *COMPUTED) == metrics(finished[0], *COMPUTED)


def test_torchrun_ranks_that_do_not_fit_are_refused_with_the_degrees_that_do(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--config", str(config), "--run.dir", str(tmp_path / "run")]) == 2
    message = "1 ranks are not parallel.dp_replicate 1 x parallel.dp_shard 1 x parallel.sp 2 = 2. 1 ranks can be"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.step", "3"], "unknown option --train.step: did you mean --train.steps?"),
        (["--config", "missing.toml"], "missing.toml cannot be read as a config"),
        (["--resume", "missing"], "'missing' is no run folder"),
        (["--model.pattern", "LX"], "pattern must be letters L (linear attention) and N (softmax attention)"),
        (["--model.num_heads", "3"], "dim 128 is not a multiple of num_heads 3"),
        (["--model.operator", "nothing"], "operator must be one of linear_attention, lightning, retention"),
        (["--parallel.exchange", "nothing"], "parallel.exchange must be 'auto' or one of"),
        (["--train.batch_tokens", "100"], "train.batch_tokens 100 is no multiple of train.seq_len 8192"),
        (["--parallel.dp_shard", "2"], "8192 is 1 sequences of train.seq_len 8192, which parallel.dp_replicate 1 x "),
    ],
)
def test_what_does_not_fit_is_refused_before_any_rank_starts(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("longspan: error: ")
    assert message in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_error_on_the_ranks_is_printed_once_without_a_traceback(config: Path, tmp_path: Path) -> None:
    done = train("--config", config, "--run.dir", tmp_path / "run", "--data.source", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        f"longspan: error: data.source '{tmp_path / 'nowhere'}' does not exist. Give a folder, a text, .jsonl or .parquet file, "
        "hf: and the name of a Hugging Face data set, or 'python-stdlib'\n"
    )


def test_a_single_process_needs_no_ranks(
    config: Path, finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    threads = torch.get_num_threads()
    try:
        assert main(["train", "--config", str(config), "--run.dir", str(run), "--parallel.sp", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "1 process on cpu" in capsys.readouterr().out
    for ours, theirs in zip(metrics(run, "loss"), metrics(finished[0], "loss"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "longspan COMMAND --help" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--resume [RUN]" in capsys.readouterr().out


class Started(subprocess.Popen[str]):
    """A running command; `ranks` are the ids of its ranks, by rank."""

    @property
    def ranks(self) -> list[int]:
        if not hasattr(self, "_ranks"):
            self._ranks = self.children()
        return self._ranks

    def children(self) -> list[int]:
        """The ranks that have been started by now, and run what they are to run.

        Before, a child is a copy of the launcher, which waits for it in vfork: stopped there, it stops both.
        """
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(child) for child in children if b"\0RANK=" in Path(f"/proc/{child}/environ").read_bytes()]


class started:  # noqa: N801 - reads as the context manager it is
    """Start ``longspan train`` and leave nothing of it behind."""

    def __init__(self, *arguments: str | Path) -> None:
        self.command = [sys.executable, "-m", "longspan", "train", *map(str, arguments)]

    def __enter__(self) -> Started:
        self.process = Started(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return self.process

    def __exit__(self, *error: object) -> None:
        for rank in alive(getattr(self.process, "_ranks", [])):
            os.kill(rank, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def wait_for(condition: Callable[[], object], process: Started | None = None) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if process is not None:
        assert len(process.ranks) == 2


def alive(processes: list[int]) -> list[int]:
    """Those that run still; a process that waits for its parent to read its exit code does not."""
    return [process for process in processes if _state(process) not in ("", "Z", "X")]


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def listening_addresses(process: int) -> Iterator[str]:
    """Addresses, as the kernel prints them, that the process's sockets listen on."""
    sockets = set()
    for descriptor in os.scandir(f"/proc/{process}/fd"):
        sockets.add(os.readlink(descriptor.path))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            # 0A is the state of a listening socket.
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                yield fields[1].rpartition(":")[0]
