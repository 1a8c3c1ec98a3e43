"""One behaviour of the scheduler at a time, on the simulated device."""

from __future__ import annotations

import pytest

from jaxinfer.cache.groups import KVGroup
from jaxinfer.cache.manager import KVCacheManager
from jaxinfer.scheduler.schedule import Schedule, SchedulerConfig
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.scheduler.sequence import Status
from tests.scheduler.simulation import EOS, Setup, SimulatedEngine, expected_tokens


def engine_of(**fields) -> SimulatedEngine:
    return SimulatedEngine(Setup(**fields))


def shape(schedule: Schedule | None) -> list[tuple[str, int, int]]:
    """(request, start, tokens) of every row."""
    assert schedule is not None
    return [(row.sequence.request_id, row.start, row.num_tokens) for row in schedule.rows]


def test_decodes_come_first_and_chunks_fill_the_budget_exactly():
    engine = engine_of(max_num_batched_tokens=10, max_num_seqs=4)
    engine.add([1] * 4, ignore_eos=True)
    engine.step()
    engine.add([2] * 25, ignore_eos=True)
    engine.add([3] * 3, ignore_eos=True)
    assert shape(engine.step()) == [("r0", 4, 1), ("r1", 0, 9)]
    assert shape(engine.step()) == [("r0", 5, 1), ("r1", 9, 9)]
    schedule = engine.step()
    assert shape(schedule) == [("r0", 6, 1), ("r1", 18, 7), ("r2", 0, 2)]
    assert (schedule.num_decode_tokens, schedule.num_prefill_tokens, schedule.num_single_rows) == (1, 9, 1)
    assert shape(engine.step()) == [("r0", 7, 1), ("r1", 25, 1), ("r2", 2, 1)]
    engine.drain()


def test_a_newcomer_leaves_pages_for_the_rest_of_a_long_prompt():
    engine = engine_of(max_num_batched_tokens=12, max_chunk_tokens=6, num_pages=(8,), page_size=4)
    engine.add([1] * 18, max_tokens=1)
    newcomer = engine.add([2] * 5, max_tokens=3)[0]
    # Tokens to spare, and of 7 pages: 5 for r0 in the end and one to grow into, so 1 is left where r1 needs 2.
    assert shape(engine.step()) == [("r0", 0, 6)]
    assert shape(engine.step()) == [("r0", 6, 6)]
    assert shape(engine.step()) == [("r0", 12, 6)]
    assert newcomer.first_scheduled_time is None
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_chunk_cap_lets_prompts_share_a_step():
    engine = engine_of(max_num_batched_tokens=12, max_chunk_tokens=5)
    for token in range(3):
        engine.add([token] * 8)
    assert shape(engine.step()) == [("r0", 0, 5), ("r1", 0, 5), ("r2", 0, 2)]
    engine.drain()


def test_priority_then_arrival():
    engine = engine_of(max_num_seqs=1)
    for priority in (1, 0, 1, 0):
        engine.add([1, 2, 3], priority=priority, max_tokens=1)
    engine.drain()
    assert [s.request_id for s in engine.finished] == ["r1", "r3", "r0", "r2"]
    assert engine.scheduler.num_preemptions == 0


@pytest.mark.parametrize("short_of", ["slots", "pages"])
def test_an_urgent_request_takes_room_from_less_urgent_ones_only(short_of: str):
    limits = {"max_num_seqs": 2} if short_of == "slots" else {"num_pages": (7,), "page_size": 4}
    engine = engine_of(depth=1, **limits)
    older = engine.add([1] * 6, priority=1, max_tokens=5, ignore_eos=True)[0]
    younger = engine.add([2] * 6, priority=1, max_tokens=5, ignore_eos=True)[0]
    engine.step()
    engine.step()
    equal = engine.add([3] * 6, priority=1)[0]
    engine.step()
    assert older.status is younger.status is Status.RUNNING
    assert equal.status is Status.WAITING
    urgent = engine.add([4] * 6, priority=0)[0]
    schedule = engine.step()
    assert urgent.status is older.status is Status.RUNNING
    assert schedule is not None
    assert schedule.preempted == (younger,)
    engine.drain()


def test_the_youngest_is_preempted_and_ends_with_the_same_tokens():
    engine = engine_of(num_pages=(8,), page_size=4, max_num_seqs=3)
    sequences = [engine.add([token] * 5, max_tokens=14, ignore_eos=True)[0] for token in range(3)]
    engine.drain()
    assert sequences[0].num_preemptions == 0
    assert sequences[1].num_preemptions >= 1
    assert engine.scheduler.num_preemptions == sum(s.num_preemptions for s in sequences)


def test_a_preempted_sequence_waits_for_its_token_in_flight():
    engine = engine_of(num_pages=(5,), page_size=4, depth=3, max_num_seqs=2, enable_prefix_caching=False)
    old = engine.add([1] * 3, ignore_eos=True, max_tokens=20)[0]
    young = engine.add([2] * 3, ignore_eos=True, max_tokens=20)[0]
    while not young.num_preemptions:
        engine.step()
    known, in_flight = len(young.token_ids), young.num_in_flight
    assert in_flight > 1
    engine.abort(old)  # room for it at once, but some of its tokens are on their way
    while young.num_in_flight:
        assert engine.scheduler.schedule() is None
        engine.commit()
    assert len(young.token_ids) == known + in_flight
    assert shape(engine.step()) == [("r1", 0, known + in_flight)]
    engine.drain()


def test_a_big_request_that_does_not_fit_yet_is_not_overtaken():
    engine = engine_of(num_pages=(11,), page_size=4, max_num_batched_tokens=64, max_num_seqs=4)
    engine.add([1] * 20, max_tokens=8, ignore_eos=True)
    engine.step()
    big = engine.add([2] * 24, max_tokens=1)[0]
    small = engine.add([3] * 2, max_tokens=1)[0]
    while big.status is Status.WAITING:
        assert small.status is Status.WAITING
        engine.step()
    engine.drain()


def test_a_prefix_is_shared_within_the_step_that_computes_it():
    engine = engine_of(max_num_batched_tokens=40, num_pages=(40,))
    for token in range(4):
        engine.add([1] * 16 + [token, token], max_tokens=2)
    assert shape(engine.step()) == [("r0", 0, 18), ("r1", 16, 2), ("r2", 16, 2), ("r3", 16, 2)]
    stats = engine.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (4 * 18, 3 * 16)
    assert stats.kv.num_held == 4 + 4
    engine.drain()


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("windows", [(None,), (6,), (None, 6, 9)])
def test_a_conversation_goes_on_from_its_cached_pages(depth: int, windows: tuple):
    engine = engine_of(depth=depth, windows=windows, num_pages=(33,) * len(windows))
    first = engine.add([1, 2, 3, 4, 5], max_tokens=12, ignore_eos=True)[0]
    engine.drain()
    again = engine.add([*first.token_ids, 1, 2], max_tokens=4)[0]
    engine.drain()
    assert again.num_cached_tokens == 16  # of 17; the last one was never computed
    whole = engine.add(first.token_ids[:16], max_tokens=4)[0]  # its last token must be computed
    engine.drain()
    assert whole.num_cached_tokens == 12


def test_no_hits_across_salts_or_when_every_position_is_wanted_or_after_a_reset():
    engine = engine_of()
    prompt = [1] * 9
    cases = [({}, 0), ({}, 8), ({"cache_salt": "b"}, 0), ({"cache_salt": "b"}, 8), ({"compute_all_prompt": True}, 0)]
    for options, cached in cases:
        sequence = engine.add(prompt, max_tokens=2, **options)[0]
        engine.drain()
        assert sequence.num_cached_tokens == cached, options
    engine.reset_cache()
    sequence = engine.add(prompt, max_tokens=2)[0]
    engine.drain()
    assert sequence.num_cached_tokens == 0


def test_a_window_costs_the_same_at_any_length():
    peaks = []
    for length in (100, 1000):
        engine = engine_of(
            windows=(None, 10), num_pages=(400, 30), max_model_len=1024, max_num_batched_tokens=8, page_size=4
        )
        engine.add([1, 2, 3] * (length // 3), max_tokens=20, ignore_eos=True)
        engine.drain()
        full, ring = engine.manager.pools
        assert full.peak_held == -(-(length // 3 * 3 + 19) // 4)
        assert ring.peak_held <= engine.manager.table_widths[1]
        peaks.append(ring.peak_held)
    assert peaks[0] == peaks[1]


def test_samples_fork_from_the_prompt_and_copy_only_its_last_page():
    engine = engine_of(max_num_batched_tokens=8, num_pages=(33,))
    samples = engine.add([1, 2] * 5, n=3, max_tokens=4, ignore_eos=True)
    assert shape(engine.step()) == [("r0", 0, 8)]
    schedule = engine.step()
    assert shape(schedule) == [("r0", 8, 2), ("r0", 10, 0), ("r0", 10, 0)]
    assert [row.hidden_row for row in schedule.rows] == [0, 0, 0]
    assert [row.sequence for row in schedule.rows] == samples
    assert all(row.samples for row in schedule.rows)
    assert engine.manager.pools[0].num_held == 3
    schedule = engine.step()
    assert len(schedule.copies) == 2  # the last holder writes in place
    assert engine.manager.pools[0].num_held == 5
    engine.drain()
    assert len({tuple(s.token_ids) for s in samples}) > 1


def test_samples_without_a_slot_queue_and_hit_the_prompt_pages():
    engine = engine_of(max_num_seqs=2)
    samples = engine.add([1, 2] * 5, n=4, max_tokens=4)
    assert len(engine.step().rows) == 2
    engine.drain()
    assert [s.num_cached_tokens for s in samples] == [0, 10, 8, 8]


def test_abort_frees_pages_at_once_and_the_row_in_flight_is_dropped():
    engine = engine_of()
    doomed = engine.add([1, 2] * 3, n=2, ignore_eos=True)
    kept = engine.add([3, 3])[0]
    engine.step()
    engine.step()
    assert engine.scheduler.abort("r0") == doomed
    assert [s.finish_reason for s in doomed] == ["abort", "abort"]
    assert engine.manager.pools[0].num_held == kept.pages.num_pages
    assert engine.scheduler.abort("r0") == engine.scheduler.abort("never seen") == []
    schedule, tokens = engine.in_flight.popleft()
    assert len(tokens) == 3
    assert [update.sequence for update in engine.scheduler.commit(schedule, tokens)] == [kept]
    engine.drain()


def test_no_row_is_scheduled_beyond_max_tokens_and_one_after_a_stop():
    engine = engine_of(depth=1)
    counted = engine.add([1, 2, 3], max_tokens=5, ignore_eos=True)[0]
    engine.drain()
    assert engine.device.num_computed == 3 + 4
    assert counted.finish_reason == "length"
    engine.device.num_computed = 0
    stopped = engine.add([5, 5], max_tokens=50)[0]
    engine.drain()
    assert stopped.finish_reason == "stop"
    assert stopped.stop_reason is None
    assert stopped.token_ids[-1] == EOS
    assert engine.device.num_computed == len(stopped.token_ids)  # all but the last, and that one too late to stop


def test_stop_token_ids_and_min_tokens():
    engine = engine_of()
    free = engine.add([2, 4], max_tokens=20, ignore_eos=True)[0]
    engine.drain()
    outputs = free.output_token_ids
    token = outputs[3]
    seen = [i + 1 for i, t in enumerate(outputs) if t == token]
    for min_tokens in range(len(outputs)):
        stopped = engine.add([2, 4], max_tokens=20, ignore_eos=True, stop_token_ids=[token], min_tokens=min_tokens)[0]
        engine.drain()
        expected = next((count for count in seen if count >= min_tokens), None)
        assert stopped.num_output_tokens == (expected or 20)
        assert stopped.stop_reason == (token if expected else None)
        assert stopped.finish_reason == ("stop" if expected else "length")


def test_a_length_that_the_pool_bounds_ends_with_length():
    engine = engine_of(num_pages=(4,), page_size=4, max_model_len=64)
    sequence = engine.add([1] * 5, max_tokens=None, ignore_eos=True)[0]
    engine.drain()
    assert len(sequence.token_ids) == 3 * 4 + 1
    assert sequence.finish_reason == "length"


def test_what_could_never_run_is_refused_and_harms_nobody():
    engine = engine_of(num_pages=(6,), page_size=4, max_model_len=30)
    other = engine.add([1, 2, 3])[0]
    with pytest.raises(ValueError, match=r"30 tokens, but max_model_len=30 leaves room for 29"):
        engine.add([1] * 30)
    with pytest.raises(ValueError, match=r"21 tokens, but the KV cache holds at most 20"):
        engine.add([1] * 21)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.add([])
    engine.num_requests = 0
    with pytest.raises(ValueError, match="request_id='r0' is already running"):
        engine.add([1])
    assert engine.scheduler.num_waiting == 1
    engine.drain()
    assert other.finish_reason is not None
    assert expected_tokens(other, 3 + 16)[0] == other.token_ids


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="max_num_batched_tokens=4 cannot hold one token of each of max_num_seqs=5"):
        SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=4, max_model_len=8)
    with pytest.raises(ValueError, match="max_chunk_tokens=0 is out of range"):
        SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=4, max_model_len=8, max_chunk_tokens=0)
    manager = KVCacheManager([KVGroup(1, 8, 10, (0,))], [20], 4, [5], 2)
    with pytest.raises(ValueError, match=r"one sequence 9 tokens, but the rings .* have room for 8"):
        Scheduler(SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=9, max_model_len=100), manager)


def test_first_scheduled_time_is_the_clock_of_the_first_step_it_ran_in():
    engine = engine_of(max_num_seqs=1)
    first, second = engine.add([1], max_tokens=3, ignore_eos=True)[0], engine.add([2], max_tokens=1)[0]
    engine.drain()
    assert first.first_scheduled_time == 0.0
    assert second.first_scheduled_time == 4.0  # r0: rows in steps 0-2, its end known in step 3


def test_pages_waste_little_on_a_mixed_trace():
    engine = engine_of(page_size=16, num_pages=(600,), max_num_seqs=16, max_num_batched_tokens=128, max_model_len=1024)
    for index in range(24):
        engine.add([index % 8] * (40 + 97 * index % 700), max_tokens=30 + 53 * index % 90, ignore_eos=True)
    held = wasted = 0.0
    while engine.scheduler.has_unfinished():
        engine.step()
        num_held = engine.manager.usage().num_held
        held += num_held
        wasted += engine.manager.waste() * num_held
    assert wasted / held < 0.04


def test_a_preempted_decode_gives_its_token_back_to_the_budget():
    engine = engine_of(max_num_batched_tokens=10, max_num_seqs=2)
    for token in (1, 2):
        engine.add([token], priority=1, ignore_eos=True)
    engine.step()
    engine.add([3] * 20, priority=0)
    assert shape(engine.step()) == [("r0", 1, 1), ("r2", 0, 9)]
    engine.drain()


def test_a_sample_that_would_have_no_page_to_grow_into_waits():
    engine = engine_of(num_pages=(4,), page_size=4)
    engine.add([1] * 10, n=2, max_tokens=3, ignore_eos=True)
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_a_head_without_room_is_looked_at_again_only_when_pages_were_freed(monkeypatch: pytest.MonkeyPatch):
    engine = engine_of(num_pages=(7,), page_size=4)
    engine.add([1] * 9, max_tokens=10, ignore_eos=True)
    engine.add([2] * 20, max_tokens=1)
    tries = []
    match = engine.manager.match_prefix
    monkeypatch.setattr(engine.manager, "match_prefix", lambda *args: tries.append(1) or match(*args))
    engine.drain()
    assert len(tries) == 3  # each request's first step, and when the first one had ended
