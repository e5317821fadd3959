"""The launch files do what they say, as far as one machine can show: they are run, with stand-ins for what schedulers give."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.network import Network, why_unavailable
from tests.test_cluster import one_test_at_a_time  # noqa: F401
from tests.train.tiny import COMPUTED, metrics, write_corpus

ROOT = Path(__file__).parent.parent
FILES = ROOT / "examples" / "launch"
LIMIT = 240
STEPS = 200
_UNAVAILABLE = why_unavailable()


def environment(**values: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**own, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **values}


@pytest.fixture
def told(tmp_path: Path) -> list[str]:
    """What the run is told: as the example's, but small; steps take some tens of milliseconds."""
    corpus = write_corpus(tmp_path / "text")
    values = {
        "data.source": corpus,
        "data.tokenizer": "bytes",
        "data.validation_fraction": 0.3,
        "model.dim": 16,
        "model.num_layers": 2,
        "model.pattern": "LN",
        "model.hidden_dim": 24,
        "parallel.exchange": "all_gather",
        "parallel.threads": 1,
        "train.steps": STEPS,
        "train.seq_len": 61,
        "train.batch_tokens": 244,
        "train.micro_batch_sequences": 1,
        "checkpoint.every": 10,
        "validation.every": 0,
        "validation.sequences": 2,
        "sample.tokens": 0,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def steps_of(run: Path) -> int:
    try:
        return max((record["step"] for record in metrics(run)), default=0)
    except (OSError, ValueError):
        return 0


def wait_until(condition: Callable[[], Any], what: str, process: subprocess.Popen[Any]) -> Any:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        if process.poll() is not None:
            raise AssertionError(f"it ended with {process.returncode} before {what}:\n{process.communicate()[0]}")
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come within {LIMIT} s")


@contextmanager
def started(command: Sequence[str], **values: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, of which nothing outlives the block."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT, **values
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def output_of(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, out
    return out


def ranks_of(processes: Sequence[str]) -> list[int]:
    """The processes among these that are ranks of a run."""
    found = []
    for number in processes:
        try:
            command = Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            continue
        if b"longspan\0train" in command and b"torch.distributed.run" not in command:
            found.append(int(number))
    return found


def uninterrupted(told: Sequence[str], run: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "longspan", "train", *told, "--run.dir", str(run)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), check=False, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    return metrics(run, *COMPUTED)


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_the_scripts_parse(name: str) -> None:
    subprocess.run(["bash", "-n", str(FILES / name)], check=True)


@pytest.mark.parametrize("missing", ["HOSTS", "HEAD", "RANKS"])
def test_the_script_says_what_it_needs(missing: str) -> None:
    given = {"HOSTS": "1", "HEAD": "127.0.0.1", "RANKS": "2"}
    given.pop(missing)
    done = subprocess.run(
        ["bash", str(FILES / "torchrun.sh")], env=environment(**given), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and f"set {missing} to" in done.stderr


def test_the_kubernetes_file_agrees_with_itself() -> None:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    service, job = yaml.safe_load_all((FILES / "kubernetes.yaml").read_text())
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert str(spec["completions"]) == str(spec["parallelism"]) == values["HOSTS"]
    # The first pod's name, as an indexed job gives it, in the domain of the service.
    assert (
        values["HEAD"] == f"{job['metadata']['name']}-0.{pod['subdomain']}" and service["spec"]["clusterIP"] == "None"
    )
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["spec"]["ports"][0]["port"] == container["ports"][0]["containerPort"] == 29500
    assert values["RANKS"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert (ROOT / container["command"][1]).exists() and container["args"][0] == "--run.dir"


@pytest.mark.slow
@pytest.mark.skipif(_UNAVAILABLE is not None, reason=str(_UNAVAILABLE))
def test_two_hosts_meet_and_go_on_after_a_rank_was_killed(told: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["bash", str(FILES / "torchrun.sh"), *told, "--run.dir", str(run)]
    with Network(2) as network:
        given = [
            environment(
                HOSTS="2",
                HEAD=network.address(0),
                RANKS="1",
                ADDRESS=network.address(host),
                GLOO_SOCKET_IFNAME=network.interface,
            )
            for host in range(2)
        ]
        with (
            started(network.command(0, arguments), env=given[0]) as head,
            started(network.command(1, arguments), env=given[1]) as other,
        ):
            wait_until(lambda: steps_of(run) >= 12, "step 12", head)
            listed = subprocess.run(
                ["ip", "netns", "pids", network.hosts[1]], capture_output=True, text=True, check=True
            )
            (rank,) = ranks_of(listed.stdout.split())
            os.kill(rank, signal.SIGKILL)
            said = output_of(head)
            output_of(other)
    assert "going on from step" in said
    assert metrics(run, *COMPUTED) == uninterrupted(told, tmp_path / "whole")


SRUN = """#!/usr/bin/env bash
# One task, as on one node, without the options of srun.
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> "$CALLS"; fi
"""


@pytest.mark.slow
def test_a_slurm_job_that_runs_out_of_time_is_queued_again_and_goes_on(told: list[str], tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    calls, run = tmp_path / "calls", tmp_path / "run"
    given = environment(
        PATH=f"{stand_ins}:{os.environ['PATH']}",
        CALLS=str(calls),
        SLURM_JOB_ID="17",
        SLURM_NNODES="1",
        SLURM_JOB_NODELIST="node[0-1]",
        RANKS="2",
        PORT="29613",
        RESTARTS="0",
    )
    # What comes last counts: a folder that is the test's own.
    job = ["bash", str(FILES / "slurm.sbatch"), *told, "--run.dir", str(run)]
    with started(job, env=given) as process:
        wait_until(lambda: steps_of(run) >= 7, "step 7", process)
        os.kill(process.pid, signal.SIGTERM)
        said = output_of(process)
    assert calls.read_text() == "requeue 17\n"
    assert "with a checkpoint" in said
    assert steps_of(run) < STEPS
    with started(job, env=given) as process:
        assert "going on from step" in output_of(process)
    assert calls.read_text() == "requeue 17\n"
    assert metrics(run, *COMPUTED) == uninterrupted(told, tmp_path / "whole")


@pytest.mark.slow
def test_ray_starts_workers_again_and_they_go_on(told: list[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray Train: pip install 'longspan[ray]'")
    run = tmp_path / "run"
    command = [sys.executable, str(FILES / "ray_train.py"), "--workers", "2", "--storage", str(tmp_path / "ray")]
    given = environment(RAY_TMPDIR="/tmp", RAY_USAGE_STATS_ENABLED="0")
    with started([*command, "--", *told, "--run.dir", str(run)], env=given) as process:
        wait_until(lambda: steps_of(run) >= 12, "step 12", process)
        workers = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if is_worker(path, process.pid)]
        assert len(workers) == 2
        os.kill(int(workers[0]), signal.SIGKILL)
        said = output_of(process)
    assert "going on from step" in said
    assert metrics(run, *COMPUTED) == uninterrupted(told, tmp_path / "whole")


def is_worker(command: Path, session: int) -> bool:
    """Whether a process is a worker of the Ray that this test has started."""
    try:
        return b"RayTrainWorker" in command.read_bytes() and os.getsid(int(command.parent.name)) == session
    except OSError:
        return False
