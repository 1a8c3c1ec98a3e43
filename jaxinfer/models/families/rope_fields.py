"""Rotary embedding parameters out of a `config.json`, old form and new. Imports no jax.

Old: `rope_theta` at the top and `rope_scaling`, whose kind is `rope_type` or `type`. New (transformers 5):
`rope_parameters` with all of it. A scaling that is not empty wins over the parameters, and a theta inside over one
outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxinfer.models.config import RopeConfig
from jaxinfer.models.families.fields import Fields

KINDS = ("full_attention", "sliding_attention")


def rope_config(
    fields: Fields,
    *,
    default_theta: float = 10_000.0,
    partial: bool = False,
    renamed: dict[str, str] | None = None,
) -> RopeConfig:
    """The one rotary embedding of a model. `partial`: the family knows `partial_rotary_factor`.
    `renamed`: old names of scalings -> the names in use."""
    values = dict(fields.section("rope_scaling") or fields.section("rope_parameters"))
    if any(isinstance(values.get(kind), dict) for kind in KINDS):
        raise fields.wrong("rope_parameters", "one object for all layers, not one for each kind of layer,")
    for name, default in (("rope_theta", default_theta), ("partial_rotary_factor", 1.0)):
        values.setdefault(name, fields.get(name) if name in fields else default)
    if "original_max_position_embeddings" in fields:  # at the top it wins over the one inside
        values["original_max_position_embeddings"] = fields.get("original_max_position_embeddings")
    scaling = _scaling(values)
    values["rope_type"] = (renamed or {}).get(scaling, scaling)
    return read_rope(fields, values, fields.head_dim(), partial=partial)


def read_rope(fields: Fields, values: dict[str, Any], head_dim: int, *, partial: bool = False) -> RopeConfig:
    """A RopeConfig out of one object of rotary parameters."""
    scaling = _scaling(values)
    max_position = fields.integer("max_position_embeddings")
    rope = Fields(fields.family, values, {"original_max_position_embeddings": max_position})
    if scaling not in _READERS:
        raise ValueError(
            f"config.json: rope_type={scaling!r} is not supported in a {fields.family} model; "
            f"those that are: {', '.join(_READERS)}"
        )
    rope.refuse("mrope_section")
    share = rope.optional_number("partial_rotary_factor") if "partial_rotary_factor" in rope else None
    share = 1.0 if share is None else share
    if share > 1 or (share != 1 and not partial and scaling != "proportional"):
        raise rope.wrong("partial_rotary_factor", "at most 1" if partial else "1")
    rotary_dim = head_dim if scaling == "proportional" else int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(
            f"config.json: head_dim={head_dim} with partial_rotary_factor={share} rotates {rotary_dim} numbers of a "
            f"head; it must be an even number of at least 2"
        )
    more = _READERS[scaling](rope, rotary_dim, max_position)
    return RopeConfig(theta=rope.number("rope_theta"), rotary_dim=rotary_dim, **more)


def _scaling(values: dict[str, Any]) -> str:
    return values.get("rope_type") or values.get("type") or "default"


def _default(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    return {}


def _linear(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    return {"scaling": "linear", "factor": rope.number("factor")}


def _dynamic(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    if rotary_dim < 4:
        raise ValueError(f"config.json: rope_type='dynamic' rotates {rotary_dim} numbers of a head; it needs 4 or more")
    return {"scaling": "dynamic", "factor": rope.number("factor"), "max_position": max_position}


def _llama3(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.wrong("high_freq_factor", f"above low_freq_factor={low}")
    return {
        "scaling": "llama3",
        "factor": rope.number("factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position": rope.integer("original_max_position_embeddings"),
    }


def _yarn(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    def optional(name: str) -> float | None:
        """Null and zero both leave the choice to the paper."""
        return rope.number(name) if name in rope and rope.get(name) else None

    original = rope.integer("original_max_position_embeddings")
    factor = rope.optional_number("factor")
    return {
        "scaling": "yarn",
        "factor": max_position / original if factor is None else factor,
        "original_max_position": original,
        "beta_fast": optional("beta_fast") or 32.0,
        "beta_slow": optional("beta_slow") or 1.0,
        "truncate": rope.flag("truncate") if "truncate" in rope else True,
        "mscale": optional("mscale"),
        "mscale_all_dim": optional("mscale_all_dim"),
        "attention_factor": optional("attention_factor"),
    }


def _longrope(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    original = rope.integer("original_max_position_embeddings")
    for name in ("short_factor", "long_factor"):
        if len(rope.numbers(name)) != rotary_dim // 2:
            raise rope.wrong(name, f"a list of {rotary_dim // 2} numbers")
    factor = rope.optional_number("factor") if "factor" in rope else None
    attention_factor = rope.optional_number("attention_factor") if "attention_factor" in rope else None
    return {
        "scaling": "longrope",
        "factor": max_position / original if factor is None else factor,
        "original_max_position": original,
        "short_factor": rope.numbers("short_factor"),
        "long_factor": rope.numbers("long_factor"),
        "attention_factor": attention_factor,
    }


def _proportional(rope: Fields, rotary_dim: int, max_position: int) -> dict[str, Any]:
    factor = rope.number("factor") if "factor" in rope else 1.0
    share = rope.number("partial_rotary_factor") if "partial_rotary_factor" in rope else 1.0
    return {"scaling": "proportional", "factor": factor, "partial_rotary_factor": share}


_READERS: dict[str, Callable[[Fields, int, int], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
