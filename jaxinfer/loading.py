"""A model directory or hub id, Hugging Face or Orbax, to parameters on their devices and pure functions over them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.checkpoint.config import GenerationDefaults, read_config
from jaxinfer.checkpoint.hub import resolve_model_dir
from jaxinfer.checkpoint.load import aligned_empty, load_params
from jaxinfer.checkpoint.orbax import is_orbax, load_orbax
from jaxinfer.checkpoint.packed import open_checkpoint
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.flash import flash
from jaxinfer.models.fused import fuse, unfuse
from jaxinfer.models.layout import check_layout, check_memory
from jaxinfer.models.model import Model, Params
from jaxinfer.models.registry import resolve as resolve_family
from jaxinfer.models.stages import param_shardings
from jaxinfer.plan import resolve_dtype
from jaxinfer.quantization import choose
from jaxinfer.runner import functional
from jaxinfer.runner.functional import KVCache
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.spmd import PER_SHARD
from jaxinfer.tokenizer.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass
class LoadedModel:
    """Parameters and the pure functions over them.

    `params` is a plain nested dict of jax.Array, laid out by `shardings`. `forward` may be called inside the caller's
    own `jit` and `grad`, `prefill` and `decode` inside `jit`, with these parameters or others of their shapes.
    examples/sharded_model.py shows all of it. They and the cache are refused on a mesh with stages, where a program
    holds a part of the model.
    """

    model: Model
    params: Params
    mesh: Mesh
    directory: Path
    generation: GenerationDefaults
    # The params that serving_form last served, and what it made of them: engines of one model share them.
    _served: tuple[Params, tuple[Model, Params]] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward(self, params: Params, tokens: jax.Array) -> jax.Array:
        """tokens int32 [T] or [batch, T] -> float32 logits [..., T, V]; pure.

        Attention goes by blocks (flash attention), and has gradients in reverse mode, once: `jvp` and the gradient of a
        gradient are refused. `self.model.forward` has both, and the logits of all pairs of tokens in memory.
        """
        self._check_one_program()
        return self.model.forward(params, tokens, mix=flash(self.mesh))

    def make_cache(
        self,
        num_sequences: int,
        max_len: int,
        *,
        max_prefill_len: int | None = None,
        page_size: int | None = None,
        kv_cache_dtype: str = "auto",
        attention_backend: str | None = None,
    ) -> KVCache:
        """An empty cache for `num_sequences` sequences of at most `max_len` tokens, laid out on the mesh.

        num_sequences: a multiple of the mesh's shards (data x fsdp x expert), which get equal parts. max_prefill_len:
        the most tokens that one `prefill` gives a sequence (None: max_len); layers with a window keep their window and
        so many tokens, no more. page_size: tokens in a page, on each device of `context`; None is 16, or 32 with a
        kv_cache_dtype of 8 bits: int8 or float8_e4m3fn. attention_backend: None takes the best that serves the model.
        Pure: `jax.eval_shape` tells what a cache would take. ValueError for what this model or mesh can not do.
        """
        self._check_one_program()
        return functional.make_cache(
            self.model,
            self.mesh,
            num_sequences,
            max_len,
            max_prefill_len=max_prefill_len,
            page_size=page_size,
            kv_cache_dtype=kv_cache_dtype,
            attention_backend=attention_backend,
        )

    def prefill(
        self, params: Params, cache: KVCache, tokens: jax.Array, lengths: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        """The next tokens of every sequence -> float32 logits [S, V] after its last one, and the longer cache; pure.

        tokens int32 [S, T], padded on the right; lengths int32 [S]: how many of a row are its sequence's. Several calls
        append to each other. A sequence stays as it was, and its logits are NaN, where its length is 0, more than T, or
        more than max_len leaves room for. Donate the cache, or it is copied. Rope scalings that depend on the length
        (dynamic, longrope) are those of max_len.
        """
        self._check_one_program()
        return functional.extend(self.model, self.mesh, params, cache, jnp.asarray(tokens), jnp.asarray(lengths))

    def decode(self, params: Params, cache: KVCache, tokens: jax.Array) -> tuple[jax.Array, KVCache]:
        """`prefill` of one token for every sequence: tokens int32 [S]."""
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {tokens.shape}; give [S], a token for each sequence")
        return self.prefill(params, cache, tokens[:, None], jnp.ones(tokens.shape, jnp.int32))

    def cache_shardings(self, cache: KVCache) -> KVCache:
        """The NamedSharding of every array of the cache, in its own structure."""
        return functional.cache_shardings(self.mesh, cache)

    def _check_one_program(self) -> None:
        count = self.mesh.shape["stage"]
        if count > 1:
            raise ValueError(
                f"mesh axis stage={count}: one program can not hold a model that is in stages; use LLM or Engine, or "
                "load it onto a mesh without stages"
            )

    @cached_property
    def sequence_sharding(self) -> NamedSharding:
        """Of arrays whose first axis is sequences: tokens, lengths, whatever goes with them."""
        return NamedSharding(self.mesh, PER_SHARD)

    @cached_property
    def shardings(self) -> Params:
        """The NamedSharding of every parameter, in the parameters' own structure."""
        return param_shardings(self.model, self.mesh)

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

    def serving_form(self) -> tuple[Model, Params]:
        """The model and the parameters as an engine runs them; see models/fused.py.

        On one CPU device they are fused, and `params` then shares their memory: nothing is held twice.
        """
        if self.mesh.size > 1 or self.mesh.devices.flat[0].platform != "cpu" or self._has_packed():
            return self.model, self.params
        if self._served is not None and self._served[0] is self.params:
            return self._served[1]
        fused, layers = {}, self.params["layers"]
        for index, layer in layers.items():  # one by one, so that no more than a layer is held twice
            fused[index] = jax.tree.map(self._on_device, fuse(layer, _join))
            layers[index] = jax.tree.map(self._on_device, unfuse(fused[index], layer, _cut))
        ends = {name: value for name, value in self.params.items() if name != "layers"}
        served = Model(self.config, self.model.dtype, fused=True), {**ends, "layers": fused}
        self._served = self.params, served
        return served

    def _has_packed(self) -> bool:
        """Whether weights are int4, of which two share a byte on the device: no view of the host's reads that."""
        return self.config.quantization is not None and self.config.quantization.bits == 4

    def _on_device(self, leaf: Any) -> jax.Array:
        return jax.device_put(leaf, NamedSharding(self.mesh, PartitionSpec())) if isinstance(leaf, np.ndarray) else leaf


def _join(parts: Sequence[jax.Array]) -> np.ndarray:
    whole = aligned_empty((sum(part.shape[0] for part in parts), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate([np.asarray(part) for part in parts], out=whole)


def _cut(whole: jax.Array, like: Sequence[jax.Array]) -> list[np.ndarray]:
    """Views of an array's rows on the host, which XLA's CPU client takes over without a copy where they are aligned."""
    return np.split(np.asarray(whole), np.cumsum([part.shape[0] for part in like])[:-1])


def load_model(
    path: str | Path,
    *,
    mesh: str | dict[str, int] | Mesh | None = None,
    dtype: Any = "auto",
    quantization: str | None = None,
) -> LoadedModel:
    """Load a checkpoint onto `mesh` (None: one device) in `dtype` ("auto": the checkpoint's own, float32 on CPU).

    quantization: "int8" or "int4" for weights of the layers so rounded (jaxinfer/quantization.py says which), None for
    the checkpoint's own. Such a weight is {"values", "scales"} among the parameters.
    Every tensor goes straight to its sharding; host memory stays near the parameters plus one tensor. ValueError, in
    one line, for whatever is wrong with the directory.
    """
    directory = resolve_model_dir(path)
    config_json, generation = read_settings(directory)
    family, config = resolve_family(config_json)
    packed, config = config.quantization, replace(config, quantization=choose(quantization, config.quantization))
    made = make_mesh(mesh)
    stored = config_json.get("dtype") or config_json.get("torch_dtype")
    computed = resolve_dtype(str(np.dtype(dtype)) if dtype != "auto" else "auto", stored, made.devices.flat[0].platform)
    check_layout(config, made)
    model = Model(config, computed)
    shardings = param_shardings(model, made)
    check_memory(model, shardings, made)
    if is_orbax(directory):
        params = load_orbax(directory, model.abstract_params, shardings)
    else:
        with open_checkpoint(directory, packed) as reader:
            params = load_params(reader, model.abstract_params, family, config, shardings)
    return LoadedModel(model, params, made, directory, generation)


def read_settings(directory: Path) -> tuple[dict[str, Any], GenerationDefaults]:
    """As read_config, but where the configs name no token that ends a text, the tokenizer's does."""
    config_json, generation = read_config(directory)
    if generation.eos_token_ids or not Tokenizer.exists(directory):
        return config_json, generation
    try:
        token_id = Tokenizer(directory).eos_token_id
    except ValueError as error:  # whoever gives text is told
        log.warning("no token is known that ends a text: %s", error)
        token_id = None
    return config_json, replace(generation, eos_token_ids=() if token_id is None else (token_id,))


def _by_path(tree: Params) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
