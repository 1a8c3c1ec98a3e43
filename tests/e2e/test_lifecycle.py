"""Requests come, go, fail and are taken back at any moment; the others never notice."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfer.engine import Engine, make_request
from jaxinfer.llm import LLM
from jaxinfer.loading import load_model
from jaxinfer.runner.runner import PendingStep
from jaxinfer.runner.step_programs import StepPrograms
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.types import Request, SamplingParams
from tests.e2e.harness import (
    GOLDENS,
    Twin,
    add,
    finish,
    greedy,
    make_engine,
    num_pages_held,
    random_prompts,
    run,
    step,
    tokens_of,
)


def test_added_while_others_run(engine: Engine, twin: Twin) -> None:
    prompts = random_prompts(1, 20, 3, 40, 9, 17, 5, 30, 2)
    ids: list[str] = []

    def arrive(number: int) -> None:
        if number % 2 == 0 and len(ids) < len(prompts):
            ids.append(add(engine, prompts[len(ids)], greedy(12, logprobs=1)))

    arrive(0)
    done = finish(engine, then=arrive)
    assert sorted(done) == sorted(ids)
    assert len(ids) == len(prompts)
    for request_id in ids:
        twin.check(done[request_id])


def test_urgent_request_takes_a_place(engine: Engine, twin: Twin) -> None:
    """All four places are taken by requests of rank 1; one of rank 0 does not wait for them."""
    prompts = random_prompts(2, 8, 8, 8, 8, 8)
    ids = [add(engine, prompt, greedy(15), priority=1) for prompt in prompts[:4]]
    for _ in range(5):
        step(engine)
    assert engine.scheduler.num_running == 4
    urgent = add(engine, prompts[4], greedy(5), priority=0)
    done = finish(engine)
    for request_id in (*ids, urgent):
        twin.check(done[request_id])
    assert sum(done[request_id].metrics.num_preemptions for request_id in ids) == 1
    assert all(done[urgent].metrics.finished_time < done[request_id].metrics.finished_time for request_id in ids)  # type: ignore[operator]


@pytest.mark.parametrize("when", range(9))
def test_abort_frees_everything_at_once(engine: Engine, twin: Twin, when: int) -> None:
    """Before its first step, between chunks of its prompt, while it decodes: steps with its rows are in flight."""
    kept, aborted = random_prompts(100 + when, 11, 50)
    params = SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True, repetition_penalty=1.1, prompt_logprobs=1)
    keeper = add(engine, kept, greedy(25, logprobs=1))
    victim = add(engine, aborted, params)
    before: dict[str, list[list[int]]] = {}
    for _ in range(when):
        for output in step(engine):
            before[output.request_id] = [list(completion.token_ids) for completion in output.outputs]
    output = engine.abort(victim)
    assert output is not None
    assert output.finished
    assert output.error is None
    assert [completion.finish_reason for completion in output.outputs] == ["abort"] * 3
    assert tokens_of([output])[0] == before.get(victim, [[]] * 3)
    engine.scheduler.check_integrity()
    assert engine.scheduler.num_running + engine.scheduler.num_waiting == 1
    assert num_pages_held(engine) <= 2 * (36 // 4)  # the keeper's
    stats = engine.stats()
    assert stats.num_running + stats.num_waiting == 1
    assert engine.abort(victim) is None
    done = finish(engine)
    assert list(done) == [keeper]
    twin.check(done[keeper])


def test_id_is_free_again_at_once(engine: Engine, twin: Twin) -> None:
    """What a step in flight computed for an aborted request is not given to the next of its name."""
    first, second = random_prompts(3, 14, 30)
    params = greedy(5, prompt_logprobs=2, logprobs=2)
    for num_steps in range(4):
        engine.add_request(make_request(engine, "reused", first, params))
        for _ in range(num_steps):
            step(engine)
        engine.abort("reused")
    engine.add_request(make_request(engine, "reused", second, params))
    with pytest.raises(ValueError, match="request_id='reused' is already running"):
        engine.add_request(make_request(engine, "reused", second, params))
    output = finish(engine)["reused"]
    assert output.prompt_token_ids == second
    (expected,) = run(engine, [second], params)
    twin.check(expected)
    assert tokens_of([output]) == tokens_of([expected])
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(second)


BAD_REQUESTS = {
    "the prompt is empty": ((), SamplingParams()),
    r"prompt token id 96 is outside the vocabulary; use 0 to 95": ((5, 96), SamplingParams()),
    r"prompt token id -1 is outside the vocabulary; use 0 to 95": ((-1, 5), SamplingParams()),
    r"the prompt has 96 tokens, but max_model_len=96 leaves room for 95 and one output": ((5,) * 96, SamplingParams()),
    r"logit_bias holds token id 200, but the model's vocabulary has 96": ((5,), SamplingParams(logit_bias={200: 1.0})),
    r"stop_token_ids holds token id 96": ((5,), SamplingParams(stop_token_ids=[96])),
    r"leave none of the 1 tokens": (
        (5,),
        SamplingParams(allowed_token_ids=[2], min_tokens=1, max_tokens=3),
    ),
}


@pytest.mark.parametrize("message", BAD_REQUESTS)
def test_bad_request_is_refused_in_one_line(engine: Engine, message: str) -> None:
    prompt, params = BAD_REQUESTS[message]
    num_requests = engine.stats().num_requests
    with pytest.raises(ValueError, match=message) as refused:
        engine.add_request(Request("bad", prompt, params))
    assert "\n" not in str(refused.value)
    assert not engine.has_unfinished()
    assert not engine.scheduler.has_unfinished()
    assert engine.stats().num_requests == num_requests


def test_prompt_longer_than_the_pool(engine: Engine, twin: Twin) -> None:
    """A pool of 10 pages of 4: a prompt of 41 can never run; one of 40 can, up to the one output the pool allows."""
    small = make_engine(engine.loaded, num_pages=10)
    too_long, fitting = random_prompts(4, 41, 40)
    with pytest.raises(ValueError, match=r"the prompt has 41 tokens, but the KV cache holds at most 40 .* num_pages"):
        small.add_request(Request("long", tuple(too_long), greedy(1)))
    outputs = run(small, [fitting, fitting[:20], fitting[:30]], greedy(30))
    for output in outputs:
        twin.check(output)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 21, 11]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


@pytest.mark.parametrize("poisoned", [0, 60])
def test_bad_numbers_end_one_request_only(poisoned: int) -> None:
    """One token's embedding is not a number, so neither are keys and values of sequences that hold it, nor what they
    leave behind in pages that others get. Token 0 is also what pads batches."""
    sound = load_model(GOLDENS / "smollm3")  # its output layer has weights of its own
    embed = {"weight": sound.params["embed"]["weight"].at[poisoned].set(np.nan)}
    engine = make_engine(replace(sound, params={**sound.params, "embed": embed}), num_pages=60)
    twin = Twin(sound, 96)
    prompts = [[t for t in prompt if t != poisoned] for prompt in random_prompts(5, 12, 30, 3, 21, 50, 17)]
    victims = [
        [*prompts[0][:6], poisoned, *prompts[0][6:]],
        [poisoned],
        prompts[1] + [poisoned],  # its beginning is another request's, and may be shared
        prompts[4][:40] + [poisoned] * 5,
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    for _ in range(4):  # pages change hands
        outputs = run(engine, [*victims, *prompts], params)
        for output in outputs[: len(victims)]:
            assert output.error is not None
            assert "logits are not finite" in output.error
            assert [completion.finish_reason for completion in output.outputs] == ["error"]
        for output in outputs[len(victims) :]:
            assert poisoned not in output.outputs[0].token_ids
            twin.check(output)
    assert engine.stats().num_finished == {"error": 16, "length": 24}
    assert num_pages_held(engine) == 0


def test_weights_are_replaced_under_running_requests(engine: Engine, twin: Twin) -> None:
    """Tokens that are out stay; the next ones are the new weights'; nothing of the old weights is left in the cache."""
    prompts = random_prompts(6, 25, 7, 40)
    old = engine.loaded.params
    scheduled_before = engine.stats().queue_time.count
    new = jax.tree.map(lambda leaf: leaf * 1.05, old)
    ids = [add(engine, prompt, greedy(20, logprobs=1)) for prompt in prompts]
    given: dict[str, list[int]] = {}
    for _ in range(9):
        for output in step(engine):
            given[output.request_id] = list(output.outputs[0].token_ids)
    assert sorted(map(len, given.values()))[0] > 0
    try:
        engine.update_params(new)
        new_twin = Twin(engine.loaded, 96)
        done = finish(engine)
        for request_id, prompt in zip(ids, prompts, strict=True):
            tokens, before = done[request_id].outputs[0].token_ids, len(given[request_id])
            assert tokens[:before] == given[request_id]
            assert len(tokens) == 20
            sequence, first = prompt + tokens, len(prompt) - 1
            for of, part in ((twin, slice(first, first + before)), (new_twin, slice(first + before, -1))):
                rows = of.log_probabilities(sequence)[part]
                chosen = rows[np.arange(len(rows)), sequence[1:][part.start : part.start + len(rows)]]
                assert np.all(rows.max(-1) - chosen < 1e-3)
        assert engine.stats().queue_time.count == scheduled_before + 3, "a request left the queue twice"
        again = run(engine, prompts, greedy(5, logprobs=1))
        for output in again:
            new_twin.check(output)
    finally:
        engine.update_params(old)
    for output in run(engine, prompts, greedy(5, logprobs=1)):
        twin.check(output)
        assert output.metrics.num_cached_tokens == 0


def test_weights_of_another_model_are_refused(engine: Engine, twin: Twin) -> None:
    params = engine.loaded.params
    prompts = random_prompts(7, 12)
    request_id = add(engine, prompts[0], greedy(6))
    step(engine)
    with pytest.raises(ValueError, match=r"parameter embed/weight has shape \(95, 32\); this model's is \(96, 32\)"):
        engine.update_params({**params, "embed": {"weight": params["embed"]["weight"][1:]}})
    with pytest.raises(ValueError, match="parameter embed/weight is missing"):
        engine.update_params({name: value for name, value in params.items() if name != "embed"})
    twin.check(finish(engine)[request_id])


@pytest.mark.parametrize("broken", [(StepPrograms, "sampler"), (PendingStep, "read"), (Scheduler, "commit")])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_failed_step_leaves_a_working_engine(
    llm: LLM, twin: Twin, monkeypatch: pytest.MonkeyPatch, broken: tuple[type, str], error: type[BaseException]
) -> None:
    """Ctrl-C in a notebook, or a device that fails, between any two statements of a step."""
    prompts = random_prompts(8, 12, 30)
    engine = llm.engine
    owner, name = broken
    whole = getattr(owner, name)
    calls = iter(range(100))

    def fails_once(*arguments: object) -> object:
        if next(calls) == 4:
            raise error("on purpose")
        return whole(*arguments)

    live = engine.add_request(make_request(engine, "live", prompts[0], greedy(30)))
    monkeypatch.setattr(owner, name, fails_once)
    with pytest.raises(error, match="on purpose"):
        llm.generate(prompts, greedy(30))
    assert live.finished
    assert live.error == f"the engine failed: {error.__name__}: on purpose"
    assert not engine.has_unfinished()
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    for output in run(engine, prompts, greedy(8, logprobs=1)):
        twin.check(output)
