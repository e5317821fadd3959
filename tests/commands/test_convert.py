"""``longspan convert``: a run folder of a Llama that is generated from, exported and trained further, a report, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.cli import main
from longspan.data.prepare import prepare_corpus
from longspan.data.recipe import Recipe
from longspan.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from longspan.train.config import DataConfig, read_toml
from longspan.train.config_checks import check
from longspan.train.init import same_meaning
from longspan.train.tokenizer_files import write_tokenizer
from longspan.train.trained import open_trained
from tests.models.llama import random_llama, saved
from tests.train.tiny import write_corpus

TRANSFER = (
    *("--transfer.steps", "3", "--transfer.seq_len", "40", "--transfer.batch_tokens", "80"),
    *("--transfer.validation_sequences", "2"),
)


@pytest.fixture(autouse=True)
def threads() -> Any:
    """A run sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """With a tokenizer of its own."""
    tokenizer = train_bpe([path.read_text() for path in text.iterdir()], 270)
    folder = saved(
        random_llama(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end_of_document, num_hidden_layers=2),
        tmp_path_factory.mktemp("llama"),
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


def command(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    command("convert", *arguments, code=2)
    return capsys.readouterr().err


def test_a_llama_becomes_a_run_that_everything_goes_on_from(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command("convert", llama, "--to", run, "--pattern", "LN", "--operator", "gla", "--data.source", text, *TRANSFER)
    shown = capsys.readouterr()
    assert "attention transfer, step 3 of 3: error" in shown.err
    assert f"{llama}: " in shown.out and "layers gla, softmax" in shown.out
    assert "attention transfer, 3 steps of 80 tokens" in shown.out
    for name in ("config.toml", "weights.safetensors", "tokenizer.json", "conversion.md", "conversion.json"):
        assert f"  {run / name}\n" in shown.out
        assert (run / name).is_file()
    trained = open_trained(run)
    assert trained.model.config.layer_operators == ("gla", "softmax")
    report = json.loads((run / "conversion.json").read_text())
    assert report["num_parameters"] == trained.model.num_parameters()
    assert report["num_taken"] == sum(tensor["num_taken"] for tensor in report["tensors"])
    assert [tensor["name"] for tensor in report["tensors"]] == [name for name, _ in trained.model.named_parameters()]
    assert 0 < report["error_after"]["0"] < report["error_before"]["0"]
    page = (run / "conversion.md").read_text()
    assert (
        "| blocks.0.mixer.v_proj.weight | 64 × 64 | model.layers.0.self_attn.v_proj.weight | copied, each head 2 times |"
        in page
    )
    assert f"| 0 | gla | {report['error_before']['0']:.4f} | {report['error_after']['0']:.4f} |" in page

    command("generate", "--run", run, "--prompt", "alpha ", "--max_new_tokens", "5", "--parallel.threads", "1")
    command("export", "--run", run, "--to", tmp_path / "exported")
    config = read_toml(run / "config.toml")
    check(config)
    assert (config.train.init, config.train.seq_len) == (str(run), 128)
    command(
        *("train", "--config", run / "config.toml", "--run.dir", tmp_path / "further", "--parallel.sp", "1"),
        *("--train.steps", "1", "--optim.lr", "1e-9", "--validation.every", "0", "--sample.tokens", "0"),
        *("--train.seq_len", "64", "--train.batch_tokens", "64", "--run.measure_alone", "False"),
    )
    further = open_trained(tmp_path / "further").model
    for one, other in zip(trained.model.parameters(), further.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.slow
def test_attention_transfer_over_ranks_makes_the_same_run(
    llama: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of them writes, and says how it goes."""
    given = ("--pattern", "LN", "--operator", "gla", "--data.source", text, *TRANSFER)
    command("convert", llama, "--to", tmp_path / "alone", *given)
    capfd.readouterr()
    command("convert", llama, "--to", tmp_path / "ranks", *given, "--parallel.sp", "2", "--parallel.threads", "1")
    shown = capfd.readouterr()
    assert shown.err.count("attention transfer, step 3 of 3: error") == 1
    assert shown.out.count(f"  {tmp_path / 'ranks' / 'weights.safetensors'}") == 1
    reports = [json.loads((tmp_path / name / "conversion.json").read_text()) for name in ("alone", "ranks")]
    for key in ("error_before", "error_after"):
        assert reports[1][key] == pytest.approx(reports[0][key], rel=1e-4)
    alone, ranks = (open_trained(tmp_path / name).model for name in ("alone", "ranks"))
    for (name, one), other in zip(alone.named_parameters(), ranks.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), name


def test_the_bytes_of_an_export_are_a_tokenizer(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Llama that has the tokenizer.json of longspan export reads bytes, as the exported model."""
    folder = saved(random_llama(vocab_size=257, eos_token_id=256, num_hidden_layers=2), tmp_path / "llama")
    write_tokenizer(ByteTokenizer(), folder, begins_with_end=False, length=128)
    command("convert", folder, "--to", tmp_path / "run", "--pattern", "LN", "--data.source", text, *TRANSFER)
    assert "tokenizer" not in capsys.readouterr().out.replace("tokenizer.json", "")
    trained = open_trained(tmp_path / "run")
    assert isinstance(trained.tokenizer, ByteTokenizer)
    assert trained.config.data.tokenizer == "bytes"
    command("generate", "--run", tmp_path / "run", "--prompt", "alpha ", "--max_new_tokens", "3")


def test_prepared_data_gives_the_tokenizer_where_a_llama_has_none(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = DataConfig(source=(str(text),), tokenizer="bytes", validation_fraction=0.3)
    prepare_corpus(Recipe.of(asked, 0), tmp_path / "data")
    folder = saved(random_llama(vocab_size=257, num_hidden_layers=2), tmp_path / "llama")
    given = ("--data.prepared", tmp_path / "data", "--data.documents", "concatenate")
    command("convert", folder, "--to", tmp_path / "run", "--pattern", "hgrn2", *given, *TRANSFER)
    assert f"the tokenizer is that of {tmp_path / 'data'}" in capsys.readouterr().out
    trained = open_trained(tmp_path / "run")
    assert trained.model.config.layer_operators == ("hgrn2", "hgrn2")
    assert trained.config.data.prepared == str(tmp_path / "data")
    assert trained.config.data.documents == "concatenate"


def test_layers_by_name_a_window_and_no_transfer(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--pattern", "kda", "softmax", "--window", "9", "--transfer.calibrate", "False")
    command("convert", llama, "--to", tmp_path / "run", *given)
    trained = open_trained(tmp_path / "run")
    assert trained.model.config.layer_operators == ("kda", "softmax")
    assert trained.model.config.window == 9
    assert same_meaning(trained.tokenizer, load_tokenizer(llama / "tokenizer.json"))
    assert "attention transfer" not in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "conversion.json").read_text())
    assert report["error_before"] is None and report["transfer"]["calibrate"] is False


def test_without_a_tokenizer_it_says_so(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None at all, or one of another size, as of a vocabulary that was filled up."""
    folder = saved(random_llama(vocab_size=300, num_hidden_layers=2), tmp_path / "llama")
    command("convert", folder, "--to", tmp_path / "a", "--pattern", "N")
    assert f"no tokenizer: {folder} has no tokenizer.json" in capsys.readouterr().out
    (folder / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    command("convert", folder, "--to", tmp_path / "b", "--pattern", "N")
    shown = capsys.readouterr().out
    assert f"{folder / 'tokenizer.json'} has 270 tokens, and the model 300" in shown
    assert (tmp_path / "b" / "weights.safetensors").is_file() and not (tmp_path / "b" / "tokenizer.json").exists()


def test_a_conversion_that_was_refused_on_its_way_is_made_again_in_its_folder(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that is there is not made over."""
    given = (llama, "--to", tmp_path / "run", "--pattern", "LN", "--data.source", text)
    long = ("--transfer.steps", "1", "--transfer.seq_len", "99999", "--transfer.batch_tokens", "99999")
    assert "fewer than one global batch" in refused(capsys, *given, *long)
    command("convert", *given, *TRANSFER)
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    assert "is not empty" in refused(capsys, *given, *TRANSFER, "--seed", "1")
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before


def test_what_does_not_fit_is_refused(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ("--to", tmp_path / "run")
    assert "there is no text to learn on" in refused(capsys, llama, *to, "--transfer.steps", "3")
    assert "seed is -1; it must be a whole number from 0" in refused(capsys, llama, *to, "--seed=-1")
    assert "transfer.steps is 0" in refused(capsys, llama, *to, "--data.source", text)
    both = ("--data.source", text, "--data.prepared", text)
    over = refused(capsys, llama, *to, "--parallel.sp", "2")
    assert "2 ranks are asked for, and transfer.steps is 0" in over
    short = ("--transfer.steps", "1", "--transfer.seq_len", "1", "--data.source", text, "--parallel.sp", "2")
    assert "transfer.seq_len is 1, fewer tokens than the 2 ranks" in refused(capsys, llama, *to, *short)
    assert "exclude each other" in refused(capsys, llama, *to, *both, "--transfer.steps", "3")
    shown = refused(capsys, llama, *to, "--pattern", "N", "--operator", "kda")
    assert "operator is kda, and pattern N has no letter L" in shown
    assert "Did you mean 'gated_deltanet'?" in refused(capsys, llama, *to, "--operator", "gated_delta_net")
    asked = DataConfig(source=(str(text),), tokenizer="bytes", validation_fraction=0.3)
    prepare_corpus(Recipe.of(asked, 0), tmp_path / "bytes")
    shown = refused(capsys, llama, *to, "--data.prepared", tmp_path / "bytes")
    assert "was prepared for 257 tokens" in shown and "270" in shown
    (tmp_path / "other").mkdir()
    for name in range(9):
        (tmp_path / "other" / f"{name}.txt").write_text("delta epsilon, zeta and eta " * 20)
    asked = DataConfig(source=(str(tmp_path / "other"),), vocab_size=270, validation_fraction=0.3)
    prepare_corpus(Recipe.of(asked, 0), tmp_path / "bpe")
    assert "was prepared with another tokenizer" in refused(capsys, llama, *to, "--data.prepared", tmp_path / "bpe")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    assert "is not empty" in refused(capsys, llama, "--to", tmp_path / "used")
    assert not (tmp_path / "run").exists()
