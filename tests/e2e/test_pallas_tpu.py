"""The engine on the TPU kernel, simulated: the tokens and log-probabilities of the cacheless forward, and of XLA's
attention."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxinfer.loading import load_model
from jaxinfer.ops import paged_attention
from tests.e2e.harness import GOLDENS, Twin, few_programs, greedy, make_engine, random_prompts, run, tokens_of
from tests.sharding.run_on_devices import run_on_devices


@contextlib.contextmanager
def simulated_tpu() -> Iterator[None]:
    """While the kernel for TPUs says yes, and is interpreted."""
    backends = {backend.name: backend for backend in paged_attention.BACKENDS}
    kernel = backends["pallas_tpu"]
    forced = replace(kernel, supports=lambda case: kernel.supports(replace(case, platform="tpu")))
    with (
        pytest.MonkeyPatch.context() as patch,
        pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)),
    ):
        patch.setattr(paged_attention, "BACKENDS", (forced, backends["xla"]))
        few_programs(patch, token_buckets=(8,))
        yield


SETTINGS = {"max_model_len": 48, "page_size": 8, "max_num_seqs": 3, "max_num_batched_tokens": 8, "num_pages": 20}


@pytest.mark.slow
def test_equals_forward_and_xla() -> None:
    """Gemma 2, made small: rings of a window of 8 around a layer that sees all, soft caps, grouped queries."""
    loaded = load_model(GOLDENS / "gemma2")
    prompts = random_prompts(7, 13, 1, 5, 3)
    params = [greedy(12, logprobs=2), greedy(9, logprobs=0), greedy(4), greedy(7)]
    outputs = {}
    with simulated_tpu():
        for name in ("pallas_tpu", "xla"):
            engine = make_engine(loaded, attention_backend=name, **SETTINGS)
            assert {layer.backend.name for layer in engine.plan.layers} == {name}
            outputs[name] = run(engine, prompts, params)
            twin = Twin(loaded, 48)
            for output in outputs[name]:
                twin.check(output)
    assert tokens_of(outputs["pallas_tpu"]) == tokens_of(outputs["xla"])


FEW = random_prompts(7, 13, 1, 5), [greedy(6), greedy(5), greedy(3)]


# int8 comes in tiles of 32 tokens.
OF_KV_DTYPE = {"auto": SETTINGS, "int8": {**SETTINGS, "page_size": 32, "kv_cache_dtype": "int8"}}


def spread_over_context(kv_dtype: str) -> None:
    """Print the tokens of the kernels of two devices, each with every other key."""
    with simulated_tpu():
        loaded = load_model(GOLDENS / "gemma2", mesh="context=2")
        engine = make_engine(loaded, attention_backend="pallas_tpu", **OF_KV_DTYPE[kv_dtype])
        print(json.dumps(tokens_of(run(engine, *FEW))))


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", OF_KV_DTYPE)
def test_devices_that_share_keys_give_the_tokens_of_one(kv_dtype: str) -> None:
    printed = run_on_devices(f"from tests.e2e import test_pallas_tpu as t; t.spread_over_context({kv_dtype!r})", 2)
    alone = run(make_engine(load_model(GOLDENS / "gemma2"), **OF_KV_DTYPE[kv_dtype]), *FEW)
    assert json.loads(printed.splitlines()[-1]) == tokens_of(alone)


@pytest.mark.slow
def test_eight_bits_equal_xla() -> None:
    """Llama 3, made small: chunks, decodes, and a second page."""
    loaded = load_model(GOLDENS / "llama3_gqa")
    settings = {"max_model_len": 64, "page_size": 32, "max_num_seqs": 3, "max_num_batched_tokens": 8, "num_pages": 8}
    prompts, outputs = random_prompts(7, 29, 1, 5), {}
    with simulated_tpu():
        for name in ("pallas_tpu", "xla"):
            engine = make_engine(loaded, attention_backend=name, kv_cache_dtype="int8", **settings)
            outputs[name] = run(engine, prompts, greedy(6))
    assert tokens_of(outputs["pallas_tpu"]) == tokens_of(outputs["xla"])
