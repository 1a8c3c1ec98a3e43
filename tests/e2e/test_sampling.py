"""What a request asks for is what it gets, whatever else is in the batch: seeds, samples, penalties, ends."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.types import SamplingParams
from tests.e2e.harness import (
    EOS,
    VOCAB_SIZE,
    Twin,
    add,
    finish,
    greedy,
    num_pages_held,
    random_prompts,
    run,
    step,
    text_of,
    tokens_of,
)


def sampled(max_tokens: int, seed: int | None, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True, **fields)  # type: ignore[arg-type]


def test_seed_fixes_the_tokens_whatever_the_batch(engine: Engine) -> None:
    prompt, *others = random_prompts(1, 13, 9, 22, 4)
    params = sampled(20, seed=5, temperature=1.2, top_p=0.95)
    (alone,) = run(engine, [prompt], params)
    company = [sampled(30, seed=1), greedy(10), sampled(25, seed=2, top_k=5, repetition_penalty=1.2)]
    together = run(engine, [*others, prompt], [*company, params])[-1]
    (twice,) = run(engine, [prompt], params, priority=3)
    assert tokens_of([alone]) == tokens_of([together]) == tokens_of([twice])
    (other_seed,) = run(engine, [prompt], sampled(20, seed=6, temperature=1.2, top_p=0.95))
    assert tokens_of([alone]) != tokens_of([other_seed])


def test_requests_without_seed_differ(engine: Engine) -> None:
    outputs = run(engine, random_prompts(2, 5) * 3, sampled(20, seed=None))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 3


def test_samples_follow_the_distribution(engine: Engine, twin: Twin) -> None:
    """First tokens of 400 samples against the twin's probabilities (chi-squared, of the likelier tokens)."""
    (prompt,) = random_prompts(3, 6)
    count = 400
    outputs = run(engine, [prompt] * 4, [sampled(1, seed=seed, n=count // 4, temperature=0.3) for seed in range(4)])
    drawn = [completion.token_ids[0] for output in outputs for completion in output.outputs]
    logits = twin.logits(prompt)[-1] / 0.3
    expected = count * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    likely = expected >= 5
    observed = np.bincount(drawn, minlength=VOCAB_SIZE)
    rest = [(observed[~likely].sum(), expected[~likely].sum())]
    cells = [*zip(observed[likely], expected[likely], strict=True), *rest]
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_samples_share_the_prompt_and_equal_requests_of_their_own(engine: Engine, twin: Twin) -> None:
    (prompt,) = random_prompts(4, 41)
    params = sampled(6, seed=11, n=4, temperature=1.5, logprobs=2)
    request_id = add(engine, prompt, params)
    peak = 0
    outputs = {}
    while engine.has_unfinished():
        for output in step(engine):
            outputs[output.request_id] = output
        peak = max(peak, num_pages_held(engine))
    output = outputs[request_id]
    twin.check(output)
    completions = output.outputs
    assert [completion.index for completion in completions] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in completions}) == 4
    # Full layer: 10 shared pages of the prompt, then two of each sample's own. Windows: at most 7 pages a ring.
    assert peak <= (10 + 4 * 2) + 4 * 7
    # The first of n samples is what the request gets alone.
    (alone,) = run(engine, [prompt], sampled(6, seed=11, temperature=1.5, logprobs=2))
    assert completions[0].token_ids == alone.outputs[0].token_ids
    # More samples than places run in turns, and change nothing.
    (many,) = run(engine, [prompt], sampled(6, seed=11, n=9, temperature=1.5, logprobs=2))
    twin.check(many)
    assert [completion.token_ids for completion in many.outputs[:4]] == tokens_of([output])[0]


def test_samples_of_preempted_requests(engine: Engine) -> None:
    prompts = random_prompts(5, 20, 14)
    before = engine.stats().num_preemptions
    params = [sampled(40, seed=3, n=3), sampled(40, seed=4, n=2)]
    together = run(engine, prompts, params)
    assert engine.stats().num_preemptions > before
    for prompt, own, output in zip(prompts, params, together, strict=True):
        (alone,) = run(engine, [prompt], own, cache_salt=output.request_id)
        assert tokens_of([alone]) == tokens_of([output])


def test_max_tokens_and_the_models_length(engine: Engine) -> None:
    outputs = run(engine, random_prompts(6, 7, 90, 95), [greedy(1), greedy(50), greedy(None)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 6, 1]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_stop_tokens_and_end_of_sequence(llm: LLM) -> None:
    (prompt,) = random_prompts(7, 9)
    free = llm.generate(prompt, greedy(20))[0].outputs[0]
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    ended = llm.generate(prompt, greedy(20, stop_token_ids=[stop]))[0].outputs[0]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert ended.token_ids == free.token_ids[: first + 1], "a token computed past the end was given out"
    assert ended.text == text_of(ended.token_ids[:-1]), "a stop token is no part of the text"
    kept = llm.generate(prompt, greedy(20, stop_token_ids=[stop], include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == text_of(ended.token_ids)

    wants_to_end = {"logit_bias": {EOS: 100.0}, "skip_special_tokens": False}
    ended = llm.generate(prompt, greedy(20, ignore_eos=False, **wants_to_end))[0].outputs[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason, ended.text) == ([EOS], "stop", None, "")
    ignored = llm.generate(prompt, greedy(4, **wants_to_end))[0].outputs[0]
    assert (ignored.token_ids, ignored.finish_reason, ignored.text) == ([EOS] * 4, "length", "</s>" * 4)


def test_min_tokens_holds_off_every_end(llm: LLM) -> None:
    (prompt,) = random_prompts(8, 9)
    params = greedy(20, ignore_eos=False, min_tokens=5, stop_token_ids=[7], logit_bias={EOS: 100.0, 7: 90.0})
    ended = llm.generate(prompt, params)[0].outputs[0]
    assert len(ended.token_ids) == 6
    assert ended.token_ids[-1] == EOS
    assert not {EOS, 7} & set(ended.token_ids[:-1])
    free = llm.generate(prompt, greedy(20))[0].outputs[0]
    stop = free.text[1]
    at = text_of(free.token_ids[5:]).index(stop) + 5 if stop in text_of(free.token_ids[5:]) else None
    ended = llm.generate(prompt, greedy(20, min_tokens=5, stop=stop))[0].outputs[0]
    assert ended.token_ids == (free.token_ids if at is None else free.token_ids[: at + 1])


def test_stop_strings(llm: LLM) -> None:
    (prompt,) = random_prompts(9, 9)
    free = llm.generate(prompt, greedy(20))[0].outputs[0]
    assert free.text == text_of(free.token_ids)
    stop = free.text[6:9]  # over three tokens
    end = free.text.index(stop)
    params = greedy(20, stop=[stop, "no such text"])
    ended = llm.generate(prompt, params)[0].outputs[0]
    assert (ended.text, ended.finish_reason, ended.stop_reason) == (free.text[:end], "stop", stop)
    assert ended.token_ids == free.token_ids[: end + 3]
    kept = llm.generate(prompt, greedy(20, stop=stop, include_stop_str_in_output=True))[0].outputs[0]
    assert kept.text == free.text[: end + 3]
    # What could have become a stop string is given at the end.
    last = llm.generate(prompt, greedy(20, stop=free.text[-1] + "~~~~"))[0].outputs[0]
    assert (last.text, last.finish_reason) == (free.text, "length")
    # Found in the very last token that max_tokens allows: it still counts.
    last = llm.generate(prompt, greedy(end + 3, stop=stop))[0].outputs[0]
    assert (last.text, last.finish_reason) == (free.text[:end], "stop")


def test_stop_string_ends_its_own_sample_only(llm: LLM) -> None:
    (prompt,) = random_prompts(10, 9)
    params = {"n": 3, "seed": 2, "temperature": 1.0, "ignore_eos": True, "max_tokens": 15}
    free = llm.generate(prompt, SamplingParams(**params))[0].outputs
    stop = free[1].text[4:6]
    ended = llm.generate(prompt, SamplingParams(**params, stop=stop))[0].outputs
    for one, other in zip(free, ended, strict=True):
        assert other.text == one.text.split(stop)[0]
        assert other.finish_reason == ("stop" if stop in one.text else "length")
    assert ended[1].finish_reason == "stop"


def test_biased_allowed_and_banned_tokens(engine: Engine) -> None:
    prompts = random_prompts(11, 5, 6, 7, 8)
    outputs = run(
        engine,
        prompts,
        [
            greedy(10, allowed_token_ids=[40, 41, 42]),
            sampled(30, seed=1, banned_token_ids=list(range(20, VOCAB_SIZE))),
            greedy(10, logit_bias={50: 100.0}),
            greedy(10),
        ],
    )
    tokens = [set(output.outputs[0].token_ids) for output in outputs]
    assert tokens[0] <= {40, 41, 42}
    assert max(tokens[1]) < 20
    assert tokens[2] == {50}
    (alone,) = run(engine, [prompts[3]], greedy(10))
    assert tokens_of([alone]) == tokens_of(outputs[3:])


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.5}, {"frequency_penalty": 1.0}, {"presence_penalty": 2.0}])
def test_penalties_against_the_twin(engine: Engine, twin: Twin, fields: dict[str, float]) -> None:
    (prompt,) = random_prompts(12, 12)
    (output,) = run(engine, [prompt], greedy(30, **fields))
    tokens = output.outputs[0].token_ids
    logits = twin.logits(prompt + tokens)
    for position, token_id in enumerate(tokens):
        row = logits[len(prompt) - 1 + position].astype(np.float64)
        counts = np.bincount(tokens[:position], minlength=VOCAB_SIZE)
        seen = counts + np.bincount(prompt, minlength=VOCAB_SIZE) > 0
        penalty = fields.get("repetition_penalty", 1.0)
        row = np.where(seen, np.where(row > 0, row / penalty, row * penalty), row)
        row = row - fields.get("frequency_penalty", 0.0) * counts - fields.get("presence_penalty", 0.0) * (counts > 0)
        assert row.max() - row[token_id] < 1e-3
    assert len(set(tokens)) > len(set(run(engine, [prompt], greedy(30))[0].outputs[0].token_ids))


def test_logprobs_of_prompt_and_output(engine: Engine, twin: Twin) -> None:
    """Prompts longer than a step and than a scorer's rows; beside requests that ask for none."""
    prompts = random_prompts(13, 1, 2, 70, 11, 12)
    outputs = run(
        engine,
        prompts,
        [
            greedy(3, prompt_logprobs=5, logprobs=5),
            sampled(5, seed=1, prompt_logprobs=0, logprobs=0),
            greedy(3, prompt_logprobs=20, logprobs=20),
            greedy(8),
            sampled(5, seed=1, logprobs=1, n=2, prompt_logprobs=1),
        ],
    )
    for output in outputs:
        twin.check(output)
    assert outputs[3].prompt_logprobs is None
    assert outputs[3].outputs[0].logprobs is None
    entry = outputs[0].outputs[0].logprobs[0]  # type: ignore[index]
    for token_id, scored in entry.items():
        assert scored.decoded_token == (text_of([token_id]) or ["<unk>", "<s>", "</s>"][token_id])


def test_penalties_count_no_overshoot(engine: Engine) -> None:
    """A place in the batch is reused at once: what its last owner computed past its end must not count for the next."""
    prompts = random_prompts(14, *[6] * 12)
    params = [sampled(3 + i % 5, seed=i, frequency_penalty=1.0, repetition_penalty=1.2) for i in range(12)]
    together = run(engine, prompts, params)
    alone = [run(engine, [prompt], own)[0] for prompt, own in zip(prompts, params, strict=True)]
    assert tokens_of(together) == tokens_of(alone)


def test_greedy_is_greedy_at_any_priority(engine: Engine, twin: Twin) -> None:
    """Urgent requests overtake: with two ranks over four places, every urgent one ends before any other."""
    prompts = random_prompts(15, *[10] * 8)
    ids = [add(engine, prompt, greedy(12), priority=1 - i // 4) for i, prompt in enumerate(prompts)]
    done = finish(engine)
    for request_id in ids:
        twin.check(done[request_id])
    ends = [done[request_id].metrics.finished_time or 0.0 for request_id in ids]
    assert max(ends[4:]) < min(ends[:4])
