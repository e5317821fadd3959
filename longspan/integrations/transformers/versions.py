"""The releases of Transformers that the tests have passed with."""

from __future__ import annotations

import warnings

TESTED = ((5, 23), (5, 23))
"""First and last minor release."""


def warn_of_untested() -> None:
    """Warn once where the installed release is not one of those."""
    import transformers

    release = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if not TESTED[0] <= release <= TESTED[1]:
        first, last = (".".join(map(str, release)) for release in TESTED)
        warnings.warn(
            f"longspan was tested with Transformers {first} to {last}, and {transformers.__version__} is installed. A layer that "
            "runs "
            "without its layout raises; compare the first batch with one process by longspan.parallelize(..., verify=True)",
            stacklevel=4,
        )
