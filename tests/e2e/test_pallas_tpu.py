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


def spread_over_context() -> None:
    """Print the tokens of the kernels of two devices, each with every other key."""
    with simulated_tpu():
        loaded = load_model(GOLDENS / "gemma2", mesh="context=2")
        engine = make_engine(loaded, attention_backend="pallas_tpu", **SETTINGS)
        print(json.dumps(tokens_of(run(engine, *FEW))))


@pytest.mark.slow
def test_devices_that_share_keys_give_the_tokens_of_one() -> None:
    printed = run_on_devices("from tests.e2e import test_pallas_tpu as t; t.spread_over_context()", 2)
    alone = run(make_engine(load_model(GOLDENS / "gemma2"), **SETTINGS), *FEW)
    assert json.loads(printed.splitlines()[-1]) == tokens_of(alone)
