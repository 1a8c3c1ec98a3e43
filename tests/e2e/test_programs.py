"""A steady engine compiles nothing, whatever it is asked for."""

from __future__ import annotations

import jax.monitoring
import numpy as np
import pytest

import jaxinfer.engine
import jaxinfer.plan
from jaxinfer.engine import Engine
from jaxinfer.types import SamplingParams
from tests.e2e.harness import EOS, VOCAB_SIZE, add, make_engine, random_prompt, step

# Every program that XLA compiles or loads, the engine's own and any other.
_compilations: list[str] = []


def _note(event: str, _: float, **arguments: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(str(arguments))


jax.monitoring.register_event_duration_secs_listener(_note)


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Any mix of everything that can be asked for."""

    def maybe(value: object, otherwise: object, chance: float = 0.3) -> object:
        return value if rng.random() < chance else otherwise

    fields = {
        "n": maybe(int(rng.integers(2, 4)), 1),
        "temperature": maybe(0.0, float(rng.uniform(0.2, 2.0))),
        "top_k": maybe(int(rng.integers(1, 50)), 0),
        "top_p": maybe(float(rng.uniform(0.1, 1.0)), 1.0),
        "min_p": maybe(float(rng.uniform(0.0, 0.3)), 0.0),
        "typical_p": maybe(float(rng.uniform(0.1, 1.0)), 1.0),
        "repetition_penalty": maybe(float(rng.uniform(0.5, 2.0)), 1.0),
        "presence_penalty": maybe(float(rng.uniform(-1.0, 1.0)), 0.0),
        "frequency_penalty": maybe(float(rng.uniform(-1.0, 1.0)), 0.0),
        "logit_bias": maybe({EOS: 2.0, 7: -3.0}, None),
        "allowed_token_ids": maybe(list(range(VOCAB_SIZE // 2)), None),
        "banned_token_ids": maybe([5, 6], None),
        "max_tokens": int(rng.integers(1, 25)),
        "stop_token_ids": maybe([int(rng.integers(3, VOCAB_SIZE))], None),
        "ignore_eos": bool(rng.random() < 0.5),
        "seed": maybe(int(rng.integers(0, 2**32)), None),
        "logprobs": maybe(int(rng.integers(0, 20)), None),
        "prompt_logprobs": maybe(int(rng.integers(0, 20)), None),
    }
    fields["min_tokens"] = int(rng.integers(0, fields["max_tokens"] + 1)) if rng.random() < 0.3 else 0  # type: ignore[operator]
    return SamplingParams(**fields)  # type: ignore[arg-type]


def test_nothing_compiles_after_warm_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged arrivals of every sort, shared beginnings, samples, aborts and preemptions; all real buckets."""
    monkeypatch.setattr(jaxinfer.engine, "resolve", jaxinfer.plan.resolve)
    warm = make_engine(engine.loaded, max_num_seqs=3, max_num_batched_tokens=12, num_pages=24)
    assert warm.plan.token_buckets == (1, 2, 4, 8, 12)
    assert warm.plan.sequence_buckets == (1, 3)
    warm.warm_up()
    stats = warm.stats()
    num_programs = stats.num_programs_compiled + stats.num_programs_loaded
    # begin, layers, end and scorer of each token bucket; samplers; copier, admission, first state, two empty pools
    assert num_programs == 4 * 5 + 2 + 5
    rng = np.random.default_rng(0)
    shared = random_prompt(rng, 40)
    ids: list[str] = []
    _compilations.clear()
    for number in range(400):
        if len(ids) < 40 and rng.random() < 0.3:
            prompt = shared[: int(rng.integers(0, 40))] + random_prompt(rng, int(rng.integers(1, 30)))
            ids.append(add(warm, prompt, random_params(rng), priority=int(rng.integers(0, 2))))
        if ids and rng.random() < 0.02:
            warm.abort(str(rng.choice(ids)))
        step(warm)
        if number > 200 and not warm.has_unfinished():
            break
    stats = warm.stats()
    assert not warm.has_unfinished()
    assert len(ids) == 40
    assert not _compilations
    assert stats.num_programs_compiled + stats.num_programs_loaded == num_programs
    assert stats.num_preemptions > 0
    assert stats.num_cached_prompt_tokens > 0
    assert {"stop", "length", "abort"} <= set(stats.num_finished)
