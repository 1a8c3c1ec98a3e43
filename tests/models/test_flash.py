"""The forward by blocks is the dense one, gradients included, in memory that grows with the length alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.loading import load_model
from jaxinfer.models.dense import Mix, dense
from jaxinfer.models.flash import flash
from jaxinfer.models.model import Model
from pallas_kernels.flash_attention import backward, xla

GOLDENS = Path(__file__).parents[1] / "conformance" / "goldens"
FAST = {"xla_backend_optimization_level": 0}


def outputs_and_gradients(model: Model, params: Any, tokens: jax.Array, mix: Mix) -> Any:
    """Logits, and the gradient of something that every logit has a part in, in one program."""

    def loss(params: Any) -> Any:
        logits = model.forward(params, tokens, mix=mix)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(params)


# sinks; windows and soft caps; keys whose first part is the value, and experts; keys that another layer computes
@pytest.mark.parametrize(
    "golden",
    ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "deepseek_v3", "gemma4_e"))],
)
def test_is_the_dense_forward(golden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (xla, backward):
        monkeypatch.setattr(module, "BLOCK_QUERIES", 4)
        monkeypatch.setattr(module, "BLOCK_KEYS", 8)
    loaded = load_model(GOLDENS / golden)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 90, (2, 27)))
    want = outputs_and_gradients(loaded.model, loaded.params, tokens, dense)
    got = outputs_and_gradients(loaded.model, loaded.params, tokens, flash(loaded.mesh))
    for (path, a), b in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        # Some gradients are small sums of thousands of large terms.
        tolerance = 1e-4 * (1 + np.abs(a).max())
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_memory_grows_with_the_length() -> None:
    model = load_model(GOLDENS / "llama3_gqa").model

    def scratch(length: int) -> int:
        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            return model.forward(params, tokens, mix=mix).sum()

        tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
        program = jax.jit(jax.grad(loss), compiler_options=FAST).lower(model.abstract_params, tokens).compile()
        return program.memory_analysis().temp_size_in_bytes

    mix = flash(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tensor",)))
    assert scratch(8192) < 2.5 * scratch(4096)
