"""The examples of fine-tuning print the losses of one process, whatever the number of ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[3]
LOSS = re.compile(r"'?(?:eval_)?loss'?:? '?(\d+\.\d+)")


def losses(example: str, num_ranks: int, folder: Path, *options: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    result = subprocess.run(
        [*command, str(PROJECT_ROOT / "examples" / f"{example}.py"), "--tokens", "96", "--steps", "6", *options],
        env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    found = [float(number) for number in LOSS.findall(result.stdout)]
    assert len(found) >= 2, result.stdout
    return found


@pytest.mark.slow
@pytest.mark.parametrize("example", ["finetune_accelerate", "finetune_fsdp2", "finetune_sft", "finetune_trainer"])
def test_an_example_prints_the_losses_of_one_process(example: str, tmp_path: Path) -> None:
    # Adam magnifies what float32 rounds; printed losses have four digits.
    assert losses(example, 2, tmp_path) == pytest.approx(losses(example, 1, tmp_path), abs=3e-3)
