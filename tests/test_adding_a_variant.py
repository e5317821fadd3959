"""The variant that docs/adding_a_variant.md adds passes the conformance checks, and the page shows the files as they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import longspan
from longspan.errors import ConfigError, InputError
from longspan.models import MIXERS, LinearLlama3Config
from longspan.ops.variants import VARIANTS, Variant
from tests.attention.test_conformance import errors_on_rank
from tests.compare import relative_error, worst
from tests.models.test_every_mixer import differences_on_rank
from tests.models.tiny import random_tokens, tiny_model
from tests.ops.test_variants import run, worst_error
from tests.ranks import run_on_ranks
from tests.variants import make_inputs

PROJECT_ROOT = Path(__file__).resolve().parent.parent
PAGE = (PROJECT_ROOT / "docs" / "adding_a_variant.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


THE_FILE, ITS_USE, ITS_MIXER = blocks("python")


@contextmanager
def listed(source: str) -> Iterator[str]:
    """The name of the variant that `source` makes, which is in VARIANTS meanwhile."""
    namespace: dict[str, Any] = {"__name__": "the page's file"}
    exec(compile(source, "<adding_a_variant.md>", "exec"), namespace)
    known = list(VARIANTS.values())
    (made,) = (value for value in namespace.values() if isinstance(value, Variant) and value not in known)
    assert made.name not in VARIANTS
    VARIANTS[made.name] = made
    try:
        yield made.name
    finally:
        del VARIANTS[made.name]


@pytest.mark.parametrize("form", ["fused", "overlapped"])
@pytest.mark.parametrize("documents", [None, [0, 1, 9, 30, 100]], ids=str)
def test_the_chunk_form_equals_the_recurrent_form(documents: list[int] | None, form: str) -> None:
    with listed(THE_FILE) as name:
        inputs = make_inputs(name, 100, documents=documents, heads=4, key_heads=2)
        assert "g" in inputs.leaf_names()
        assert worst_error(*run(name, inputs, form)) < 1e-10


def errors_of_the_pages_variant(source: str, *arguments: Any) -> dict[str, float]:
    with listed(source) as name:
        return errors_on_rank(name, *arguments)


@pytest.mark.parametrize("documents", [None, [0, 1, 2, 20, 51, 64]], ids=str)
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_two_ranks_equal_the_recurrent_form(order: str, documents: list[int] | None) -> None:
    options = {"heads": 2, "batch": 2 if documents is None else 1}
    arguments = ("auto", order, documents, 64, "fused", options)
    for errors in run_on_ranks(2, errors_of_the_pages_variant, THE_FILE, *arguments):
        assert "dg" in errors
        assert worst(errors) < 1e-10, errors


def test_a_wrong_file_would_fail() -> None:
    wrong = THE_FILE.replace('GLA.prepare(k, v, {"g": g}', 'GLA.prepare(k, v, {"g": 2 * g}')
    assert wrong != THE_FILE
    with listed(wrong) as name:
        assert worst_error(*run(name, make_inputs(name, 40))) > 1e-3
    for errors in run_on_ranks(2, errors_of_the_pages_variant, wrong, "auto", "contiguous", None, 40, "fused", {}):
        assert errors["o"] > 1e-3


def test_it_is_used_as_the_page_says() -> None:
    with listed(THE_FILE):
        exec(compile(ITS_USE, "<adding_a_variant.md>", "exec"), {})


# Documents have all that one document has.
@pytest.mark.slow_rows(r"^None$")
@pytest.mark.parametrize("documents", [None, [0, 9, 40]], ids=str)
def test_it_has_the_kernels(documents: list[int] | None) -> None:
    with listed(THE_FILE) as name:
        inputs = make_inputs(name, 40, documents=documents, dtype=torch.float32)
        assert worst_error(*run(name, inputs, backend="triton", chunk_size=16)) < 5e-6


def test_what_it_does_not_reach_is_an_error_that_says_so() -> None:
    with listed(THE_FILE) as name:
        x = torch.randn(1, 8, 2, 4)
        with pytest.raises(InputError, match="one of 'torch', 'triton'; got 'fla'"):
            longspan.write(name, x, x, g=-torch.rand(1, 8, 4), backend="fla")
        with pytest.raises(ConfigError, match=r"got 'shared_gla'. Did you mean"):
            LinearLlama3Config(vocab_size=8, operator=name)


@contextmanager
def with_mixer() -> Iterator[str]:
    """The name of the page's mixer, which is in MIXERS meanwhile, and its variant in VARIANTS."""
    namespace: dict[str, Any] = {"__name__": "the page's mixer"}
    exec(compile(ITS_MIXER, "<adding_a_variant.md>", "exec"), namespace)
    with listed(THE_FILE) as name:
        mixer = namespace["SharedGLAMixer"]
        assert mixer.name == name
        MIXERS[name] = mixer
        try:
            yield name
        finally:
            del MIXERS[name]


def differences_of_the_pages_mixer(order: Any, documents: tuple[int, ...] | None) -> dict[str, float]:
    with with_mixer() as name:
        return differences_on_rank(name, order, documents)


@pytest.mark.parametrize("documents", [None, (0, 1, 30, 52, 75)], ids=str)
def test_its_mixer_runs_over_ranks(documents: tuple[int, ...] | None) -> None:
    for differences in run_on_ranks(2, differences_of_the_pages_mixer, "zigzag", documents):
        assert worst(differences) < 1e-10, differences


def test_its_mixer_decodes() -> None:
    with with_mixer() as name:
        model, tokens = tiny_model(operator=name), random_tokens(1, 20)
        with torch.no_grad():
            _, memory = model(tokens[:, :19], output_memory=True)
            assert relative_error(model(tokens[:, 19:], memory=memory), model(tokens)[:, 19:]) < 1e-11


THE_DELTA_RULES_FILE = """
from longspan.ops.delta import DeltaVariant
from longspan.ops.gates import DecayKind


def recurrent(q, k, v, gates, scale, initial_state):
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        state = gates["log_decay"].exp()[:, None, None] * state
        state = state + gates["beta"][:, t, :, None, None] * key * (value - key.mT @ state)
        outputs.append(scale * (q[:, t, :, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1), state


DELTA_RETENTION = DeltaVariant(name="delta_retention", decay=DecayKind.HEAD, recurrent_form=recurrent)
"""


def test_a_declaration_is_a_variant_and_a_backend_that_lacks_it_an_error() -> None:
    """The delta rule with a constant decay per head, which no file here has."""
    with listed("import torch\n" + THE_DELTA_RULES_FILE) as name:
        assert worst_error(*run(name, make_inputs(name, 70, documents=[0, 5, 70], heads=4, key_heads=2))) < 1e-10
        x, beta = torch.randn(1, 8, 2, 4), torch.rand(1, 8, 2)
        with pytest.raises(InputError, match="no delta rule with a decay of kind HEAD"):
            longspan.write(name, x, x, log_decay=[-0.1, -0.2], beta=beta, backend="fla")
        with pytest.raises(InputError, match="one of 'torch', 'fla'; got 'triton'"):
            longspan.write(name, x, x, log_decay=[-0.1, -0.2], beta=beta, backend="triton")


def test_the_page_changes_lines_that_are_there() -> None:
    added = []
    for number, diff in enumerate(blocks("diff")):
        folder = ("ops/variants", "models/mixers")[number // 2]
        listing = (PROJECT_ROOT / "longspan" / folder / "__init__.py").read_text(encoding="utf-8")
        added += [line[1:] for line in diff.splitlines() if line.startswith("+")]
        assert "\n".join(line[1:] for line in diff.splitlines() if line.startswith(" ")) in listing
    with listed(THE_FILE) as name:
        constant, mixer = name.upper(), "SharedGLAMixer"
        assert added == [
            f"from longspan.ops.variants.{name} import {constant}",
            f"        {constant},",
            f"from longspan.models.mixers.{name} import {mixer}",
            f"        {mixer},",
        ]
        assert f"longspan/ops/variants/{name}.py" in PAGE and f"longspan/models/mixers/{name}.py" in PAGE


def test_what_the_page_points_to_is_there() -> None:
    for path in re.findall(r"`((?:longspan/|ops/)?[a-z_/]+\.py)`", PAGE):
        if not path.endswith("/shared_gla.py"):
            found = path if path.startswith("longspan/") else f"longspan/{path}"
            assert (PROJECT_ROOT / found).exists(), path
    for word in ("DecayVariant", "DeltaVariant", "ChunkForm"):
        assert re.search(rf"^class {word}\(", "".join(_sources()), flags=re.MULTILINE), word
    (command,) = blocks("bash")
    assert all((PROJECT_ROOT / folder).is_dir() for folder in re.findall(r"tests/\w+", command))


def _sources() -> Iterator[str]:
    for path in (PROJECT_ROOT / "longspan" / "ops").rglob("*.py"):
        yield path.read_text(encoding="utf-8")
