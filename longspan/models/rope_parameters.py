"""What a config of Transformers says of a rotary embedding, as fields of `LinearLlama3Config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROPE_KEYS = ("rope_scaling", "rope_parameters", "partial_rotary_factor")
"""Where such a config says it beside ``rope_theta``: Transformers 5 has all in ``rope_parameters``."""

_LLAMA3 = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}
"""Our fields, and what ``rope_type`` ``"llama3"`` calls them."""


def rope_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say the same; those that a config does not say are left out.

    values: of a config that `rope_faults` finds nothing in.
    """
    rope = _rope(values)
    fields = {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") else {}
    # Times 1 is as it was, whatever else is said.
    if _kind(rope) == "llama3" and rope["factor"] != 1:
        fields |= {own: rope[theirs] for own, theirs in _LLAMA3.items()}
    # JSON has 8 for 8.0.
    return {name: float(value) if _is_whole(name, value) else value for name, value in fields.items()}


def rope_faults(values: Mapping[str, Any]) -> list[str]:
    """A line for each thing in which the embedding is another than those that `LinearLlama3` has."""
    rope = _rope(values)
    kind = _kind(rope)
    lines = []
    if kind == "llama3":
        missing = [name for name in _LLAMA3.values() if rope.get(name) is None]
        if missing:
            lines.append(f"the rotary embedding is scaled, 'llama3', and {', '.join(missing)} is not said")
    elif kind != "default" and not (kind == "linear" and rope.get("factor") == 1):
        numbers = {key: value for key, value in rope.items() if key not in ("rope_type", "type")}
        lines.append(
            f"the rotary embedding is scaled, {kind!r} {numbers}: Linear-Llama3 has Llama 3.1's scaling, 'llama3', and no other"
        )
    if rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1)) not in (1, None):
        lines.append("partial_rotary_factor is not 1: all channels of a head are rotated")
    return lines


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    theta = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") else {}
    rope = {**theta, **(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    if _kind(rope) == "llama3":
        # As Transformers has it: what stands beside the others goes before, and the model's own length is taken where none is said.
        name = "original_max_position_embeddings"
        said = (values.get(name), rope.get(name), values.get("max_position_embeddings"))
        rope[name] = next((length for length in said if length is not None), None)
    return rope


def _is_whole(name: str, value: object) -> bool:
    return name != "rope_original_length" and isinstance(value, int) and not isinstance(value, bool)


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))
