"""Parameters with the projections that read the same rows as one matrix: q, k and v; gate and up.

A product of one row runs at memory speed only while it runs, and every product has a start and an end: fewer, larger
ones are faster. Tensor parallelism has to cut q, k and v apart, so the model at large keeps them so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

_GATE_UP = ("gate_up", ("gate", "up"))
_FUSED = {("attention",): ("qkv", ("q", "k", "v")), ("mlp",): _GATE_UP, ("mlp", "shared"): _GATE_UP}

Join = Callable[[Sequence[Any]], Any]
Cut = Callable[[Any, Sequence[Any]], Sequence[Any]]


def fuse(layer: Mapping[str, Any], join: Join) -> dict[str, Any]:
    """The parameters of one layer of Model(config) as those of Model(config, fused=True); `join` concatenates rows.

    What a layer lacks one of (keys that another layer computes, an ungated feed-forward) stays as it is.
    """
    fused = dict(layer)
    for path, (name, parts) in _FUSED.items():
        own = _block(fused, path)
        if all(part in own for part in parts):
            rest = {key: value for key, value in own.items() if key not in parts}
            whole = jax.tree.map(lambda *leaves: join(leaves), *(own[part] for part in parts))
            fused = _with_block(fused, path, {**rest, name: whole})
    return fused


def unfuse(fused: Mapping[str, Any], like: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """The inverse of `fuse`. like: the layer's unfused parameters or their shapes; `cut` cuts rows as theirs are."""
    layer = dict(fused)
    for path, (name, parts) in _FUSED.items():
        own, shaped = _block(layer, path), _block(like, path)
        if name in own:
            rest = {key: value for key, value in own.items() if key != name}
            leaves, treedef = jax.tree.flatten(own[name])
            like_leaves = zip(*(treedef.flatten_up_to(shaped[part]) for part in parts), strict=True)
            cuts = zip(*map(cut, leaves, like_leaves), strict=True)
            apart = {part: treedef.unflatten(own_cuts) for part, own_cuts in zip(parts, cuts, strict=True)}
            layer = _with_block(layer, path, {**rest, **apart})
    return layer


def _block(layer: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The parameters at `path`, or nothing where the layer has no such block."""
    for name in path:
        layer = layer.get(name, {})
    return layer


def _with_block(layer: Mapping[str, Any], path: Sequence[str], block: Mapping[str, Any]) -> dict[str, Any]:
    name, *rest = path
    return {**layer, name: _with_block(layer[name], rest, block) if rest else block}
