"""A config comes from defaults, a TOML file and the command line; what does not fit is named with the way out."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.commands.train import parse_train
from longspan.errors import CheckpointError, ConfigError
from longspan.exchange import Auto, Ring
from longspan.models import PRESETS, preset
from longspan.parallel import MeshDegrees
from longspan.train import config as configs
from longspan.train.config import (
    Config,
    flatten,
    from_mapping,
    read_toml,
    to_mapping,
    to_toml,
)
from longspan.train.config_checks import check, check_degrees, num_ranks_asked_for

ROOT = Path(__file__).parents[2]


def with_values(**values: Any) -> Config:
    """The defaults with ``section__key=value``."""
    mapping: dict[str, Any] = {}
    for key, value in values.items():
        section, name = key.split("__")
        mapping.setdefault(section, {})[name] = value
    return from_mapping(mapping)


def parse(*arguments: str) -> Config:
    return parse_train(arguments)[0]


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[train]\nsteps = 7\nseed = 5\n[optim]\nlr = 1\n[model]\npattern = "LN"\n')
    config = parse(
        "--config", str(file), "--train.steps", "9", "--parallel.dp_replicate=3", "--data.suffixes", ".md", ".rst"
    )
    assert (config.train.steps, config.train.seed, config.optim.lr, config.model.pattern) == (9, 5, 1.0, ("LN",))
    assert config.parallel.dp_replicate == 3
    assert config.data.suffixes == (".md", ".rst")
    assert parse() == Config()
    assert parse(f"--config={file}").train.steps == 7


def test_a_preset_stands_for_all_keys_of_the_model_and_others_change_it(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[model]\nnum_heads = 32\npreset = "linear-llama3-1b"\noperator = "gla"\n')
    model = parse("--config", str(file), "--model.window", "512").model
    assert model.build(128_256) == preset("linear-llama3-1b", num_heads=32, operator="gla", window=512)
    # The command line's overrides the whole section of the file.
    model = parse("--model.num_layers", "4", "--model.preset=linear-llama3-tiny", "--config", str(file)).model
    assert model.build(2048) == preset("linear-llama3-tiny", num_layers=4)
    path = tmp_path / "kept.toml"
    path.write_text(to_toml(dataclasses.replace(Config(), model=model)))
    assert read_toml(path).model == model


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model_that_can_be_trained(name: str, tmp_path: Path) -> None:
    config = parse("--model.preset", name)
    assert config.model.build(PRESETS[name]["vocab_size"]) == preset(name)
    path = tmp_path / "kept.toml"
    path.write_text(to_toml(config))
    assert configs.differences(read_toml(path), config) == []


def test_a_value_that_is_none_comes_back_from_a_file_as_it_is_used(tmp_path: Path) -> None:
    """A file has no None: a key that is left out is its default, which must then be None as well."""
    path = tmp_path / "kept.toml"
    for key in flatten(Config()):
        section, name = key.split(".")
        part = getattr(Config(), section)
        kind = typing.get_type_hints(type(part))[name]
        if type(None) in typing.get_args(kind):
            config = dataclasses.replace(Config(), **{section: dataclasses.replace(part, **{name: None})})
            path.write_text(to_toml(config))
            assert configs.differences(read_toml(path), config) == [], key


def test_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    message = r"model.preset: there is no preset 'linear-lama-1b'. Did you mean 'linear-llama3-1b'\?"
    with pytest.raises(ConfigError, match=message):
        parse("--model.preset", "linear-lama-1b")
    file = tmp_path / "c.toml"
    file.write_text('[model]\npreset = "linear-lama-1b"\n')
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(file))
    file.write_text("[model]\npreset = 3\n")
    with pytest.raises(ConfigError, match=r"model.preset is 3, an int; it must be a str"):
        parse("--config", str(file))
    with pytest.raises(ConfigError, match=r"--model.preset needs a name: --model.preset linear-llama3"):
        parse("--model.preset")
    with pytest.raises(ConfigError, match=r"did you mean --model.preset\?"):
        parse("--model.presets", "linear-llama3-1b")


def test_a_list_of_mixers_is_an_option() -> None:
    model = parse("--model.pattern", "gla", "softmax", "mamba2", "softmax").model.build(50)
    assert model.layer_operators == ("gla", "softmax", "mamba2", "softmax")
    assert parse("--model.pattern", "hgrn2").model.build(50).layer_operators == ("hgrn2",) * 4


def test_a_config_comes_back_from_toml(tmp_path: Path) -> None:
    config = with_values(
        sample__prompt='a "quoted" \\ line\n\ttab \x7f \x01 é',
        optim__lr=1e-5,
        parallel__dp_replicate=2,
        data__suffixes=[".a", ".b"],
        run__dir="some where",
    )
    path = tmp_path / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert read_toml(path) == config
    assert from_mapping(to_mapping(config)) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.step", "3"], r"unknown option --train.step: did you mean --train.steps\?"),
        (["--steps=3"], r"unknown option --steps: did you mean --train.steps\?"),
        (["--optim.seq_len", "3"], r"did you mean --train.seq_len\?"),
        (["--resum"], r"did you mean --resume\?"),
        (["--xyz"], r"unknown option --xyz: the sections are data, recall, model, parallel"),
        (["--config"], r"--config needs a file"),
    ],
)
def test_an_unknown_option_names_the_nearest(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[train]\nstep = 3", r"c.toml: unknown key train.step: did you mean train.steps\?"),
        ("steps = 3", r"unknown key steps: did you mean train.steps\?"),
        ("[trian]\nsteps = 3", r"unknown key trian: .*the sections are data"),
        ("[train]\nsteps = 'x'", r"train.steps is 'x', a str; it must be an int"),
        ("[train]\nsteps = true", r"train.steps is True, a bool; it must be an int"),
        ("[model]\ntie_embeddings = 1", r"model.tie_embeddings is 1, an int; it must be a bool"),
        ("[parallel]\norder = 'zag'", r"parallel.order is 'zag'; it must be one of 'contiguous', 'zigzag'"),
        ("[data]\nsuffixes = 3", r"data.suffixes is 3; it must be a string or a list of strings"),
        ("[train", r"c.toml cannot be read as a config: .*Give a TOML file"),
    ],
)
def test_a_bad_toml_file_is_refused(tmp_path: Path, toml: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError, match=message):
        parse("--config", str(path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train__steps": 0}, r"train.steps is 0; it must be at least 1"),
        ({"parallel__sp": 0}, r"parallel.sp is 0; it must be at least 1"),
        ({"train__seed": -1}, r"train.seed is -1"),
        ({"optim__lr": 0.0}, r"optim.lr is 0.0; it must be greater than 0"),
        ({"optim__lr": float("nan")}, r"optim.lr is nan; it must be a finite number"),
        (
            {"parallel__timeout_seconds": 1e300},
            r"parallel.timeout_seconds is 1e\+300; it must be at most 31536000, a year",
        ),
        ({"optim__beta1": 1.0}, r"optim.beta1 is 1.0; it must lie between 0 and 1"),
        ({"data__validation_fraction": 0.0}, r"data.validation_fraction is 0.0; it must lie between"),
        ({"data__vocab_size": 100}, r"data.vocab_size is 100; it must be at least 257"),
        ({"data__source": []}, r"data.source is empty; it must name at least one source"),
        ({"data__weights": [1.0, 2.0]}, r"data.weights has 2 numbers for the 1 sources of data.source"),
        ({"data__weights": [0]}, r"data.weights is \[0.0\]; each must be a finite number greater than 0"),
        ({"data__weights": ["x"]}, r"data.weights is \['x'\]; it must be a list of numbers"),
        ({"data__prepared": "x", "data__tokenizer": "bytes"}, r"data.prepared is given, and so is data.tokenizer"),
        ({"train__batch_tokens": 12_000}, r"batch_tokens 12000 is no multiple of train.seq_len 8192.*multiple is 8192"),
        ({"train__seq_len": 1, "train__batch_tokens": 1}, r"train.seq_len 1 is shorter than parallel.sp 2"),
        ({"parallel__exchange": "telepathy"}, r"parallel.exchange must be 'auto' or one of .*got 'telepathy'"),
        (
            {"parallel__softmax_method": "ulysses", "parallel__sp": 8, "model__num_heads": 4},
            r"parallel.softmax_method: .*got 4 heads for 8 ranks. Use method 'ring' or 'all_gather', .*: 4 at most",
        ),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(with_values(**values))


def test_tensorboard_is_asked_for_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard is not installed. Install it with pip install 'longspan\["):
        check(with_values(run__tensorboard=True))


def test_the_exchange_is_told_what_states_travel_in() -> None:
    assert Config().parallel.build_exchange() == Auto(measure=True)
    parallel = with_values(parallel__exchange="ring", parallel__exchange_dtype="bfloat16").parallel
    assert parallel.build_exchange() == Ring(torch.bfloat16)


def test_the_defaults_are_in_range() -> None:
    check(Config())
    assert check_degrees(Config(), 2) == MeshDegrees(1, 1, 2)


def test_a_world_that_is_no_product_of_the_degrees_is_refused_with_the_legal_ones() -> None:
    with pytest.raises(
        ConfigError,
        match=r"6 ranks are not parallel.dp_replicate 1 x parallel.dp_shard 1 x parallel.sp 4 = 4.* 1 x 1 x 6,",
    ):
        check_degrees(with_values(parallel__sp=4), 6)
    with pytest.raises(
        ConfigError, match=r"8 ranks are not .*sp 2 = 4. 8 ranks can be .*: 2 x 1 x 4, 4 x 1 x 2, 2 x 2 x 2, "
    ):
        check_degrees(with_values(parallel__sp=2, parallel__dp_replicate=2), 8)
    with pytest.raises(
        ConfigError,
        match=r"8192 is 1 sequences .*dp_replicate 2 x parallel.dp_shard 2 does not divide. Use a multiple of 32768",
    ):
        check_degrees(with_values(parallel__sp=2, parallel__dp_shard=2), 8)
    assert check_degrees(with_values(parallel__sp=2, train__batch_tokens=32_768), 8) == MeshDegrees(4, 1, 2)


def test_a_key_of_former_versions_is_refused_with_what_it_has_become() -> None:
    for refused in (lambda: with_values(parallel__dp=2), lambda: parse("--parallel.dp", "2")):
        with pytest.raises(ConfigError, match=r"parallel.dp is no \w+ any more: .*dp_replicate, .*dp_shard"):
            refused()


def test_only_what_is_trained_must_stay_on_resume() -> None:
    old = Config()
    harmless = with_values(train__steps=5, parallel__sp=4, optim__lr=1e-4, data__folder="x", checkpoint__every=3)
    assert configs.changes_what_is_trained(old, harmless) == []
    changed = with_values(model__dim=64, data__vocab_size=300, train__seed=1, train__steps=5)
    assert configs.changes_what_is_trained(old, changed) == [
        "data.vocab_size: 2048 -> 300",
        f"model.dim: {old.model.dim} -> 64",
        "train.seed: 0 -> 1",
    ]


def test_resume_reads_the_runs_own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").write_text(f"[sample]\nprompt = '{name}'\n")
    config, folder = parse_train(["--resume", "runs/first", "--train.steps", "5"])
    assert folder is not None
    assert (config.sample.prompt, config.train.steps, config.run.dir) == ("first", 5, "runs/first")
    assert str(folder.path) == "runs/first"
    assert parse_train(["--train.steps", "5", "--resume"])[0].sample.prompt == "second"
    with pytest.raises(ConfigError, match="--config and --resume exclude each other"):
        parse_train(["--resume", "--config", "c.toml"])


def test_resuming_where_there_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no run in runs/ to go on with"):
        parse_train(["--resume"])
    with pytest.raises(CheckpointError, match=r"'elsewhere' is no run folder: it has no config.toml"):
        parse_train(["--resume", "elsewhere"])


def test_every_key_is_documented_with_its_default() -> None:
    documentation = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for key, value in flatten(Config()).items():
        shown = " ".join(value) if isinstance(value, tuple) else value
        assert f"\n| `{key}` | `{shown}` | " in documentation


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_the_examples_are_configs(path: Path) -> None:
    config = read_toml(path)
    check(config)
    assert check_degrees(config, num_ranks_asked_for(config)).world_size == num_ranks_asked_for(config)
    assert path.name in path.read_text()


def test_sections_hold_plain_values_alone() -> None:
    for value in flatten(Config()).values():
        assert value is None or isinstance(value, bool | int | float | str | tuple)
    assert dataclasses.is_dataclass(Config)
