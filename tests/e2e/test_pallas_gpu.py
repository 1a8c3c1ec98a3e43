"""The engine on the kernel for Hopper GPUs, simulated, against the model without a cache."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from jaxinfer.loading import load_model
from jaxinfer.ops import paged_attention
from pallas_kernels.paged_attention import gpu_layout
from tests.e2e.harness import GOLDENS, Twin, few_programs, greedy, make_engine, random_prompts, run
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
def test_equals_the_cacheless_twin(golden: str) -> None:
    """Chunks beside decodes, a prompt in several chunks; of Gemma 2 rings of a window of 8 and soft caps."""
    loaded = load_model(GOLDENS / golden, dtype="bfloat16")
    twin = Twin(loaded, 48)
    prompts, params = random_prompts(7, 29, 1, 5), [greedy(count, logprobs=1) for count in (4, 7, 5)]
    settings = {"max_model_len": 48, "page_size": 8, "max_num_seqs": 3, "max_num_batched_tokens": 16, "num_pages": 20}
    with simulated_gpu():
        engine = make_engine(loaded, attention_backend="pallas_gpu", **settings)
        assert {layer.backend.name for layer in engine.plan.layers} == {"pallas_gpu"}
        outputs = run(engine, prompts, params)
    for output, own in zip(outputs, params, strict=True):
        (completion,) = output.outputs
        assert len(completion.token_ids) == own.max_tokens
        expected = twin.log_probabilities(output.prompt_token_ids + completion.token_ids)
        rows = expected[len(output.prompt_token_ids) - 1 :]
        for row, token_id, scored in zip(rows, completion.token_ids, completion.logprobs, strict=False):
            # In bfloat16 XLA's attention is up to 0.06 away; log-probabilities of one row have a deviation of 2 to 3.
            assert scored[token_id].logprob == pytest.approx(row[token_id], abs=0.25)
            assert row.max() - row[token_id] < 0.25
