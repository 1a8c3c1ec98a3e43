"""Any order of adding, stepping, aborting and swapping weights, with any parameters: the books stay right, outputs only
grow, and every greedy request that finishes equals its twin computed alone."""

from __future__ import annotations

import jax
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jaxinfer.engine import Engine
from jaxinfer.types import RequestOutput, SamplingParams
from tests.e2e.harness import EOS, PARAMS_OF, VOCAB_SIZE, Twin, add, num_pages_held, random_prompts, step

SHARED = random_prompts(77, 60)[0]
token = st.integers(0, VOCAB_SIZE - 1)
# Beginnings that others share, and ends of their own.
prompts = st.builds(lambda n, tail: SHARED[:n] + tail, st.integers(0, 60), st.lists(token, min_size=1, max_size=30))
maybe = st.none()


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.none() | st.integers(1, 40))
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 5])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, 50.0])),
        top_k=draw(st.sampled_from([0, 1, 10, 1000])),
        top_p=draw(st.sampled_from([1.0, 0.5, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.2, 1.0])),
        typical_p=draw(st.sampled_from([1.0, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.5, 0.01])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0, -100.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 1.0, 100.0])),
        logit_bias=draw(maybe | st.dictionaries(token, st.sampled_from([-100.0, 2.0, 100.0]), max_size=3)),
        allowed_token_ids=draw(maybe | st.lists(token, min_size=6, max_size=20, unique=True)),
        banned_token_ids=draw(maybe | st.lists(token, max_size=4)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens or 10, 10))),
        stop_token_ids=draw(maybe | st.just([EOS])),
        stop=draw(maybe | st.sampled_from(["a", "bc", ["x", "y "]])),
        ignore_eos=draw(st.booleans()),
        seed=draw(maybe | st.integers(0, 2**32 - 1)),
        logprobs=draw(maybe | st.sampled_from([0, 3, 20])),
        prompt_logprobs=draw(maybe | st.sampled_from([0, 3])),
    )


def is_plain(params: SamplingParams) -> bool:
    """Its tokens are the model's own most probable ones."""
    return (
        params.temperature == 0
        and params.repetition_penalty == 1.0
        and not (params.presence_penalty or params.frequency_penalty or params.logit_bias)
        and params.allowed_token_ids is None
        and not params.banned_token_ids
        and not params.min_tokens
    )


def clear(engine: Engine, twin: Twin) -> None:
    """As if new: examples must not depend on those before them."""
    for request_id in list(engine._requests):
        engine.abort(request_id)
    engine.update_params(twin.params)  # forgets all prefixes too
    engine._num_added = 0  # from which requests without a seed get theirs


class Hostile(RuleBasedStateMachine):
    engine: Engine
    twins: tuple[Twin, Twin]

    def __init__(self) -> None:
        super().__init__()
        clear(self.engine, self.twins[0])
        self.num_requests_before = self.engine.stats().num_requests
        self.num_finished_before = sum(self.engine.stats().num_finished.values())
        self.live: dict[str, bool] = {}  # id -> whether weights were swapped since
        self.seen: dict[str, list[list[int]]] = {}
        self.twin = 0

    @rule(prompt=prompts, params=sampling_params(), priority=st.integers(-1, 1), salt=st.sampled_from(["", "", "s"]))
    def add(self, prompt: list[int], params: SamplingParams, priority: int, salt: str) -> None:
        request_id = add(self.engine, prompt, params, priority=priority, cache_salt=salt)
        self.live[request_id] = False
        self.seen[request_id] = [[] for _ in range(params.n)]

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            for output in step(self.engine):
                self.check(output)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        output = self.engine.abort(request_id)
        assert output is not None
        assert output.finished
        self.check(output, aborted=True)

    @rule()
    def swap_weights(self) -> None:
        self.twin = 1 - self.twin
        self.engine.update_params(self.twins[self.twin].params)
        self.live = dict.fromkeys(self.live, True)

    def check(self, output: RequestOutput, aborted: bool = False) -> None:
        """No step takes back what an earlier one gave; a finished request is what it would be alone."""
        request_id = output.request_id
        params, seen = PARAMS_OF[request_id], self.seen[request_id]
        assert request_id in self.live, "output of a request that had ended"
        assert output.error is None
        for completion, before in zip(output.outputs, seen, strict=True):
            tokens = completion.token_ids
            assert tokens[: len(before)] == before
            before[:] = tokens
            if completion.logprobs is not None:
                assert [next(iter(entry)) for entry in completion.logprobs] == tokens
            assert params.max_tokens is None or len(tokens) <= params.max_tokens
            assert len(output.prompt_token_ids) + len(tokens) <= 96
            assert params.allowed_token_ids is None or set(tokens) <= set(params.allowed_token_ids)
            assert not set(tokens) & set(params.banned_token_ids or ())
            ends = {EOS} if params.stop_token_ids or not params.ignore_eos else set()
            assert not ends & set(tokens[:-1] if completion.finish_reason == "stop" else tokens)
            assert (completion.finish_reason is None) <= (not output.finished)
            if completion.finish_reason == "stop":
                assert len(tokens) >= params.min_tokens
        if output.finished:
            assert request_id not in self.engine._requests
            swapped = self.live.pop(request_id)
            if not swapped and not aborted:
                self.twins[self.twin].check(output, greedy=is_plain(params))

    @invariant()
    def numbers_add_up(self) -> None:
        stats = self.engine.stats()
        assert self.engine.has_unfinished() == bool(self.live)
        num_finished = sum(stats.num_finished.values()) - self.num_finished_before
        assert num_finished + len(self.live) == stats.num_requests - self.num_requests_before
        assert stats.kv_usage <= stats.kv_usage_peak <= 1

    def teardown(self) -> None:
        while self.live:
            self.steps(20)
        self.engine.scheduler.check_integrity()
        assert num_pages_held(self.engine) == 0


@pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.slow)])
def test_any_order_of_anything(engine: Engine, twin: Twin, examples: int) -> None:
    other = Twin(engine.loaded, twin.length)
    other.params = jax.tree.map(lambda leaf: leaf * 0.9, twin.params)

    class OnThisEngine(Hostile):
        pass

    OnThisEngine.engine, OnThisEngine.twins = engine, (twin, other)
    try:
        run_state_machine_as_test(
            OnThisEngine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=30,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        clear(engine, twin)
