"""``longspan generate`` writes what the trained model finds, on any number of ranks, and refuses what does not fit."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.cli import main
from longspan.data.tokenizer import ByteTokenizer
from longspan.errors import NonFiniteError
from longspan.launch import Place, StopRequest
from longspan.models import generate
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.sample import WrittenText, prompt_tokens
from longspan.train.trained import open_trained
from tests import copied
from tests.shared import made_once
from tests.train.tiny import tiny_config, write_corpus

TIMEOUT = 600.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> str:
        values: dict[str, Any] = {"train__steps": 30, "train__seq_len": 200, "train__batch_tokens": 800}
        config = tiny_config(
            write_corpus(folder / "text"),
            folder / "run",
            **values,
            parallel__sp=1,
            sample__tokens=0,
            validation__every=0,
            checkpoint__every=15,
        )
        assert train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest()) == 0
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, "generate-run", make))


@pytest.fixture(autouse=True)
def threads() -> Any:
    """The command sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write(run: Path, *options: str, code: int = 0) -> None:
    """The command in this process, which must end with this exit code."""
    assert main(["generate", "--run", str(run), "--parallel.threads", "1", *options]) == code


def expected(run: Path, prompt: str, count: int) -> str:
    """By the whole sequence computed again for each token."""
    trained = open_trained(run)
    tokens = prompt_tokens(trained.tokenizer, prompt, "reset")
    num_given = len(tokens)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(trained.model(torch.tensor([tokens]))[0, -1].argmax()))
    return ByteTokenizer().decode(tokens[num_given:])


def command(run: Path, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return copied.run(["generate", "--run", run, *options], stdin)


def test_text_alone_is_on_stdout(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, "--prompt", "alpha be", "--max_new_tokens", "12")
    shown = capsys.readouterr()
    assert shown.out == expected(run, "alpha be", 12) and len(shown.out) == 12
    first, last = shown.err.splitlines()
    assert first == f"longspan: the checkpoint of step 30 in {run}, float32"
    assert re.fullmatch(
        r"longspan: prompt of 8 tokens read in [\d.]+ s on 1 process; 12 tokens written in [\d.]+ s, [\d.,]+ a second; ended after "
        "max_new_tokens 12",
        last,
    )


def test_two_ranks_read_a_prompt_on_stdin_and_write_the_same(run: Path) -> None:
    done = command(run, "--max_new_tokens", "12", "--parallel.sp", "2", stdin=b"alpha be")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == expected(run, "alpha be", 12)
    assert b"prompt of 8 tokens read in " in done.stderr and b" s on 2 ranks; " in done.stderr


def test_a_prompt_is_read_in_segments_that_give_memory_back(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every eighth of them: of 41 tokens there are 21."""
    released: list[None] = []
    monkeypatch.setattr("longspan.train.memory.release_freed_memory", lambda: released.append(None))
    prompt = "alpha beta gamma alpha beta gamma alpha be"
    write(run, "--prompt", prompt, "--segment_tokens", "2", "--max_new_tokens", "5")
    assert capsys.readouterr().out == expected(run, prompt, 5)
    assert len(released) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]])
def test_a_prompt_file_is_read_as_it_is_by_local_ranks_and_those_of_torchrun(
    run: Path, tmp_path: Path, launcher: list[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("älpha\nbeta ".encode())
    options = ["--run", str(run), "--prompt_file", str(file), "--max_new_tokens", "9", "--parallel.sp", "2"]
    arguments = [sys.executable, *launcher, "-m", "longspan", "--", "generate", *options]
    done = subprocess.run(arguments, capture_output=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == expected(run, "älpha\nbeta ", 9)


def test_a_text_ends_before_a_stop_string(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = expected(run, "alpha be", 12)
    stop = whole[4:7]
    write(run, "--prompt", "alpha be", "--stop", "ZZ", stop)
    shown = capsys.readouterr()
    assert shown.out == whole[: whole.index(stop)]
    assert f"ended before the stop string {stop!r}" in shown.err


class Shown(io.StringIO):
    """What a command has written so far, to a terminal or not."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize(("is_terminal", "whole"), [(True, "a\ufffd[2Jé\n\tb\n"), (False, "a\x1b[2Jé\n\tb")])
def test_text_is_shown_as_it_comes_and_nothing_that_a_terminal_would_obey(
    run: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, whole: str
) -> None:
    shown = Shown(is_terminal)
    before_each: list[str] = []

    def tokens(*given: Any, **options: Any) -> Iterator[int]:
        for token in "a\x1b[2Jé\n\tb".encode():
            before_each.append(shown.getvalue())
            yield token

    monkeypatch.setattr("longspan.models.decode", tokens)
    monkeypatch.setattr(sys, "stdout", shown)
    write(run, "--prompt", "alpha")
    assert shown.getvalue() == whole
    # Each token is there before the next one is computed; of a character of two bytes nothing before the second.
    assert before_each == [whole[:count] for count in (0, 1, 2, 3, 4, 5, 5, 6, 7, 8)]


def test_a_reader_who_has_enough_ends_the_text(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ``longspan generate ... | head -1`` has it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        write(run, "--prompt", "alpha", "--max_new_tokens", "9")
    assert capsys.readouterr().err == f"longspan: the checkpoint of step 30 in {run}, float32\n"


def test_a_seed_gives_the_same_text_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompt", "a", "--max_new_tokens", "30", "--temperature", "3", "--top_k", "200", "--top_p", "0.99"]
    texts = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        write(run, *options, *more)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_penalty_makes_repetitions_rare(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for penalty in ("1", "50"):
        write(run, "--prompt", "alpha be", "--max_new_tokens", "12", "--repetition_penalty", penalty)
        counts.append(len(set(capsys.readouterr().out)))
    assert counts[0] < counts[1]


def test_checkpoints_by_step_and_the_weights_file_are_taken(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def logits(which: str) -> torch.Tensor:
        with torch.no_grad():
            return open_trained(run, which).model(torch.tensor([[97, 98, 99]]))

    assert torch.equal(logits("newest"), logits("weights"))
    assert torch.equal(logits("30"), logits("weights"))
    assert not torch.equal(logits("15"), logits("weights"))
    other = tmp_path / "other.safetensors"
    # Without a description, the run says what the model is.
    save_file({name: 0 * weight for name, weight in load_file(run / "weights.safetensors").items()}, other)
    assert not logits(str(other)).any()
    for which, source in (("15", f"the checkpoint of step 15 in {run}"), ("weights", f"{run / 'weights.safetensors'}")):
        write(run, "--prompt", "a", "--checkpoint", which, "--max_new_tokens", "1", "--dtype", "bfloat16")
        assert capsys.readouterr().err.startswith(f"longspan: {source}, bfloat16\n")


def test_a_run_without_checkpoints_has_its_weights_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    write(copy, "--prompt", "a", "--max_new_tokens", "1")
    assert capsys.readouterr().err.startswith(f"longspan: {copy / 'weights.safetensors'}, float32\n")
    (copy / "weights.safetensors").unlink()
    write(copy, "--prompt", "a", code=2)
    assert "has no complete checkpoint, and no weights.safetensors" in capsys.readouterr().err
    write(copy, "--prompt", "a", "--checkpoint", "weights", code=2)
    assert "has no weights.safetensors, which is written at a run's end" in capsys.readouterr().err


def test_a_context_beyond_that_of_training_is_warned_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length, warns in ((199, False), (200, True)):
        write(run, "--prompt", "a" * length, "--max_new_tokens", "1")
        assert ("warning: " in capsys.readouterr().err) == warns
    write(run, "--prompt", "a" * 200, "--max_new_tokens", "1")
    warning = capsys.readouterr().err.splitlines()[1]
    assert warning.startswith(
        "longspan: warning: 200 tokens of the prompt and up to 1 new ones are more than the 200 tokens"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt (prompt) is empty: there is nothing to go on from"),
        (["--prompt", "a\udcff"], "the prompt (prompt) is not UTF-8"),
        (["--prompt_file", "no-such-file"], "the prompt cannot be read from no-such-file"),
        (["--prompt", "a", "--prompt_file", "b"], "prompt and prompt_file exclude each other"),
        (["--prompt", "a", "--temperature=-1"], "temperature must be at least 0"),
        (["--prompt", "a", "--temperature", "1", "--top_p", "0"], "top_p must be greater than 0 and at most 1"),
        (["--prompt", "a", "--temperature", "1", "--top_p", "1.01"], "top_p must be greater than 0 and at most 1"),
        (["--prompt", "a", "--temperature", "1", "--top_k=-2"], "top_k must be a whole number of tokens, or 0 for all"),
        (["--prompt", "a", "--top_k", "2"], "temperature 0 always takes the likeliest one"),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens is 0; it must be at least 1"),
        (
            ["--prompt", "a", "--segment_tokens", "0"],
            "segment_tokens is 0; it must be at least 1, a token for each rank",
        ),
        (
            ["--prompt", "a", "--segment_tokens", "1", "--parallel.sp", "2"],
            "segment_tokens is 1; it must be at least 2",
        ),
        (["--prompt", "a", "--parallel.sp", "0"], "parallel.sp is 0; it must be at least 1"),
        (["--prompt", "a", "--parallel.threads", "0"], "parallel.threads is 0; it must be at least 1"),
        (["--prompt", "a", "--parallel.timeout_seconds", "0"], "parallel.timeout_seconds is 0.0; it must be a number"),
        (["--prompt", "a", "--parallel.timeout_seconds", "1e9"], "it must be a number greater than 0, at most"),
        (["--prompt", "a", "--stop", ""], "stop has an empty string"),
        (["--prompt", "a", "--checkpoint", "7"], "has no checkpoint of step 7. Those that it has: step-00000015"),
        (["--prompt", "a", "--checkpoint", "best"], "'best' are neither 'newest', 'weights', the number of a step"),
        (["--prompt", "a", "--data", "nowhere"], "nowhere holds no prepared data: it has no data.json"),
    ],
)
def test_what_does_not_fit_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["generate", "--run", str(run), *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("longspan: error: ")
    assert shown.out == ""


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "--prompt", "a", code=2)
    assert f"{str(tmp_path)!r} is no run folder: it has no config.toml" in capsys.readouterr().err


def test_an_unknown_option_is_refused_with_the_nearest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["generate", "--run", str(run), "--prompt", "a", "--temprature", "1"])
    assert ending.value.code == 2
    shown = capsys.readouterr()
    assert "--temprature" in shown.out + shown.err and "--temperature" in shown.out + shown.err


def test_pickles_and_other_files_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(run / "weights.safetensors")
    files = {name: tmp_path / name for name in ("weights.pt", "old.bin", "text.safetensors")}
    torch.save(weights, files["weights.pt"])
    torch.save(weights, files["old.bin"], _use_new_zipfile_serialization=False)
    files["text.safetensors"].write_text("not weights")
    for name, file in files.items():
        write(run, "--prompt", "a", "--checkpoint", str(file), code=2)
        shown = capsys.readouterr().err
        if name == "text.safetensors":
            assert "cannot be read as safetensors" in shown and "is a pickle" not in shown
        else:
            assert "is a pickle" in shown and "safetensors.torch.save_file(" in shown


def test_weights_in_the_form_of_hugging_face_are_to_be_imported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"model.{name}": weight for name, weight in load_file(run / "weights.safetensors").items()}, file)
    write(run, "--prompt", "a", "--checkpoint", str(file), code=2)
    shown = capsys.readouterr().err
    assert "in the form of Hugging Face" in shown and f"longspan import {tmp_path} --to RUN" in shown


def test_weights_of_another_model_or_vocabulary_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(run / "weights.safetensors")
    other = tmp_path / "other.safetensors"

    def refused(changed: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
        save_file(changed, other, metadata=metadata)
        write(run, "--prompt", "a", "--checkpoint", str(other), code=2)
        return capsys.readouterr().err

    fewer = {name: w[:200] if name in ("embedding.weight", "head.weight") else w for name, w in weights.items()}
    assert "has a vocabulary of 200 tokens, and the tokenizer one of 257" in refused(fewer)
    odd = {name: w for name, w in weights.items() if name != "norm.weight"} | {"extra": torch.zeros(2)}
    shown = refused(odd | {"head.weight": torch.zeros(3, 2)})
    assert f"the weights in {other} are not those of this model, 3 differ:" in shown
    assert all(line in shown for line in ("extra: (2,) there, missing here", "norm.weight: missing there, (16,) here"))
    assert "does not describe a model that this version knows" in refused(weights, {"LinearLlama3Config": "{}"})
    config = run / "config.toml"
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "config.toml").write_text(config.read_text())
    manifest = json.loads((copy / "data" / "data.json").read_text())
    (copy / "data" / "data.json").write_text(json.dumps(manifest | {"vocab_size": 300}))
    write(copy, "--prompt", "a", code=2)
    assert f"the tokenizer of {copy} is with its prepared data" in capsys.readouterr().err


def test_the_sample_of_a_run_is_that_text_too(run: Path) -> None:
    trained = open_trained(run)
    tokens = prompt_tokens(trained.tokenizer, "alpha be", "reset")
    pieces = list(
        WrittenText(trained.tokenizer, tokens, generate(trained.model, torch.tensor(tokens), max_new_tokens=12))
    )
    assert "".join(pieces) == expected(run, "alpha be", 12)


def test_text_before_logits_that_are_no_numbers_is_given_out() -> None:
    def tokens() -> Iterator[int]:
        yield from b"an en"
        raise NonFiniteError("no numbers")

    text = WrittenText(ByteTokenizer(), [97], tokens(), ("end",))
    pieces = []
    with pytest.raises(NonFiniteError):
        for piece in text:
            pieces.append(piece)
    assert "".join(pieces) == "an en" and text.num_tokens == 5


def test_a_prompt_opens_a_document_as_training_has_them() -> None:
    tokenizer = ByteTokenizer()
    assert prompt_tokens(tokenizer, "ab", "reset") == [97, 98]
    assert prompt_tokens(tokenizer, "ab", "concatenate") == [256, 97, 98]
    assert prompt_tokens(tokenizer, "", "reset") == [256]
