"""Every block of the README does what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests import copied
from tests.ranks import raised, run_on_ranks

PROJECT_ROOT = Path(__file__).resolve().parent.parent
README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
# Blocks that show output; everything else is run.
NOT_RUN = {"text"}
# A training run of seconds: what it is told beside what the README says.
SHORT_RUN = (
    "--train.steps 2 --train.seq_len 128 --train.batch_tokens 128 --data.max_bytes 200000 --data.vocab_size 300 "
    "--model.dim 32 --model.num_heads 2 --model.num_kv_heads 1 --model.hidden_dim 64 --validation.sequences 1 "
    "--sample.tokens 4 --run.measure_alone False --run.dir run"
)


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\S*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _python_code() -> str:
    return "\n".join(content for language, content in _blocks(README) if language == "python")


def _commands() -> list[str]:
    lines = [line for language, content in _blocks(README) if language == "bash" for line in content.splitlines()]
    return [line for line in lines if line.strip()]


def _run(arguments: list[str], folder: Path) -> str:
    # Arguments of the `make` that runs these tests are not meant for the commands.
    kept = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")}
    result = subprocess.run(
        arguments,
        env={**kept, "PYTHONPATH": str(PROJECT_ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, f"{shlex.join(arguments)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _shell_of(make_command: str) -> list[str]:
    """The command that `make` would run at last, with this Python in place of the environment's."""
    lines = _run([*shlex.split(make_command), "--dry-run", "--no-print-directory"], PROJECT_ROOT).splitlines()
    arguments = shlex.split(lines[-1])
    assert arguments[:2] == [".venv/bin/python", "-m"], lines[-1]
    return [sys.executable, *arguments[1:]]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert README.count("\n```") == 2 * len(_blocks(README))
    assert {language for language, _ in _blocks(README)} - NOT_RUN == {"python", "bash"}


def _execute(code: str) -> None:
    exec(compile(code, "<README>", "exec"), {})


def _execute_strictly(code: str, folder: Path) -> None:
    os.chdir(folder)
    warnings.simplefilter("error")
    _execute(code)


def test_python_blocks_run_in_one_process(tmp_path: Path) -> None:
    assert copied.call(_execute_strictly, _python_code(), tmp_path) == 0


def test_python_blocks_run_on_ranks() -> None:
    run_on_ranks(2, _execute, _python_code())


def test_a_wrong_python_block_would_fail(tmp_path: Path) -> None:
    """On ranks it is the block that fails, and alone the process."""
    code = _python_code()
    wrong = code.replace("layout.gather(o_local), o)", "layout.gather(o_local), o + 0.1)")
    assert wrong != code
    for kind, message in run_on_ranks(2, raised, _execute, wrong):
        assert kind == "AssertionError" and "Tensor-likes are not close" in message
    assert copied.call(_execute_strictly, wrong, tmp_path) == 1


def _marked(command: str) -> Any:
    # The same run as without options, on more ranks than most machines have cores.
    return pytest.param(command, marks=pytest.mark.slow if "--parallel.sp 4" in command else ())


@pytest.mark.slow_rows(r"^\.venv/bin/torchrun")
# Others of their kind run in make test.
@pytest.mark.slow_rows(r"^make train")
@pytest.mark.parametrize("command", [_marked(command) for command in _commands()])
def test_commands_run(command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    if program == "make" and arguments[0] == "train":
        _run([*_shell_of(command), *shlex.split(SHORT_RUN)], tmp_path)
        assert (tmp_path / "run" / "metrics.jsonl").exists()
    elif program == "make" and arguments[0] == "test":
        # The whole suite from inside itself would never end: that it is found is enough.
        listed = _run([*_shell_of(command), "--collect-only", "-q", "tests/test_ranks.py"], PROJECT_ROOT)
        assert "tests/test_ranks.py" in listed
    elif program == ".venv/bin/torchrun":
        _run([sys.executable, "-m", "torch.distributed.run", *arguments], PROJECT_ROOT)
    else:
        pytest.fail(f"the README has a command that no test runs: {command}")


def test_links_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    local = [target for target in targets if "://" not in target]
    assert len(local) >= 5
    missing = [target for target in local if not (PROJECT_ROOT / target).exists()]
    assert missing == []
