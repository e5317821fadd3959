"""``longspan eval lm`` gives the harness the model of a run: its results are those of the run's own logits."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from longspan.cli import main
from longspan.evaluation.harness import rows_of
from longspan.launch import Place, StopRequest
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.trained import open_trained
from tests.shared import made_once
from tests.train.tiny import tiny_config, write_corpus

TIMEOUT = 900.0


def trained_run(factory: pytest.TempPathFactory, documents: str) -> Path:
    def make(folder: Path) -> str:
        values: dict[str, Any] = {"train__steps": 6, "train__seq_len": 200, "train__batch_tokens": 800}
        config = tiny_config(
            write_corpus(folder / "text"),
            folder / "run",
            **values,
            data__documents=documents,
            parallel__sp=1,
            sample__tokens=0,
        )
        assert train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest()) == 0
        return str(folder / "run")

    return Path(made_once(factory, f"eval-lm-{documents}", make))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory, "reset")


def results(run: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What the command writes as JSON, and what it prints."""
    arguments = ["eval", "lm", "--run", str(run), "--threads", "1", "--json", str(folder / "found.json"), *options]
    done = subprocess.run(
        [sys.executable, "-m", "longspan", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        env=os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())["results"]
    return found, done.stdout


QUESTIONS = ["alpha", "gamma\nbeta", "beta beta", "alpha gamma"]
ANSWERS = [" beta", " alpha", " zz", " gamma"]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
target_delimiter: ""
metric_list:
"""


def write_tasks(folder: Path) -> None:
    lines = [
        json.dumps({"question": question, "answer": answer, "choices": ANSWERS, "number": number})
        for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n")
    choices = 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{number}}"'
    target = 'doc_to_target: "{{answer}}"'
    for name, kind, more, metrics in (
        ("own_choices", "multiple_choice", choices, ("acc",)),
        ("own_likelihood", "loglikelihood", target, ("perplexity", "acc")),
    ):
        text = TASK.format(name=name, data=data, kind=kind, more=more)
        (folder / f"{name}.yaml").write_text(text + "".join(f"  - metric: {metric}\n" for metric in metrics))


def log_probability(trained: Any, question: str, answer: str) -> tuple[float, bool]:
    """Of an answer behind a question, by the logits of the run's model; and whether greedy decoding writes it."""
    prompt, target = list(question.encode()), list(answer.encode())
    if trained.config.data.documents == "concatenate":
        prompt = [256, *prompt]
    with torch.no_grad():
        logits = trained.model(torch.tensor([prompt + target[:-1]]))[0, len(prompt) - 1 :]
    wanted = torch.tensor(target)
    return -float(F.cross_entropy(logits, wanted, reduction="sum")), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.parametrize("documents", ["reset", "concatenate"])
def test_tasks_of_ones_own_are_scored_by_the_logits_of_the_run(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, documents: str
) -> None:
    run = trained_run(tmp_path_factory, documents)
    write_tasks(tmp_path)
    options = ["--tasks", "own_choices", "own_likelihood", "--include", str(tmp_path), "--batch_size", "3"]
    found, shown = results(run, tmp_path, *options)
    trained = open_trained(run)
    of_answers = [log_probability(trained, q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    mean = sum(nats for nats, _ in of_answers) / len(of_answers)
    assert found["own_likelihood"]["perplexity,none"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["own_likelihood"]["acc,none"] == sum(greedy for _, greedy in of_answers) / len(of_answers)
    chosen = [max(range(4), key=lambda i, q=q: log_probability(trained, q, ANSWERS[i])[0]) for q in QUESTIONS]  # type: ignore[misc]
    assert found["own_choices"]["acc,none"] == sum(c == n for n, c in enumerate(chosen)) / len(chosen)
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["task", "metric", "value", "standard", "error"]
    assert ["own_choices", "acc", f"{found['own_choices']['acc,none']:.4f}"] in [line[:3] for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "nltk", "wonderwords")),
    reason="lm-eval, or what RULER's tasks need, is not installed",
)
def test_a_task_that_ships_with_the_package_runs(run: Path, tmp_path: Path) -> None:
    """RULER's first needle, whose text it makes itself."""
    options = ["--tasks", "niah_single_1", "--limit", "1", "--max_length", "4300"]
    found, shown = results(run, tmp_path, *options)
    assert 0.0 <= found["niah_single_1"]["4096,none"] <= 1.0
    assert any(line.startswith("niah_single_1  ") for line in shown.splitlines())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_an_unknown_task_is_refused_with_the_nearest(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "longspan", "eval", "lm", "--run", str(run), "--tasks", "helaswag"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 2
    assert "tasks has 'helaswag', which lm-eval does not know. Did you mean hellaswag" in done.stderr


def test_without_the_harness_the_command_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("longspan.evaluation.harness.importlib.util.find_spec", lambda name: None):
        assert main(["eval", "lm", "--run", "somewhere", "--tasks", "hellaswag"]) == 2
    shown = capsys.readouterr().err
    assert (
        "needs lm_eval and transformers, which is not installed. Install it with pip install 'longspan[eval]'" in shown
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks"], "tasks is empty; give at least one task of lm-eval"),
        (["--tasks", "a", "--limit", "0"], "limit has 0; each must be at least 1"),
        (["--tasks", "a", "--batch_size", "0"], "batch_size has 0; each must be at least 1"),
        (["--tasks", "a", "--num_fewshot=-1"], "num_fewshot has -1; each must be at least 0"),
        (["--tasks", "a", "--include", "nowhere"], "include is 'nowhere', which is no folder"),
    ],
)
def test_what_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["eval", "lm", "--run", "somewhere", *options]) == 2
    assert message in capsys.readouterr().err


def test_rows_are_the_numbers_of_the_results() -> None:
    found = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.25, "ppl,strict": 3, "ppl_stderr,strict": "N/A"},
        }
    }
    assert rows_of(found) == [("a", "acc", 0.5, 0.25), ("a", "ppl (strict)", 3.0, None)]
