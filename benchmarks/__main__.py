"""Print the tables of docs/performance.md: ``python -m benchmarks [TABLE ...] [--quick] [--out FILE]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import linear
from benchmarks.harness import machine, save


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(linear.TABLES)}; all without one")
    parser.add_argument("--quick", action="store_true", help="short sequences and few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.tables) - set(linear.TABLES))
    if unknown:
        parser.error(f"unknown table {', '.join(unknown)}; choose from {', '.join(linear.TABLES)}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()) + "\n", flush=True)
    tables = []
    for name in arguments.tables or linear.TABLES:
        tables.append(linear.TABLES[name](arguments.quick))
        print(tables[-1].markdown(), flush=True)
        save(tables, arguments.out)
    print(f"saved as {arguments.out}")


if __name__ == "__main__":
    main()
