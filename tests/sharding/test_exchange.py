"""Rows worked on by their owners come back as if they had been worked on here, however unevenly they are spread."""

from __future__ import annotations

from tests.sharding.run_on_devices import run_on_devices

CODE = """
import os
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # what is computed is looked at, not how fast
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jaxinfer.sharding.exchange import on_owners
from jaxinfer.sharding.mesh import make_mesh

devices, labels, rows = 4, 3, 40
mesh = make_mesh({"data": 2, "expert": devices})
rng = np.random.default_rng(0)
x = rng.normal(size=(8, 10, 5)).astype(np.float32)
skews = [[1, 1, 1, 1], [1, 0, 0, 0], [9, 1, 0, 1], [0] * 4, [0, 0, 1, 30], [1, 2, 0, 0], [0, 1, 0, 0], [4, 3, 2, 1]]
skews = np.array(skews)
owners = np.stack([np.sort(rng.choice(devices, rows, p=skew / skew.sum() if skew.any() else None)) for skew in skews])
owners[3] = devices  # nobody's
owners[7, 25:] = devices
counts = np.stack([np.bincount(own, minlength=devices + 1)[:devices] for own in owners]).astype(np.int32)
label = rng.integers(0, labels, (8, rows)).astype(np.int32)
source = rng.integers(0, 10, (8, rows)).astype(np.int32)
spec = P(("data", "expert"))

@jax.jit
@partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
def exchanged(x, source, label, counts):
    me = jax.lax.axis_index("expert")
    def work(given, label):
        factor = jnp.where(label < labels, 1 + label + 10 * me, jnp.nan)
        return given * factor[:, None]
    y = on_owners(work, x[0], source[0], label[0], counts[0], no_label=labels, axis="experts")
    return y[None]

got = exchanged(x, source, label, counts)
for device in range(8):
    factor = np.where(owners[device] < devices, 1 + label[device] + 10 * owners[device], 0)
    np.testing.assert_allclose(got[device], x[device][source[device]] * factor[:, None], rtol=1e-6)

from jaxinfer.layers.moe import MoE
from jaxinfer.layers.parameters import Parameters
from jaxinfer.models.config import ExpertsConfig, LayerConfig, ModelConfig
from flax import nnx

for num_tokens in (1, 40):
    layer = LayerConfig(1, 1, 4, 6, experts=ExpertsConfig(8, 2, router_bias=True, bias=True))
    moe = MoE(Parameters(np.float32, 0), ModelConfig("test", 8, 8, 8, (layer,)), layer)
    moe.router.bias[...] = jnp.array([9., 4, 0, 0, 0, 0, 0, 0])  # nearly all go to the first device
    graph, params = nnx.split(moe)
    cuts = jax.tree.map(lambda leaf: P("expert"), params)
    cuts["router"] = jax.tree.map(lambda leaf: P(), params["router"])
    x = rng.normal(size=(4 * num_tokens, 8)).astype(np.float32)
    spread = jax.shard_map(
        lambda params, x, is_real: nnx.merge(graph, params)(x, is_real),
        mesh=make_mesh({"expert": 4}), in_specs=(cuts, P("expert"), P("expert")), out_specs=P("expert"),
        check_vma=False,
    )
    is_real = np.arange(4 * num_tokens) % 3 > 0
    got, load = jax.jit(spread)(params, x, is_real)
    want, whole = moe(x, is_real)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(load.reshape(4, -1).sum(0), whole)
"""


def test_uneven_rows_come_back() -> None:
    run_on_devices(CODE, 8)
