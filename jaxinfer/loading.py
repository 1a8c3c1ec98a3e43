"""A model directory or hub id, Hugging Face or Orbax, to parameters on their devices and pure functions over them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer.checkpoint.config import GenerationDefaults, read_config
from jaxinfer.checkpoint.hub import resolve_model_dir
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.orbax import is_orbax, load_orbax
from jaxinfer.checkpoint.reader import CheckpointReader
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.model import Model, Params
from jaxinfer.models.registry import resolve as resolve_family
from jaxinfer.plan import resolve_dtype
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.rules import param_shardings

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """Parameters and the pure functions over them.

    `params` is a plain nested dict of jax.Array, laid out by `shardings`. `forward(params, tokens)` may be called
    inside the caller's own `jit` or `grad`.
    """

    model: Model
    params: Params
    mesh: Mesh
    directory: Path
    generation: GenerationDefaults

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward(self, params: Params, tokens: jax.Array) -> jax.Array:
        """tokens int32 [T] or [batch, T] -> float32 logits [..., T, V]; pure."""
        return self.model.forward(params, tokens)

    @cached_property
    def shardings(self) -> Params:
        """The NamedSharding of every parameter, in the parameters' own structure."""
        return param_shardings(self.model.abstract_params, self.model.logical_axes, self.mesh)

    def place(self, params: Params) -> Params:
        """`params` checked against this model's shapes, cast to its dtype and laid out by its shardings.

        ValueError naming the first parameter that is missing, unexpected or of another shape.
        """
        expected = _by_path(self.model.abstract_params)
        given = _by_path(params)
        for path in sorted(expected.keys() ^ given.keys()):
            raise ValueError(f"parameter {path} is {'missing' if path in expected else 'not one of this model'}")
        for path, leaf in given.items():
            if tuple(leaf.shape) != expected[path].shape:
                raise ValueError(
                    f"parameter {path} has shape {tuple(leaf.shape)}; this model's is {expected[path].shape}"
                )
        cast = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, self.model.abstract_params)
        return jax.device_put(cast, self.shardings)


def load_model(
    path: str | Path, *, mesh: str | dict[str, int] | Mesh | None = None, dtype: Any = "auto"
) -> LoadedModel:
    """Load a checkpoint onto `mesh` (None: one device) in `dtype` ("auto": the checkpoint's own, float32 on CPU).

    Every tensor goes straight to its sharding; host memory stays near the parameters plus one tensor. ValueError, in
    one line, for whatever is wrong with the directory.
    """
    directory = resolve_model_dir(path)
    config_json, generation = read_config(directory)
    family, config = resolve_family(config_json)
    made = make_mesh(mesh)
    stored = config_json.get("dtype") or config_json.get("torch_dtype")
    computed = resolve_dtype(str(np.dtype(dtype)) if dtype != "auto" else "auto", stored, made.devices.flat[0].platform)
    model = Model(config, computed)
    if is_orbax(directory):
        params = load_orbax(directory, model.abstract_params, model.logical_axes, made, computed)
    else:
        with CheckpointReader(directory) as reader:
            params = load_params(reader, model.abstract_params, model.logical_axes, family, config, made, computed)
    return LoadedModel(model, params, made, directory, generation)


def _by_path(tree: Params) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
