"""The releases of Transformers and flash-linear-attention that the tests have passed with."""

from __future__ import annotations

import sys
import warnings

TESTED = {"transformers": ((5, 23), (5, 23)), "fla": ((0, 6), (0, 6))}
"""First and last minor release, by the name of the package that is imported."""

_NAMES = {"transformers": "Transformers", "fla": "flash-linear-attention"}


def warn_of_untested(package: str) -> None:
    """Warn where the release of a package that is loaded is not one of those."""
    installed: str = sys.modules[package].__version__
    release = tuple(int(part) for part in installed.split(".")[:2])
    if not TESTED[package][0] <= release <= TESTED[package][1]:
        first, last = (".".join(map(str, release)) for release in TESTED[package])
        tested = first if first == last else f"{first} to {last}"
        warnings.warn(
            f"longspan was tested with {_NAMES[package]} {tested}, and {installed} is installed. A layer that runs without its "
            "layout raises; compare the first batch with one process by longspan.parallelize(..., verify=True)",
            stacklevel=4,
        )
