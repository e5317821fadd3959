"""Rates and times as people write them: ``400gbit``, ``45GB``, ``15us``."""

from __future__ import annotations

import re

from longspan.errors import ConfigError

_RATES = {
    "kbit": 1e3 / 8,
    "mbit": 1e6 / 8,
    "gbit": 1e9 / 8,
    "tbit": 1e12 / 8,
    "b": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def bytes_per_second(text: str) -> float:
    """A rate with its unit, bits (``"1gbit"``, ``"100mbit"``) or bytes (``"45GB"``) per second, in bytes per second."""
    return _parse_quantity(text.lower(), _RATES, "a rate such as 1gbit, 100mbit or 45GB (each a second)")


def seconds(text: str) -> float:
    """A time with its unit (``"15us"``, ``"0.2ms"``), in seconds."""
    return _parse_quantity(text, _TIMES, "a time such as 15us, 0.2ms or 1s")


def _parse_quantity(text: str, units: dict[str, float], expected: str) -> float:
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(?:e([-+]?[0-9]+))? *([a-zµ]+)", text.strip())
    if match is None or match[3] not in units:
        raise ConfigError(f"{text!r} is not {expected}")
    return float(match[1]) * 10.0 ** int(match[2] or 0) * units[match[3]]
