"""Options as the pages have them: every one of a command, with its default; and each command line on a page is taken."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from longspan.cli import main
from longspan.commands.convert import ConvertOnRanks
from longspan.commands.eval_lm import EvalLm
from longspan.commands.eval_loss import EvalLoss
from longspan.commands.eval_recall import EvalRecall
from longspan.commands.evaluation import EvalOptions
from longspan.commands.export import Export
from longspan.commands.generate import Generate
from longspan.commands.hidden_keys import HiddenKeyOptions
from longspan.commands.study import StudyOptions

DOCS = Path(__file__).parents[1] / "docs"
TABLES: dict[str, tuple[str, str, type, type | None]] = {
    # The page, the heading that the table stands under, the options, and those that another table has.
    "generate": ("commands.md", "Writing text", Generate, None),
    "export": ("commands.md", "To Hugging Face and back", Export, None),
    "convert": ("conversion.md", "From a Llama", ConvertOnRanks, None),
    "eval": ("evaluation.md", "Evaluation", EvalOptions, None),
    "eval loss": ("evaluation.md", "Loss", EvalLoss, EvalOptions),
    "eval recall": ("evaluation.md", "Associative recall", EvalRecall, EvalOptions),
    "eval needle, eval passkey": ("evaluation.md", "Needle and pass key", HiddenKeyOptions, EvalOptions),
    "eval lm": ("evaluation.md", "Tasks of lm-eval", EvalLm, None),
    "study": ("study.md", "A study: mixers beside each other", StudyOptions, None),
}
Row = tuple[list[str], str, str]
"""The names of a row, its default, and what it says of them."""


def rows_under(text: str, heading: str) -> Iterator[Row]:
    """Of the table of options that stands first under a heading."""
    _, found, rest = text.partition(f"# {heading}\n")
    assert found, heading
    _, found, rest = rest.partition("\n| option | default | |\n|---|---|---|\n")
    assert found, heading
    for line in rest.partition("\n\n")[0].splitlines():
        names, default, said = (cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|", 2))
        named = re.findall(r"`([^`]+)`", names)
        section = named[0].rpartition(".")[0]
        yield [name if "." in name or not section else f"{section}.{name}" for name in named], default, said


def options_of(kind: type, without: type | None = None) -> dict[str, Any]:
    """The options of a dataclass by name, with their defaults; those of its sections as ``section.option``."""
    found: dict[str, Any] = {}
    left_out = {entry.name for entry in dataclasses.fields(without)} if without is not None else set()
    for entry in dataclasses.fields(kind):
        if entry.name in left_out:
            continue
        value = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        if dataclasses.is_dataclass(value):
            found |= {f"{entry.name}.{name}": x for name, x in options_of(type(value)).items()}
        else:
            found[entry.name] = value
    return found


def is_shown_as(value: Any, cell: str) -> bool:
    """Whether a cell says a default. None and what has to be given have none: words or nothing."""
    if value is None or value is dataclasses.MISSING or value == ():
        return not re.search(r"^[\d.,]+$|^(True|False)$|^`.*`$", cell)
    if isinstance(value, tuple):
        return all(is_shown_as(x, part) for x, part in zip(value, cell.split(" "), strict=True))
    if isinstance(value, bool):
        # An option without a value.
        return cell == str(value) or (not value and not cell)
    if isinstance(value, str):
        return cell == f"`{value}`"
    try:
        return float(cell.replace(",", "")) == value
    except ValueError:
        return False


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_every_option_with_its_default(name: str) -> None:
    page, heading, kind, without = TABLES[name]
    options = options_of(kind, without)
    # What stands without a name on the command line is in the text.
    options.pop("folder", None)
    shown: list[str] = []
    for names, cell, said in rows_under((DOCS / page).read_text(encoding="utf-8"), heading):
        shown += names
        unknown = [each for each in names if each not in options]
        assert not unknown, f"{page}: {unknown}"
        if said.startswith("as in "):
            continue
        cells = re.split(", ", cell) if len(names) > 1 else [cell]
        cells = cells if len(cells) == len(names) else [cell] * len(names)
        for each, default in zip(names, cells, strict=True):
            assert is_shown_as(options[each], default), f"{page}: {each} is {options[each]!r}, and {default!r} there"
    assert sorted(shown) == sorted(options), set(shown) ^ set(options)


def test_a_wrong_default_is_seen() -> None:
    assert is_shown_as(3e-3, "3e-3") and not is_shown_as(3e-3, "3e-4")
    assert is_shown_as(12_000_000, "12,000,000") and not is_shown_as(12, "")
    assert (
        is_shown_as(None, "all") and is_shown_as((), "") and not is_shown_as(None, "8") and not is_shown_as((), "`x`")
    )
    assert is_shown_as((0.0, 0.5), "0 0.5") and not is_shown_as((0.0, 0.5), "0 0.25")
    assert is_shown_as("newest", "`newest`") and not is_shown_as("newest", "`weights`")
    assert is_shown_as(True, "True") and not is_shown_as(True, "") and is_shown_as(False, "")


def lines_of(page: Path) -> Iterator[list[str]]:
    """The arguments of each ``longspan`` in the blocks of a page that are commands."""
    for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "longspan" not in words:
                continue
            arguments = words[words.index("longspan") + 1 :]
            end = next((place for place, word in enumerate(arguments) if word in ("|", ">", "&&")), len(arguments))
            yield [word for word in arguments[:end] if word not in ("--", "...")]


class Taken(Exception):  # noqa: N818
    """The arguments of a command were taken."""


@pytest.fixture
def _nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ends where it has understood its arguments."""
    parse = tyro.cli

    def parsed(*arguments: Any, **options: Any) -> Any:
        parse(*arguments, **options)
        raise Taken

    monkeypatch.setattr(tyro, "cli", parsed)


def given(arguments: list[str]) -> str:
    """What becomes of a command line: nothing, where it is taken."""
    # Files and folders of the reader's, whose values options change.
    place = next((place for place, word in enumerate(arguments) if word in ("--config", "--resume")), len(arguments))
    try:
        code = main(arguments[:place] + arguments[place + 2 :])
    except Taken:
        return ""
    except SystemExit as ending:
        code = int(ending.code or 0)
    return f"{shlex.join(arguments)} ended with {code}"


PAGES = [page for page in sorted(DOCS.glob("*.md")) if any(lines_of(page))]


@pytest.mark.slow_rows(r"^(training|commands|reliability|data|stream|hugging_face_models)\.md$")
@pytest.mark.usefixtures("_nothing_more")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_line_of_a_page_is_taken(page: Path) -> None:
    wrong = [said for arguments in lines_of(page) if (said := given(arguments))]
    assert wrong == []


@pytest.mark.usefixtures("_nothing_more")
def test_a_wrong_command_line_is_seen() -> None:
    assert given(["generate", "--run", "a", "--prompt", "b"]) == ""
    assert given(["generate", "--run", "a", "--prompd", "b"]) == "generate --run a --prompd b ended with 2"
    assert given(["export", "--run", "a"]).endswith("ended with 2")
    assert {page.name for page in PAGES} >= {"commands.md", "conversion.md", "evaluation.md", "study.md"}
