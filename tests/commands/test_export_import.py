"""``longspan export`` and ``longspan import``: a run's model in Hugging Face's form and back, bit for bit, with its tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import longspan.models.hf
from longspan.cli import main
from longspan.data.tokenizer import END_OF_DOCUMENT
from longspan.launch import Place, StopRequest
from longspan.models import generate
from longspan.train.config import read_toml
from longspan.train.config_checks import check
from longspan.train.ranks import Ranks
from longspan.train.run import train_on
from longspan.train.sample import prompt_tokens
from longspan.train.trained import Trained, open_trained
from tests.compare import relative_error
from tests.shared import made_once
from tests.train.tiny import tiny_config, write_corpus

TEXT = "alpha bé\n\n  gamma, \x00 <unk> [SEP] 12"

KINDS: dict[str, dict[str, Any]] = {
    "bytes": {},
    "bpe": {
        "data__tokenizer": "bpe",
        "data__vocab_size": 270,
        "data__documents": "concatenate",
        "model__tie_embeddings": True,
        "model__num_kv_heads": 2,
        "model__rope_factor": 8.0,
        "model__rope_original_length": 64,
    },
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> str:
        values: dict[str, Any] = {"train__steps": 4, "checkpoint__every": 2, "sample__tokens": 0, "parallel__sp": 1}
        config = tiny_config(write_corpus(folder / "text"), folder / "run", **values, **KINDS[request.param])
        assert train_on(Ranks(Place(), torch.device("cpu")), config, StopRequest()) == 0
        return str(folder / "run")

    return Path(made_once(tmp_path_factory, f"export-{request.param}", make))


@pytest.fixture(autouse=True)
def threads() -> Any:
    """A run sets their number."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


def ids_of(trained: Trained, text: str) -> list[int]:
    return prompt_tokens(trained.tokenizer, text, trained.config.data.documents)


def test_an_exported_model_and_its_tokenizer_are_those_of_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("export", "--run", run, "--to", tmp_path / "out")
    first, *files = capsys.readouterr().out.splitlines()
    trained = open_trained(run)
    assert re.fullmatch(rf"the checkpoint of step 4 in {run}: [\d,]+ parameters, float32", first)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert [Path(line.strip()).name for line in files] == names
    assert len({(tmp_path / "out" / name).stat().st_mode for name in names}) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model) is longspan.models.hf.LinearLlamaForCausalLM
    for (name, ours), theirs in zip(trained.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    config, length = model.config, trained.config.train.seq_len
    assert (config.max_position_embeddings, config.documents) == (length, trained.config.data.documents)
    end = trained.tokenizer.end_of_document
    assert (config.eos_token_id, model.generation_config.eos_token_id) == (end, end)
    assert model.generation_config.pad_token_id == end
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token is None
    # Text that spells the end of a document is that token there, and mere text here.
    assert tokenizer(f"a{END_OF_DOCUMENT}").input_ids == [*ids_of(trained, "a"), end]
    assert ids_of(trained, f"a{END_OF_DOCUMENT}")[-1] != end
    assert tokenizer(TEXT).input_ids == ids_of(trained, TEXT)
    assert tokenizer.decode(trained.tokenizer.encode([TEXT])[0]) == TEXT
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.model_max_length) == (config.vocab_size, end, length)
    given = tokenizer("alpha be", return_tensors="pt")
    made = model.generate(**given, max_new_tokens=9, do_sample=False, eos_token_id=None)
    want = list(generate(trained.model, given.input_ids[0], max_new_tokens=9))
    assert made[0, given.input_ids.shape[1] :].tolist() == want


# A BPE is a file of its own, which bytes are not.
@pytest.mark.slow_rows(r"^bytes$")
def test_there_and_back_every_byte_is_the_same(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In both forms, in one file or several; and text, and the config that a training would have."""
    command("export", "--run", run, "--to", tmp_path / "out")
    command("import", tmp_path / "out", "--to", tmp_path / "run")
    command("export", "--run", tmp_path / "run", "--to", tmp_path / "again")
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    capsys.readouterr()
    command("export", "--run", run, "--to", tmp_path / "shards", "--max_shard_size", "3KB")
    assert "model.safetensors.index.json" in capsys.readouterr().out
    command("import", tmp_path / "shards", "--to", tmp_path / "of-shards")
    assert (tmp_path / "of-shards" / "weights.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()
    texts = []
    for folder in (run, tmp_path / "run"):
        capsys.readouterr()
        command("generate", "--run", folder, "--prompt", "alpha be", "--max_new_tokens", "9", "--parallel.threads", "1")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    ours, theirs = open_trained(run), open_trained(tmp_path / "run")
    assert theirs.source == str(tmp_path / "run" / "weights.safetensors")
    assert ids_of(ours, TEXT) == ids_of(theirs, TEXT)
    assert theirs.config.model == ours.config.model
    assert theirs.config.train.seq_len == ours.config.train.seq_len
    assert theirs.config.data.documents == ours.config.data.documents
    check(theirs.config)


def test_an_earlier_checkpoint_is_exported_where_that_is_asked(run: Path, tmp_path: Path) -> None:
    command("export", "--run", run, "--to", tmp_path / "out", "--checkpoint", "2")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.embedding.weight, open_trained(run, "2").model.embedding.weight)
    assert not torch.equal(model.model.embedding.weight, open_trained(run).model.embedding.weight)


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    command("export", "--run", run, "--to", tmp_path / "out")
    return tmp_path / "out"


def refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run = exported.parent / "refused"
    command("import", exported, "--to", run, code=2)
    shown = capsys.readouterr()
    assert shown.err.startswith("longspan: error: ") and shown.out == "" and not run.exists()
    return shown.err


def test_a_model_trained_further_by_transformers_comes_back(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 too, whose numbers float32 has, and without a tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "changed")
    command("import", tmp_path / "changed", "--to", tmp_path / "run")
    assert "no tokenizer: " in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    for name, parameter in model.model.named_parameters():
        assert weights[name].dtype == torch.float32 and torch.equal(weights[name], parameter.float())
    command("generate", "--run", tmp_path / "run", "--prompt", "a", code=2)
    assert "If that is elsewhere, say where (--data)" in capsys.readouterr().err


def test_missing_extra_and_misshapen_tensors_are_all_listed(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(exported / "model.safetensors")
    gone = [name for name in weights if ".feed_forward." in name]
    changed = {name: weight for name, weight in weights.items() if name not in gone}
    changed |= {"model.norm.weight": torch.zeros(3), **{f"model.extra.{i}": torch.zeros(2) for i in range(12)}}
    save_file(changed, exported / "model.safetensors", {"format": "pt"})
    shown = refused(exported, capsys)
    assert f"the weights in {exported} are not those of this model, {len(gone) + 13} differ:" in shown
    assert "norm.weight: (3,) there, (16,) here" in shown
    assert all(f"{name.removeprefix('model.')}: missing there, (" in shown for name in gone)
    assert all(f"extra.{i}: (2,) there, missing here" in shown for i in range(12))


def test_a_matrix_that_is_tied_may_be_there_twice(exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    weights["model.head.weight"] = weights.get("model.head.weight", weights["model.embedding.weight"]).clone()
    save_file(weights, exported / "model.safetensors", {"format": "pt"})
    command("import", exported, "--to", tmp_path / "run")


def test_pickles_other_architectures_and_damaged_files_are_refused(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    assert "a model of the type 'llama', and LinearLlamaConfig is of 'linear_llama3'" in refused(exported, capsys)
    (exported / "config.json").write_text(json.dumps(config | {"pattern": "LX"}))
    assert "pattern must be letters L" in refused(exported, capsys)
    (exported / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(exported, capsys)
    (exported / "config.json").write_text(json.dumps(config))
    weights = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    assert "model.safetensors cannot be read as safetensors" in refused(exported, capsys)
    (exported / "model.safetensors").unlink()
    assert "has no weights: neither model.safetensors nor model.safetensors.index.json" in refused(exported, capsys)
    torch.save(weights, exported / "pytorch_model.bin")
    shown = refused(exported, capsys)
    assert "weights in pytorch_model.bin alone, which are pickles" in shown and "safetensors.torch.save_file(" in shown
    shutil.copy(exported / "pytorch_model.bin", exported / "model.safetensors")
    assert "model.safetensors is a pickle" in refused(exported, capsys)


def test_wide_weights_and_other_vocabularies_are_refused(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    model.resize_token_embeddings(280, mean_resizing=False)
    model.save_pretrained(exported)
    shown = refused(exported, capsys)
    assert "has a vocabulary of 280 tokens, and its tokenizer.json one of 2" in shown
    assert "model.resize_token_embeddings(2" in shown
    model.double().save_pretrained(exported)
    assert "is torch.float64, and a run keeps weights in float32" in refused(exported, capsys)


def test_folders_that_hold_something_are_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    command("export", "--run", run, "--to", tmp_path / "full", code=2)
    assert "is not empty: a model would be mixed up with what is there" in capsys.readouterr().err
    command("export", "--run", run, "--to", tmp_path / "out")
    command("import", tmp_path / "out", "--to", tmp_path / "full", code=2)
    assert "is not empty, and a run never overwrites another one" in capsys.readouterr().err
    command("export", "--run", tmp_path, "--to", tmp_path / "other", code=2)
    assert "is no run folder" in capsys.readouterr().err


def test_without_transformers_both_say_what_to_install(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command("export", "--run", run, "--to", tmp_path / "out", code=2)
    assert "longspan export needs Transformers, which is not installed" in capsys.readouterr().err
    command("import", run, "--to", tmp_path / "run", code=2)
    assert "pip install 'longspan[transformers]'" in capsys.readouterr().err


# The tokenizer comes back in the test above, of either kind.
@pytest.mark.slow_rows(r"^bpe$")
def test_the_config_of_an_imported_run_trains_on(exported: Path, tmp_path: Path) -> None:
    command("import", exported, "--to", tmp_path / "run")
    config = read_toml(tmp_path / "run" / "config.toml")
    assert config.train.init == str(tmp_path / "run")
    options = {
        "data.source": str(write_corpus(tmp_path / "text")),
        "run.dir": str(tmp_path / "further"),
        "run.measure_alone": "False",
        "train.steps": "1",
        "optim.lr": "1e-9",
        "sample.tokens": "0",
        "parallel.sp": "1",
        "validation.sequences": "1",
        "data.validation_fraction": "0.3",
    }
    given = [text for key, value in options.items() for text in (f"--{key}", value)]
    command("train", "--config", tmp_path / "run" / "config.toml", *given)
    before, after = open_trained(tmp_path / "run"), open_trained(tmp_path / "further")
    for (name, ours), theirs in zip(before.model.named_parameters(), after.model.parameters(), strict=True):
        assert relative_error(theirs, ours, floor=1.0) < 1e-6, name
    assert ids_of(before, TEXT) == ids_of(after, TEXT)
