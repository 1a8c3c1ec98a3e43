"""Pipeline parallelism: layers in stages, one after another, each on its own devices (GPipe, arXiv:1811.06965).

A stage's mesh is a slice of the whole one along the axis `stage`: a mesh of all six axes, so that what runs on it is
written as if there were no stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import Model, Params
from jaxinfer.quantization import num_bytes
from jaxinfer.sharding import rules


@dataclass(frozen=True)
class Stage:
    """Consecutive layers and the devices that run them.

    ends: the parameters beside its layers' that it reads, by name: what comes before the first layer, if that is its
    own, and what comes after the last.
    """

    layers: range
    ends: tuple[str, ...]
    mesh: Mesh

    def part(self, params: Params) -> Params:
        """What this stage reads of a structure like the parameters'."""
        ends = {name: params[name] for name in self.ends if name in params}
        return {**ends, "layers": {str(index): params["layers"][str(index)] for index in self.layers}}


@lru_cache
def stages(config: ModelConfig, mesh: Mesh) -> tuple[Stage, ...]:
    """A model's stages on a mesh that `check_layout` has let pass; one, on the whole mesh, where there is no pipeline.

    They are cut where the one with the most bytes of parameters has the fewest.
    """
    count = mesh.shape["stage"]
    runs = _runs(config, count) if count > 1 else (range(len(config.layers)),)
    return tuple(Stage(layers, _ends(config, layers), _slice(mesh, place)) for place, layers in enumerate(runs))


def cut_points(config: ModelConfig) -> tuple[int, ...]:
    """The layers that a stage may begin with: no layer from there on reads the keys of one before."""
    sources = [len(config.layers) if layer.kv_source is None else layer.kv_source for layer in config.layers]
    return tuple(index for index in range(len(sources)) if min(sources[index:]) >= index)


def param_shardings(model: Model, mesh: Mesh) -> Params:
    """The NamedSharding of every parameter, on its stage; embeddings that are the head's weights too on the first."""
    ends: dict[str, Any] = {}
    layers: dict[str, Any] = {}
    for stage in reversed(stages(model.config, mesh)):
        own = rules.param_shardings(stage.part(model.abstract_params), stage.part(model.logical_axes), stage.mesh)
        layers |= own.pop("layers")
        ends |= own
    return {**ends, "layers": {index: layers[index] for index in model.abstract_params["layers"]}}


def _ends(config: ModelConfig, layers: range) -> tuple[str, ...]:
    """Names of decoder.Ends."""
    head = "embed" if config.tie_embeddings else "lm_head"
    names = ("embed", "positions", "per_layer") if layers.start == 0 else ()
    names += ("final_norm", head) if layers.stop == len(config.layers) else ()
    return tuple(dict.fromkeys(names))


def _slice(mesh: Mesh, place: int) -> Mesh:
    devices = np.take(mesh.devices, [place], axis=mesh.axis_names.index("stage"))
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def _runs(config: ModelConfig, count: int) -> tuple[range, ...]:
    """All layers in `count` runs, the largest of which is as small as can be, its part of the ends included."""
    params, num_layers = Model(config).abstract_params, len(config.layers)
    sizes = np.cumsum([0, *(_num_bytes(params["layers"][str(index)]) for index in range(num_layers))])

    def size(start: int, stop: int) -> int:
        ends = _ends(config, range(start, stop))
        return int(sizes[stop] - sizes[start]) + sum(_num_bytes(params[name]) for name in ends if name in params)

    stops = (*cut_points(config), num_layers)
    # By the layer they end before: the size of the largest of the runs so far, and where each begins.
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for _ in range(count):
        best = {
            stop: min(
                (max(largest, size(start, stop)), (*starts, start))
                for start, (largest, starts) in best.items()
                if start < stop
            )
            for stop in stops
            if any(start < stop for start in best)
        }
    starts = best[num_layers][1]
    return tuple(map(range, starts, (*starts[1:], num_layers)))


def _num_bytes(abstract: Any) -> int:
    return num_bytes(jax.tree.leaves(abstract))
