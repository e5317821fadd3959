"""Print the tables of docs/performance.md: ``python -m benchmarks [TABLE ...] [--quick] [--out FILE]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import (
    checkpoint,
    codecs,
    conversion,
    convolution,
    decode,
    exchange,
    host,
    hugging_face,
    linear,
    long_conv,
    loss,
    modelled,
    overhead,
    peers,
    prefill,
    prefill_segments,
    recovery,
    selective_scan,
    softmax,
    start,
    stream,
    training,
    uneven,
    uneven_links,
)
from benchmarks.harness import machine, reexecute_with_memory_settings, save
from benchmarks.network import NetworkError


def main() -> None:
    reexecute_with_memory_settings()
    all_tables = {
        **linear.TABLES,
        **peers.TABLES,
        **convolution.TABLES,
        **long_conv.TABLES,
        **softmax.TABLES,
        **prefill.TABLES,
        **prefill_segments.TABLES,
        **decode.TABLES,
        **exchange.TABLES,
        **codecs.TABLES,
        **modelled.TABLES,
        **host.TABLES,
        **hugging_face.TABLES,
        **selective_scan.TABLES,
        **checkpoint.TABLES,
        **conversion.TABLES,
        **recovery.TABLES,
        **overhead.TABLES,
        **loss.TABLES,
        **training.TABLES,
        **start.TABLES,
        **stream.TABLES,
        **uneven.TABLES,
        **uneven_links.TABLES,
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(all_tables)}; all without one")
    parser.add_argument("--quick", action="store_true", help="short sequences and few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu.json"), help="where the JSON goes")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.tables) - set(all_tables))
    if unknown:
        parser.error(f"unknown table {', '.join(unknown)}; choose from {', '.join(all_tables)}")
    print(", ".join(f"{key} {value}" for key, value in machine().items()) + "\n", flush=True)
    tables = []
    for name in arguments.tables or all_tables:
        try:
            tables.append(all_tables[name](arguments.quick))
        except NetworkError as error:
            print(f"{name} is left out: {error}\n", flush=True)
            continue
        print(tables[-1].markdown(), flush=True)
        save(tables, arguments.out)
    print(f"saved as {arguments.out}")


if __name__ == "__main__":
    main()
