"""The engine gives what the cacheless forward gives: every kind of attention, chunk, ring, prefix and preemption."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.engine import Engine
from jaxinfer.loading import load_model
from jaxinfer.types import SamplingParams
from tests.e2e.harness import GOLDENS, Twin, add, finish, greedy, make_engine, random_prompts, run, tokens_of

# Each with what it has that the others have not.
KINDS = {
    "llama3_gqa": "full attention only, grouped queries, scaled rope",
    "mistral_window": "windows only: no pool grows with the sequence",
    "qwen2_windows": "a full layer, then windows; biases",
    "gemma2": "windows around a full layer, attention and final soft caps, norms on both sides",
    "gemma3_text": "five windows to a full layer, two rope bases, query and key norms",
    "gemma4_e": "layers that read other layers' keys, two head dims, per-layer inputs",
    "gpt_bigcode_mqa": "one kv head, learned positions, biases, layer norm",
    "deepseek_v3": "one latent for all heads' keys and values; a dense layer, then experts in groups",
    "smollm3": "a layer without rope between layers with it",
    "qwen2_moe_step": "experts in some layers, one shared behind a gate",
    "gpt_oss": "attention sinks in rings and full attention, experts with biases",
}


# What the others have too is left to `make test-slow`.
SLOW = {"mistral_window", "qwen2_windows", "gemma3_text", "gpt_bigcode_mqa", "smollm3"}


@pytest.mark.parametrize("golden", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_equals_forward(golden: str) -> None:
    loaded = load_model(GOLDENS / golden)
    max_model_len = min(96, loaded.config.max_position)
    engine = make_engine(loaded, max_model_len=max_model_len, num_pages=60)
    twin = Twin(loaded, max_model_len)
    stored = np.load(GOLDENS / golden / "golden.npz")
    long = max_model_len - 30  # outputs that go far past the window of 8
    prompts = [*(stored[f"prompt_{i}"].tolist() for i in range(2)), *random_prompts(1, 30, 2, 19)]
    params = [greedy(12, logprobs=3), greedy(12, logprobs=0), greedy(long, logprobs=3), greedy(9), greedy(5)]
    outputs = run(engine, prompts, params)
    for output in outputs:
        twin.check(output)
    for i in range(2):
        assert outputs[i].outputs[0].token_ids == stored[f"greedy_{i}"].tolist(), "not what transformers generates"
    assert len(outputs[2].outputs[0].token_ids) == long
    assert engine.stats().num_preemptions == 0


@pytest.mark.parametrize("chunk", [5, 64])
def test_chunked_prefill_equals_whole(engine: Engine, twin: Twin, chunk: int) -> None:
    """The shared engine prefills 16 tokens a step."""
    other = make_engine(engine.loaded, max_num_batched_tokens=chunk, num_pages=60)
    prompts, params = random_prompts(2, 50, 17, 33), greedy(6, logprobs=2)
    outputs = run(other, prompts, params)
    for output in outputs:
        twin.check(output)
    assert tokens_of(outputs) == tokens_of(run(engine, prompts, params))
    num_prompt_tokens = sum(map(len, prompts))
    assert other.stats().step_prefill_tokens.count >= num_prompt_tokens / chunk
    assert other.stats().step_prefill_tokens.maximum == min(chunk, 64)


def test_ring_far_past_the_window(engine: Engine, twin: Twin) -> None:
    (output,) = run(engine, random_prompts(3, 5), greedy(91, logprobs=3))
    twin.check(output)
    assert len(output.outputs[0].token_ids) == 91  # eleven windows, each ring slot rewritten three times


def test_prefix_hit_equals_miss(engine: Engine, twin: Twin) -> None:
    prompt, tail = random_prompts(4, 41, 9)
    params = greedy(8, logprobs=3)
    before = engine.stats()
    (miss,) = run(engine, [prompt], params, cache_salt="prefix test")
    again, other_tail = run(engine, [prompt, prompt[:30] + tail], params, cache_salt="prefix test")
    (other_salt,) = run(engine, [prompt], params, cache_salt="another")
    for output in (miss, again, other_tail, other_salt):
        twin.check(output)
    assert tokens_of([miss]) == tokens_of([again]) == tokens_of([other_salt])
    assert miss.metrics.num_cached_tokens == other_salt.metrics.num_cached_tokens == 0
    assert again.metrics.num_cached_tokens == 40  # ten full pages of four; the last token is always computed
    assert other_tail.metrics.num_cached_tokens == 28  # full pages of the 30 tokens they share
    after = engine.stats()
    assert after.num_cached_prompt_tokens - before.num_cached_prompt_tokens == 68
    assert after.num_queried_prompt_tokens - before.num_queried_prompt_tokens == 41 + 41 + 39 + 41


@pytest.mark.parametrize("golden", ["llama3_gqa", "gemma2"])
def test_a_long_prefix_that_all_share(golden: str) -> None:
    """While they decode together attention reads it once, in layers that never forget; before and after it does not,
    when another prompt is among them or one is left alone."""
    loaded = load_model(GOLDENS / golden)
    engine = make_engine(loaded, max_model_len=192, num_pages=150, max_num_batched_tokens=64)
    twin = Twin(loaded, 192)
    prefix, other, *tails = random_prompts(12, 150, 20, 1, 3, 6)
    prompts = [other, *(prefix + tail for tail in tails)]
    outputs = run(engine, prompts, [greedy(6, logprobs=3), *(greedy(n, logprobs=3) for n in (25, 20, 10))])
    for output in outputs:
        twin.check(output)
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 0, 148, 148]


def test_outputs_become_prefixes_too(engine: Engine, twin: Twin) -> None:
    """A conversation's next turn finds the turn before in the cache, generated tokens included."""
    (prompt,) = random_prompts(5, 10)
    (first,) = run(engine, [prompt], greedy(20))
    turn = prompt + first.outputs[0].token_ids + random_prompts(6, 5)[0]
    (second,) = run(engine, [turn], greedy(5, logprobs=1))
    twin.check(second)
    assert second.metrics.num_cached_tokens == 28  # of 30, less the last output whose keys were never computed


def test_no_prefix_cache_when_switched_off(engine: Engine, twin: Twin) -> None:
    other = make_engine(engine.loaded, enable_prefix_caching=False)
    prompts = random_prompts(7, 40) * 2
    for output in (*run(other, prompts, greedy(4)), *run(other, prompts, greedy(4))):
        twin.check(output)
        assert output.metrics.num_cached_tokens == 0
    assert other.stats().num_queried_prompt_tokens == 0


def test_latents_are_shared_copied_and_recomputed() -> None:
    """Keys that begin with their values, through every way a page can go: 8 sequences of 50 tokens over 30 pages of 4,
    a prompt that is in the cache, and siblings that part in the middle of a page."""
    loaded = load_model(GOLDENS / "deepseek_v2_dense")
    engine = make_engine(loaded)
    assert engine.plan.page_bytes == [2 * 4 * (20 + 8) * 4]  # layers, tokens, latent and rotated numbers, bytes
    twin = Twin(loaded, 96)
    prompts = random_prompts(11, 22, 9, 14, 20) * 2
    for output in (outputs := run(engine, prompts, greedy(30, logprobs=2))):
        twin.check(output)
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    siblings = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True, logprobs=1)
    (first,) = run(engine, prompts[:1], greedy(4))
    again, several = run(engine, [prompts[0], prompts[3][:-1]], [greedy(4, logprobs=2), siblings])
    assert tokens_of([again]) == tokens_of([first])
    assert again.metrics.num_cached_tokens == 20
    assert len({tuple(tokens) for tokens in tokens_of([several])[0]}) == 3
    for output in (again, several):
        twin.check(output)


MIXED_PARAMS = (
    greedy(40, logprobs=2),
    SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True, logprobs=1, prompt_logprobs=2),
    SamplingParams(temperature=0.7, top_p=0.9, seed=8, max_tokens=40, ignore_eos=True, frequency_penalty=0.5),
    greedy(40, repetition_penalty=1.3, presence_penalty=0.4),
    greedy(40, min_tokens=30, stop_token_ids=list(range(3, 50)), logit_bias={60: 3.0}, ignore_eos=False),
    SamplingParams(temperature=1.5, top_k=20, min_p=0.02, seed=9, max_tokens=30, ignore_eos=True, typical_p=0.95),
)


def test_preempted_equals_undisturbed(engine: Engine, twin: Twin) -> None:
    """Twelve requests of up to 60 tokens over a pool of 120; each is then run alone."""
    prompts = random_prompts(8, *[20, 3, 15, 8, 18, 11] * 2)
    params = MIXED_PARAMS * 2
    before = engine.stats().num_preemptions
    together = run(engine, prompts, params)
    num_preemptions = engine.stats().num_preemptions - before
    assert num_preemptions >= 5
    assert sum(output.metrics.num_preemptions for output in together) == num_preemptions
    for prompt, own, output in zip(prompts, params, together, strict=True):
        (alone,) = run(engine, [prompt], own, cache_salt=output.request_id)
        assert alone.metrics.num_preemptions == 0
        assert tokens_of([output]) == tokens_of([alone])
        assert output.outputs[0].finish_reason == alone.outputs[0].finish_reason
        if own.temperature == 0 and own.logprobs is not None:
            twin.check(output)


def test_preempted_while_prompt_logprobs_are_computed(engine: Engine, twin: Twin) -> None:
    """An urgent request takes the pages of one whose prompt is half scored; it is scored once, and in full."""
    (long, urgent) = random_prompts(9, 80, 60)
    slow = add(engine, long, greedy(3, prompt_logprobs=3, logprobs=1), priority=1)
    fast: list[str] = []

    def interrupt(number: int) -> None:
        if number == 3:
            fast.append(add(engine, urgent, greedy(30), priority=0))

    done = finish(engine, then=interrupt)
    assert done[slow].metrics.num_preemptions > 0
    twin.check(done[slow])
    twin.check(done[fast[0]])


def test_preempted_after_prompt_logprobs(engine: Engine, twin: Twin) -> None:
    """Recomputing a prompt whose scores are out does not give them again."""
    prompts = random_prompts(10, 20, 20, 20, 20)
    outputs = run(engine, prompts, greedy(40, prompt_logprobs=1))
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    for output in outputs:
        twin.check(output)
