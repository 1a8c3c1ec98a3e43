"""Page pools: zeros, in place, and no memory for pages that nobody has used."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache.pool import empty_pools
from tests.sharding.run_on_devices import run_on_devices

# In a process of its own: what others hold, and give back, is not to be counted.
MEASURE = """
import os
import jax, jax.numpy as jnp
from jaxinfer.cache.pool import empty_pools

def zeros(leaf):
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

jnp.zeros(3).block_until_ready()
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
before = resident_mib()
pools = empty_pools(tuple(jax.ShapeDtypeStruct((1024, 16384), jnp.float32, sharding=sharding) for _ in range(4)), zeros)
write = jax.jit(lambda pools: tuple(pool.at[7].set(1.0) for pool in pools), donate_argnums=0)
pools = jax.block_until_ready(write(pools))
print(resident_mib() - before, sum(float(pool.sum()) for pool in pools) / 4)
"""


def test_pools_are_zeros() -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = [(3, 2, 5), (2000, 1000), (1, 1)]
    abstract = tuple(jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding) for shape in shapes)
    pools = empty_pools(abstract, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding))
    for pool, shape in zip(pools, shapes, strict=True):
        np.testing.assert_array_equal(pool, np.zeros(shape))


@pytest.mark.skipif(not Path("/proc/self/statm").exists() or sys.platform != "linux", reason="Linux tells what is held")
def test_unused_pages_take_no_memory() -> None:
    grown, total = map(float, run_on_devices(MEASURE).split())
    assert total == 16384, "what was written is there, and the rest is zero"
    assert grown < 64, f"pools of 256 MiB took {grown:.0f} MiB for one page each"
