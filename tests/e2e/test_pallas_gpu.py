"""The engine on the kernel for Hopper GPUs, simulated: the tokens of XLA's attention."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from jaxinfer.loading import load_model
from jaxinfer.ops import paged_attention
from pallas_kernels.paged_attention import gpu_layout
from tests.e2e.harness import GOLDENS, few_programs, greedy, make_engine, random_prompts, run, tokens_of
from tests.ops.simulation import simulated


@contextlib.contextmanager
def simulated_gpu() -> Iterator[None]:
    """While the kernel for GPUs says yes, and is interpreted."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.paged_attention import gpu

    backends = {backend.name: backend for backend in paged_attention.BACKENDS}
    forced = replace(backends["pallas_gpu"], supports=gpu_layout.supports)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_attention, "BACKENDS", (forced, backends["xla"]))
        interpret = plgpu.InterpretGPUParams()
        patch.setattr(gpu, "paged_attention", functools.partial(gpu.paged_attention, interpret=interpret))
        few_programs(patch, token_buckets=(16,))
        yield


@simulated
@pytest.mark.slow
@pytest.mark.parametrize("golden", ["llama3_gqa", "gemma2"])
def test_equals_xla(golden: str) -> None:
    """Chunks beside decodes, a prompt in several chunks; of Gemma 2 rings of a window of 8 and soft caps."""
    loaded, outputs = load_model(GOLDENS / golden, dtype="bfloat16"), {}
    prompts, params = random_prompts(7, 29, 1, 5), [greedy(4), greedy(7), greedy(5)]
    settings = {"max_model_len": 48, "page_size": 8, "max_num_seqs": 3, "max_num_batched_tokens": 16, "num_pages": 20}
    with simulated_gpu():
        for name in ("pallas_gpu", "xla"):
            engine = make_engine(loaded, attention_backend=name, **settings)
            assert {layer.backend.name for layer in engine.plan.layers} == {name}
            outputs[name] = run(engine, prompts, params)
    assert tokens_of(outputs["pallas_gpu"]) == tokens_of(outputs["xla"])
