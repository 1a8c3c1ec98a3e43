"""Fused parameters are the same numbers in fewer arrays, and the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.loading import load_model
from jaxinfer.models.fused import fuse, unfuse
from jaxinfer.models.model import Model

GOLDENS = Path(__file__).parents[1] / "conformance" / "goldens"


# biases; keys that another layer computes; values that are keys; no gate; experts beside a shared one
@pytest.mark.parametrize("golden", ["qwen2_windows", "gemma4_e", "gpt_bigcode_mqa", "llama3_gqa", "qwen2_moe"])
def test_fused_is_the_same_model(golden: str) -> None:
    loaded = load_model(GOLDENS / golden)
    before = jax.tree.map(np.array, loaded.params)
    model, params = loaded.serving_form()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract_params
    )
    assert len(jax.tree.leaves(params)) < len(jax.tree.leaves(before))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, before)
    tokens = jnp.arange(3, 20)
    want, got = loaded.model.forward(loaded.params, tokens), model.forward(params, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_nothing_is_held_twice() -> None:
    loaded = load_model(GOLDENS / "llama3_gqa")
    model = Model(replace(loaded.config, hidden_size=64), jnp.float32)  # rows of whole cache lines
    loaded = replace(loaded, model=model, params=model.init_params(0))
    _, params = loaded.serving_form()
    whole = params["layers"]["0"]["attention"]["qkv"]["weight"]
    first = whole.unsafe_buffer_pointer()
    for name in ("q", "k", "v"):
        part = loaded.params["layers"]["0"]["attention"][name]["weight"].unsafe_buffer_pointer()
        assert first <= part < first + whole.nbytes


def test_engines_of_one_model_share_its_parameters() -> None:
    loaded = load_model(GOLDENS / "llama3_gqa")
    first, second = loaded.serving_form()[1], loaded.serving_form()[1]
    assert first is second
    loaded.params = {**loaded.params, "layers": dict(loaded.params["layers"])}  # what the caller changed is seen
    assert loaded.serving_form()[1] is not second


def test_there_and_back() -> None:
    loaded = load_model(GOLDENS / "llama3_gqa")
    layer = jax.tree.map(np.asarray, loaded.params["layers"]["0"])
    back = unfuse(
        fuse(layer, np.concatenate), layer, lambda w, like: np.split(w, np.cumsum([x.shape[0] for x in like])[:-1])
    )
    jax.tree.map(np.testing.assert_array_equal, back, layer)
