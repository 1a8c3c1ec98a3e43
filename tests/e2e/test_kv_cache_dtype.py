"""Engines whose KV cache has 8 bits: they agree with themselves as closely as others do, and with the rest closely.

A rounding that falls the other way, because sums were taken in another order, is a step of 1/127 of one number: so
log-probabilities of engines that must agree do so within OWN, not within float32's error.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxinfer.loading import load_model
from jaxinfer.types import RequestOutput
from tests.e2e.harness import GOLDENS, Twin, greedy, make_engine, random_prompts, run, tokens_of

OWN = 0.01
LOSS = {"int8": 0.1, "fp8": 0.5}  # in log-probabilities of the tiny models here, whose logits lie within +-10


def scores(output: RequestOutput) -> np.ndarray:
    """The log-probabilities of a completion's own tokens."""
    (completion,) = output.outputs
    assert completion.logprobs is not None
    return np.array([own[token].logprob for own, token in zip(completion.logprobs, completion.token_ids, strict=True)])


def check_same(one: list[RequestOutput], other: list[RequestOutput]) -> None:
    assert tokens_of(one) == tokens_of(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(scores(a), scores(b), atol=OWN)


def check_close(outputs: list[RequestOutput], twin: Twin, loss: float) -> None:
    """Of the tokens that were chosen, the log-probabilities of the cacheless forward, which quantizes nothing."""
    for output in outputs:
        expected = twin.log_probabilities(output.prompt_token_ids + output.outputs[0].token_ids)
        first, tokens = len(output.prompt_token_ids) - 1, output.outputs[0].token_ids
        np.testing.assert_allclose(scores(output), expected[np.arange(first, first + len(tokens)), tokens], atol=loss)


@pytest.mark.parametrize("dtype", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_prefix_hit_equals_miss(dtype: str) -> None:
    loaded = load_model(GOLDENS / "llama3_gqa")
    engine = make_engine(loaded, kv_cache_dtype=dtype)
    layer = loaded.config.layers[0]
    # Of 2 layers' pages of 4 tokens: a byte for each number, 4 for each vector's scale.
    assert engine.plan.page_bytes == [2 * 4 * layer.num_kv_heads * 2 * (layer.head_dim + 4)]
    assert f"float32, keys and values {engine.plan.layers[0].case.kv_dtype}, " in engine.plan.describe()
    (lane,) = engine.runner._lanes
    assert engine.plan.kv_cache_bytes == sum(array.nbytes for array in jax.tree.leaves(lane.pools))
    prompts, params = random_prompts(3, 41, 9), greedy(8, logprobs=0)
    miss, hit = run(engine, prompts, params), run(engine, prompts, params)
    assert [output.metrics.num_cached_tokens for output in hit] == [40, 8]
    check_same(miss, hit)
    check_close(miss, Twin(loaded, 96), LOSS[dtype])


@pytest.mark.slow
def test_rings_chunks_and_preemptions() -> None:
    """Two layers of a window of 8 around one that sees all; sequences that do not all fit."""
    loaded = load_model(GOLDENS / "gemma2")
    quantized = make_engine(loaded, kv_cache_dtype="int8")
    whole = make_engine(loaded, kv_cache_dtype="int8", max_num_batched_tokens=64, num_pages=60)
    prompts, params = random_prompts(2, 50, 17, 33), greedy(40, logprobs=2)
    chunked = run(quantized, prompts, params)
    assert quantized.stats().num_preemptions > 0
    undisturbed = run(whole, prompts, params)
    assert whole.stats().num_preemptions == 0
    check_same(chunked, undisturbed)
    check_close(chunked, Twin(loaded, 96), LOSS["int8"])


@pytest.mark.slow
def test_latents_of_float8() -> None:
    loaded = load_model(GOLDENS / "deepseek_v2_dense")
    engine = make_engine(loaded, kv_cache_dtype="fp8")
    assert engine.plan.page_bytes == [2 * 4 * (20 + 8 + 4)]
    prompts, params = random_prompts(11, 22, 9, 14, 20) * 2, greedy(30, logprobs=0)
    outputs = run(engine, prompts, params)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    check_same(outputs[:4], outputs[4:])
    (alone,), (hit,) = run(engine, prompts[:1], params), run(engine, prompts[:1], params)
    assert hit.metrics.num_cached_tokens == 20
    check_same([alone, hit], [outputs[0], outputs[0]])
    check_close(outputs, Twin(loaded, 96), LOSS["fp8"])
