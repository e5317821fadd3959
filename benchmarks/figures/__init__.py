"""The figures of docs/figures: ``python -m benchmarks.figures NAME`` measures one and draws it."""
