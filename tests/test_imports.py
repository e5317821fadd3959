"""The directions of import hold, and `import longspan` needs torch alone."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parent.parent


def directions(text: str) -> dict[str, set[str]]:
    """What each part may import of the others, by the table of parts in docs/design.md.

    A part is a module or a subpackage directly under `longspan`; "longspan" itself is the facade, `longspan/__init__.py`. In the
    table's last column "ground" stands for the parts of the rows above the first that says it.
    """
    allowed: dict[str, set[str]] = {}
    ground: set[str] = set()
    for line in text[text.index("| parts |") :].splitlines()[2:]:
        if not line.startswith("|"):
            break
        parts, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
        allows, _, but = imports.partition(" but ")
        if "ground" in allows and not ground:
            ground = set(allowed)
        named = set(re.findall(r"`(\w+)`", allows))
        named |= ground if "ground" in allows else set(allowed) if allows == "all above" else set()
        named -= set(re.findall(r"`(\w+)`", but))
        assert named or imports == "nothing", line
        allowed |= dict.fromkeys(re.findall(r"`(\w+)`", parts), named)
    return allowed


ALLOWED = directions((PROJECT_ROOT / "docs/design.md").read_text(encoding="utf-8"))
WITHOUT_DISTRIBUTED = {"ops", "models"}
MAY_READ_ENVIRONMENT = ["longspan/launch*", "longspan/cli*"]
IMPORTING_CALLS = {"__import__", "import_module", "importlib.import_module"}
OPTIONAL_PACKAGES = [
    "accelerate",
    "datasets",
    "fla",
    "matplotlib",
    "numpy",
    "peft",
    "rich",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "transformers",
    "triton",
    "trl",
    "tyro",
    "wandb",
]


@dataclass(frozen=True)
class Import:
    """One imported module, absolute. `when_loaded` is False inside functions and under `if TYPE_CHECKING`."""

    module: str
    line: int
    when_loaded: bool


def import_breaches(source_root: Path) -> list[str]:
    """Every breach of the rules in `source_root/longspan`, as "file:line: what"."""
    files = {_module_name(path, source_root): path for path in sorted((source_root / "longspan").rglob("*.py"))}
    breaches: list[str] = []
    for module, path in files.items():
        breaches += _breaches_of_file(module, path, source_root, set(files))
    for module in sorted(_loaded_with_the_package(files)):
        path = files[module]
        for found in _imports(path, module, set(files)):
            package = found.module.partition(".")[0]
            if found.when_loaded and package not in {"longspan", "torch"} | sys.stdlib_module_names:
                where = f"{path.relative_to(source_root)}:{found.line}"
                breaches.append(f"{where}: `import longspan` would load {package}")
    return breaches


def _breaches_of_file(module: str, path: Path, source_root: Path, modules: set[str]) -> Iterator[str]:
    file = path.relative_to(source_root).as_posix()
    part = _part(module)
    if part not in ALLOWED:
        yield f"{file}:1: the part {part} is not in the table of parts in docs/design.md; add a row"
        return
    for found in _imports(path, module, modules):
        where = f"{file}:{found.line}"
        if found.module.partition(".")[0] == "longspan":
            other = _part(found.module)
            if other != part and other not in ALLOWED[part]:
                yield f"{where}: {part} must not import {other}"
        if part in WITHOUT_DISTRIBUTED and f"{found.module}.".startswith("torch.distributed."):
            yield f"{where}: {part} must not import torch.distributed"
    for node in ast.walk(_parse(path)):
        text = _dotted(node) if isinstance(node, ast.Attribute) else ""
        if part in WITHOUT_DISTRIBUTED and text == "torch.distributed":
            yield f"{_where(file, node)}: {part} must not use torch.distributed"
        names = node.names if isinstance(node, ast.ImportFrom) and node.module == "os" else []
        reads = {text, *(f"os.{name.name}" for name in names)} & {"os.environ", "os.environb", "os.getenv"}
        if reads and not any(fnmatch(file, pattern) for pattern in MAY_READ_ENVIRONMENT):
            yield f"{_where(file, node)}: environment variables are read in the launch code alone"


def _dotted(node: ast.AST) -> str:
    """What names with points between them say; of another expression, what is behind it."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _where(file: str, node: ast.AST) -> str:
    return f"{file}:{getattr(node, 'lineno', 1)}"


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _module_name(path: Path, source_root: Path) -> str:
    parts = path.relative_to(source_root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "longspan"


def _imports(path: Path, module: str, modules: set[str]) -> Iterator[Import]:
    """The modules that a file imports, wherever in the file, by statement or by `import_module("...")`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, when_loaded: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, when_loaded)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*ancestors, *filter(None, [node.module])])
            for name in node.names:
                full = f"{base}.{name.name}"
                # `from a import b`: the module a.b if there is one here, or torch's, else something that a defines.
                is_module = full in modules or full == "torch.distributed"
                yield Import(full if is_module else base, node.lineno, when_loaded)
        elif isinstance(node, ast.Call) and _dotted(node.func) in IMPORTING_CALLS:
            yield from (
                Import(str(x.value), node.lineno, when_loaded) for x in node.args[:1] if isinstance(x, ast.Constant)
            )
        if isinstance(node, ast.If) and _dotted(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, when_loaded)
            return
        inside_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, when_loaded and not inside_function)

    yield from visit(_parse(path), True)


def _loaded_with_the_package(files: dict[str, Path]) -> set[str]:
    """The modules that `import longspan` loads, found by following the imports outside functions."""
    loaded: set[str] = set()
    waiting = ["longspan"]
    while waiting:
        module = waiting.pop()
        if module in loaded or not module.startswith("longspan"):
            continue
        waiting.append(module.rpartition(".")[0])
        if module not in files:
            continue
        loaded.add(module)
        waiting += [found.module for found in _imports(files[module], module, set(files)) if found.when_loaded]
    return loaded


def test_the_package_keeps_the_directions_of_import() -> None:
    assert import_breaches(PROJECT_ROOT) == []


def test_every_part_of_the_table_is_in_the_package() -> None:
    files = {_module_name(path, PROJECT_ROOT) for path in (PROJECT_ROOT / "longspan").rglob("*.py")}
    assert {_part(module) for module in files} == set(ALLOWED)


def test_files_that_the_package_speaks_of_are_there() -> None:
    named = re.compile(r"\b(?:tests|docs|benchmarks|examples)/[\w/-]+\.(?:py|md)\b")
    files = [path for folder in ("longspan", "docs", "benchmarks") for path in (PROJECT_ROOT / folder).rglob("*.*")]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md")}
    found = {(path.name, name) for path, text in texts.items() for name in named.findall(text)}
    assert len(found) > 30
    assert sorted((path, name) for path, name in found if not (PROJECT_ROOT / name).is_file()) == []


def test_the_table_of_parts_is_read_as_it_is_written() -> None:
    table = """
| parts | what they are | may import |
|---|---|---|
| `a` | first | nothing |
| `b`, `c` | second | `a` |
| `d` | third | ground but `c` |
| `e` | fourth | ground, `d` |
| `f` | fifth | all above but `a`, `e` |
"""
    assert directions(table) == {
        "a": set(),
        "b": {"a"},
        "c": {"a"},
        "d": {"a", "b"},
        "e": {"a", "b", "c", "d"},
        "f": {"b", "c", "d"},
    }


def _write_package(root: Path, files: dict[str, str]) -> None:
    for name, source in {"__init__.py": "", **files}.items():
        path = root / "longspan" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "breach"),
    [
        ({"ops/a.py": "import longspan.exchange.b"}, "longspan/ops/a.py:1: ops must not import exchange"),
        ({"exchange/b.py": "from longspan.ops import a"}, "longspan/exchange/b.py:1: exchange must not import ops"),
        ({"exchange/b.py": "from longspan import ops", "ops/__init__.py": ""}, "exchange must not import ops"),
        ({"exchange/b.py": "from ..ops.a import f"}, "longspan/exchange/b.py:1: exchange must not import ops"),
        ({"exchange/__init__.py": "from .. import ops", "ops/__init__.py": ""}, "exchange must not import ops"),
        ({"comm/c.py": "from longspan.layout import SequenceLayout"}, "comm must not import layout"),
        ({"state.py": "from longspan.layout.sequence_layout import SequenceLayout"}, "state must not import layout"),
        ({"ops/a.py": "from longspan import linear_attention"}, "ops must not import longspan"),
        ({"attention/linear.py": "def f():\n    from longspan.models import M"}, ":2: attention must not import"),
        ({"models/m.py": "class M:\n    def f(self):\n        import longspan.train"}, ":3: models must not"),
        ({"__init__.py": "from longspan.cli import main"}, "longspan/__init__.py:1: longspan must not import cli"),
        ({"data/d.py": "import importlib\nimportlib.import_module('longspan.train')"}, "data must not import train"),
        ({"helpers.py": ""}, "the part helpers is not in the table"),
        (
            {"models/m.py": "from longspan import comm", "comm/__init__.py": ""},
            "models must not import comm",
        ),
        ({"ops/a.py": "import torch.distributed as dist"}, "ops must not import torch.distributed"),
        ({"models/m.py": "from torch import distributed"}, "models must not import torch.distributed"),
        ({"models/m.py": "from torch.distributed.device_mesh import DeviceMesh"}, "models must not import torch.dist"),
        ({"ops/a.py": "def f():\n    if x:\n        import torch.distributed"}, ":3: ops must not import torch.dist"),
        ({"ops/a.py": "if TYPE_CHECKING:\n    import torch.distributed"}, ":2: ops must not import torch.distributed"),
        ({"ops/a.py": "import torch\n\ndef f():\n    torch.distributed.barrier()"}, ":4: ops must not use torch.dist"),
        ({"state.py": "import os\nx = os.environ['RANK']"}, "state.py:2: environment variables"),
        ({"train/t.py": "import os\ndef f():\n    return os.getenv('RANK')"}, "t.py:3: environment variables"),
        ({"layout.py": "from os import environ"}, "layout.py:1: environment variables"),
        ({"__init__.py": "import numpy"}, "longspan/__init__.py:1: `import longspan` would load numpy"),
        ({"__init__.py": "import yaml"}, "longspan/__init__.py:1: `import longspan` would load yaml"),
        (
            {
                "__init__.py": "from longspan.ops import a",
                "ops/a.py": "try:\n    import triton\nexcept ImportError: ...",
            },
            "longspan/ops/a.py:2: `import longspan` would load triton",
        ),
        (
            {"__init__.py": "from longspan.ops.a import f", "ops/__init__.py": "import fla"},
            "longspan/ops/__init__.py:1: `import longspan` would load fla",
        ),
        ({"__init__.py": "class A:\n    from rich import print"}, "`import longspan` would load rich"),
    ],
)
def test_each_kind_of_breach_is_found(tmp_path: Path, files: dict[str, str], breach: str) -> None:
    _write_package(tmp_path, files)
    found = import_breaches(tmp_path)
    assert any(breach in line for line in found), found


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    _write_package(
        tmp_path,
        {
            "__init__.py": "from longspan.attention.linear import f\nfrom longspan.layout.sequence_layout import SequenceLayout",
            "layout.py": "import torch.distributed as dist\nfrom .errors import LayoutError",
            "errors.py": "",
            "ops/a.py": """
                import math
                import torch
                from longspan.state import Pair

                def f(distributed):
                    from longspan.ops import triton
                    return torch.distributions, distributed
                """,
            "ops/triton/__init__.py": "import triton",
            "attention/linear.py": """
                from typing import TYPE_CHECKING
                from longspan.ops.a import f
                from longspan import exchange
                if TYPE_CHECKING:
                    import numpy
                """,
            "exchange/__init__.py": "from torch import distributed",
            "data/d.py": "import numpy",
            "train/t.py": "from longspan import linear_attention\nfrom longspan.data import d",
            "commands/c.py": "import tyro\nfrom longspan.data import d\nfrom longspan.train import t",
            "cli.py": "import os\nfrom longspan.commands import c\nrank = os.environ.get('RANK')",
            "__main__.py": "from longspan.cli import main",
        },
    )
    assert import_breaches(tmp_path) == []


# Loads the package where none of the optional packages can be imported, and prints each attempt of a module of ours.
# What torch tries for itself is its own business.
PROBE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL_PACKAGES!r}:
            frame = sys._getframe(1)
            while "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            importer = frame.f_globals.get("__name__", "")
            if importer.partition(".")[0] == "longspan":
                print(importer, "imports", name)
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Absent())
import longspan
"""


def _probe(source_root: Path, code: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROBE + code],
        env={**os.environ, "PYTHONPATH": str(source_root), "CUDA_VISIBLE_DEVICES": ""},
        cwd=source_root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


OPERATORS = """
import torch
q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
g = -torch.rand(1, 6, 2)
longspan.simple_gla(q, k, v, g).square().sum().backward()
print(all(bool(x.grad.isfinite().all()) for x in (q, k, v)))
"""

ALL_MODULES = """
import pkgutil, types
first = {name: getattr(longspan, name) for name in longspan.__all__}
room = "longspan.integrations.transformers."
# Made of classes of Transformers, which is not here.
sys.modules["longspan.models.hf"] = types.ModuleType("longspan.models.hf")
for module in pkgutil.walk_packages(longspan.__path__, "longspan."):
    # What stands on packages that are not here.
    if module.name.startswith(("longspan.ops.triton.", room + "accelerate", room + "trainer")):
        continue
    if module.name.split(".")[1] not in ("cli", "commands", "data", "evaluation", "launch", "study", "train", "__main__"):
        __import__(module.name)
for name in longspan.__all__:
    value = getattr(longspan, name)
    if value is not first[name] or isinstance(value, types.ModuleType):
        print(name, "is", value)
"""


@cache
def _printed() -> list[str]:
    """What is printed as the package is loaded, by its operators, and as all modules are loaded: in one process."""
    mark = 'print("---")\n'
    return _probe(PROJECT_ROOT, mark + OPERATORS + mark + ALL_MODULES).split("---\n")


def test_import_longspan_loads_no_optional_package() -> None:
    assert _printed()[0] == ""


def test_the_probe_finds_an_optional_import(tmp_path: Path) -> None:
    _write_package(
        tmp_path,
        {"__init__.py": "import torch, longspan.a", "a.py": "try:\n    import rich.progress\nexcept ImportError: ..."},
    )
    assert "longspan.a imports rich" in _probe(tmp_path)


def test_the_operators_work_without_optional_packages_on_a_cpu() -> None:
    assert _printed()[1] == "True\n"


def test_public_names_stay_what_they_are_once_everything_is_loaded() -> None:
    """A submodule of the same name as a function would take its place in the package when it is first imported."""
    assert _printed()[2:] == [""]
