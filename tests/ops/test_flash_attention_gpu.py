"""The flash attention kernel for GPUs, simulated on the CPU with copies, barriers and WGMMA, against the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from jaxinfer.ops.flash_attention import FlashCase, choose_backend
from tests.ops.simulation import simulated
from tests.ops.test_flash_attention import Problem, check

CASE = FlashCase(2, 1, 64, 64, 0.125)


def simulate(problem: Problem, **options: Any) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.flash_attention import gpu

    check(problem, gpu.flash_attention, interpret=plgpu.InterpretGPUParams(), **options)


@simulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "num_queries", "num_keys", "starts"),
    [
        ({}, 200, 300, (100, 0)),
        ({"window": 100, "soft_cap": 2.0}, 140, 500, (360, 0)),
        ({"causal": False, "head_dim": 40, "value_dim": 100}, 20, 140, (0, 0)),
        ({"has_segments": True, "dtype": "float16"}, 150, 150, (0, 0)),
        ({"causal": False, "has_segments": True}, 20, 200, (0, 0)),
        ({}, 20, 140, (0, 500)),
        ({"window": 9}, 130, 200, (150, 100)),
    ],
    ids=["causal", "window", "not causal", "segments", "segments, not causal", "nothing seen", "part of a context"],
)
def test_kinds(changes: dict[str, Any], num_queries: int, num_keys: int, starts: tuple[int, int]) -> None:
    from pallas_kernels.flash_attention.gpu import Blocks

    problem = Problem(replace(CASE, **changes), 1, num_queries, num_keys, *starts, seed=3)
    simulate(problem, blocks=Blocks(keys=64, slots=2))


@simulated
@pytest.mark.slow
def test_two_tiles_of_a_prompt() -> None:
    simulate(Problem(CASE, 2, 160, 160, 0, 0, seed=1))


@simulated
def test_it_serves_who_names_it() -> None:
    from pallas_kernels.flash_attention import gpu

    backend, refusals = choose_backend(CASE, "gpu")
    assert backend.name == "xla"
    assert "has never run on a GPU" in refusals["pallas_gpu"]
    assert choose_backend(CASE, "gpu", forced="pallas_gpu")[0].name == "pallas_gpu"
    assert gpu.supports(replace(CASE, dtype="float32")) == "dtype float32 is not one of bfloat16, float16"
    assert gpu.supports(replace(CASE, value_dim=320)) == "head dims 64 and 320 are not in 1..256"
    assert gpu.supports(replace(CASE, scale=-1.0)) == "scale -1.0 is not above 0"
    with pytest.raises(ValueError, match=r"the GPU kernel cannot serve .* dtype float32 is not one of"):
        gpu.flash_attention(replace(CASE, dtype="float32"), *(jnp.zeros((1, 4, 2, 64)),) * 3)
