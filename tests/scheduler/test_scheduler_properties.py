"""Any interleaving of requests, steps, late commits, aborts and resets leaves the books and the tokens right."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.scheduler.simulation import VOCAB, Setup, SimulatedEngine


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    window = st.integers(1, 12)
    windows = draw(st.lists(st.none() | window, min_size=1, max_size=3).map(tuple))
    max_num_seqs = draw(st.integers(1, 5))
    return Setup(
        windows=windows,
        num_pages=tuple(draw(st.integers(3, 16)) for _ in windows),
        page_size=draw(st.integers(1, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 9)),
        max_model_len=draw(st.integers(6, 40)),
        max_chunk_tokens=draw(st.none() | st.integers(1, 6)),
        enable_prefix_caching=draw(st.booleans()),
        depth=draw(st.integers(0, 2)),
    )


BASE = [0, 1, 1, 2, 0, 2, 1, 0, 0, 1, 2, 2, 1, 1, 0, 2]
token = st.integers(0, VOCAB - 1)
prompts = st.builds(lambda shared, tail: BASE[:shared] + tail, st.integers(0, len(BASE)), st.lists(token, max_size=6))
max_tokens = st.none() | st.integers(1, 12)


class AnyInterleaving(RuleBasedStateMachine):
    @initialize(setup=setups())
    def start(self, setup: Setup) -> None:
        self.engine = SimulatedEngine(setup)

    @rule(
        prompt=prompts,
        n=st.integers(1, 3),
        max_tokens=max_tokens,
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.none() | st.just([2]),
        priority=st.integers(0, 2),
        cache_salt=st.sampled_from(["", "", "other"]),
        compute_all_prompt=st.booleans(),
    )
    def add(self, prompt, max_tokens, min_tokens, **options) -> None:
        engine = self.engine
        capacity = engine.manager.max_sequence_tokens()
        min_tokens = min(min_tokens, max_tokens or min_tokens)
        before = engine.scheduler.num_waiting
        try:
            engine.add(prompt, max_tokens=max_tokens, min_tokens=min_tokens, **options)
        except ValueError:
            assert not prompt or len(prompt) >= engine.setup.max_model_len or len(prompt) > capacity
            assert engine.scheduler.num_waiting == before

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def commit_early(self) -> None:
        self.engine.commit()

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(self.engine.live)))

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def finish_by_stop_string(self, data: st.DataObject) -> None:
        self.engine.scheduler.finish(data.draw(st.sampled_from(self.engine.live)), "stop", "text")
        self.engine.collect()

    @rule()
    def reset_cache(self) -> None:
        self.engine.reset_cache()

    @invariant()
    def books_and_tokens(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()


AnyInterleaving.TestCase.settings = settings(
    max_examples=100, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyInterleaving = AnyInterleaving.TestCase


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    setup=setups(),
    requests=st.lists(st.tuples(prompts.filter(bool), st.integers(1, 3), max_tokens, st.integers(0, 1)), max_size=8),
)
def test_all_requests_at_once_end_as_if_alone(setup: Setup, requests: list) -> None:
    """No deadlock and no starvation in pools of a few pages; drain() compares every output with the undisturbed run."""
    engine = SimulatedEngine(setup)
    for prompt, n, limit, priority in requests:
        if len(prompt) < setup.max_model_len and len(prompt) <= engine.manager.max_sequence_tokens():
            engine.add(prompt, n=n, max_tokens=limit, priority=priority)
    engine.drain()
    assert len(engine.finished) == sum(s.params.n for s in engine.finished if s.sample_index == 0)
    assert all(s.finish_reason in ("stop", "length") for s in engine.finished)
