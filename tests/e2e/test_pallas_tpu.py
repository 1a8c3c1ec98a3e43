"""The engine on the TPU kernel, simulated: the tokens and log-probabilities of the cacheless forward, and of XLA's
attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.loading import load_model
from jaxinfer.ops import paged_attention
from tests.e2e.harness import GOLDENS, Twin, few_programs, greedy, make_engine, random_prompts, run, tokens_of


@pytest.fixture
def simulated_tpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which the kernel for TPUs says yes, and is interpreted."""
    backends = {backend.name: backend for backend in paged_attention.BACKENDS}
    kernel = backends["pallas_tpu"]
    forced = replace(kernel, supports=lambda case: kernel.supports(replace(case, platform="tpu")))
    monkeypatch.setattr(paged_attention, "BACKENDS", (forced, backends["xla"]))
    few_programs(monkeypatch, token_buckets=(8,))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.slow
def test_equals_forward_and_xla(simulated_tpu: None) -> None:
    """Gemma 2, made small: rings of a window of 8 around a layer that sees all, soft caps, grouped queries."""
    loaded = load_model(GOLDENS / "gemma2")
    settings = {"max_model_len": 48, "page_size": 8, "max_num_seqs": 3, "max_num_batched_tokens": 8, "num_pages": 20}
    prompts = random_prompts(7, 13, 1, 5, 3)
    params = [greedy(12, logprobs=2), greedy(9, logprobs=0), greedy(4), greedy(7)]
    outputs = {}
    for name in ("pallas_tpu", "xla"):
        engine = make_engine(loaded, attention_backend=name, **settings)
        assert {layer.backend.name for layer in engine.plan.layers} == {name}
        outputs[name] = run(engine, prompts, params)
        twin = Twin(loaded, 48)
        for output in outputs[name]:
            twin.check(output)
    assert tokens_of(outputs["pallas_tpu"]) == tokens_of(outputs["xla"])


@pytest.mark.slow
def test_eight_bits_equal_xla(simulated_tpu: None) -> None:
    """Llama 3, made small: chunks, decodes, and a second page."""
    loaded = load_model(GOLDENS / "llama3_gqa")
    settings = {"max_model_len": 64, "page_size": 32, "max_num_seqs": 3, "max_num_batched_tokens": 8, "num_pages": 8}
    prompts, outputs = random_prompts(7, 29, 1, 5), {}
    for name in ("pallas_tpu", "xla"):
        engine = make_engine(loaded, attention_backend=name, kv_cache_dtype="int8", **settings)
        outputs[name] = run(engine, prompts, greedy(6))
    assert tokens_of(outputs["pallas_tpu"]) == tokens_of(outputs["xla"])
