"""Measure and draw a figure: ``python -m benchmarks.figures NAME [--quick] [--out FOLDER]``; again from its data: ``--redraw``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.figures import curves, finetune, million, stream, throughput, timeline, traffic, waiting
from benchmarks.figures.common import pyplot, with_origin, write
from benchmarks.harness import reexecute_with_memory_settings
from benchmarks.network import NetworkError

FIGURES = {
    "throughput": throughput.FIGURE,
    "traffic": traffic.FIGURE,
    "waiting": waiting.FIGURE,
    "timeline": timeline.FIGURE,
    "finetune": finetune.FIGURE,
    "curves": curves.FIGURE,
    "stream": stream.FIGURE,
    "million": million.FIGURE,
}


def main() -> None:
    reexecute_with_memory_settings("benchmarks.figures")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=FIGURES, help=f"of {', '.join(FIGURES)}")
    parser.add_argument("--quick", action="store_true", help="short sequences and few repeats, to see that it runs")
    parser.add_argument("--redraw", action="store_true", help="draw what was measured before, from its JSON file")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the files (docs/figures)")
    arguments = parser.parse_args()
    for name in arguments.names:
        figure = FIGURES[name]
        if arguments.redraw:
            record = json.loads((arguments.out / f"{name}.json").read_text(encoding="utf-8"))
        else:
            command = f"python -m benchmarks.figures {name}" + " --quick" * arguments.quick
            try:
                # Through JSON, so that a figure is the same drawn now or later.
                record = json.loads(json.dumps(with_origin(name, command, figure.measure(arguments.quick))))
            except NetworkError as error:
                parser.exit(2, f"{parser.prog}: error: {name}: {error}\n")
        drawn = figure.draw(record["data"])
        if figure.table is not None:
            print(figure.table(record["data"]).markdown())
        print(*write(name, record, drawn, arguments.out), sep="\n", flush=True)
        pyplot().close(drawn)


if __name__ == "__main__":
    main()
