"""Parameters with the projections that read the same rows as one matrix: q, k and v; gate and up.

A product of one row runs at memory speed only while it runs, and every product has a start and an end: fewer, larger
ones are faster. Tensor parallelism has to cut q, k and v apart, so the model at large keeps them so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_STACKED = "experts"  # each has a matrix of its own, which one token in many reads: nothing is gained by joining two

Join = Callable[[Sequence[Any]], Any]
Cut = Callable[[Any, Sequence[Any]], Sequence[Any]]


def fuse(layer: Mapping[str, Any], join: Join) -> dict[str, Any]:
    """The parameters of one layer of Model(config) as those of Model(config, fused=True); `join` concatenates rows.

    What a layer lacks one of (keys that another layer computes, an ungated feed-forward) stays as it is.
    """
    fused = {key: fuse(value, join) if _is_block(key, value) else value for key, value in layer.items()}
    for name, parts in _FUSED.items():
        if all(part in fused for part in parts):
            own = [fused.pop(part) for part in parts]
            fused[name] = {leaf: join([part[leaf] for part in own]) for leaf in own[0]}
    return fused


def unfuse(fused: Mapping[str, Any], like: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """The inverse of `fuse`. like: the layer's unfused parameters or their shapes; `cut` cuts rows as theirs are."""
    layer = {
        key: unfuse(value, like[key], cut) if _is_block(key, value) and key not in _FUSED else value
        for key, value in fused.items()
    }
    for name, parts in _FUSED.items():
        if name in layer:
            whole = layer.pop(name)
            cuts = {leaf: cut(value, [like[part][leaf] for part in parts]) for leaf, value in whole.items()}
            layer.update({part: {leaf: cuts[leaf][i] for leaf in cuts} for i, part in enumerate(parts)})
    return layer


def _is_block(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and key != _STACKED
