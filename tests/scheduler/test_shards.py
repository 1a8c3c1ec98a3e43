"""Where requests are placed, and that shards know nothing of each other."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.cache.groups import KVGroup
from jaxinfer.cache.manager import KVCacheManager
from jaxinfer.scheduler.schedule import Schedule, SchedulerConfig
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.scheduler.shards import NOTHING, ShardedScheduler
from jaxinfer.types import SamplingParams


def sharded(num_shards: int = 2, num_lanes: int = 1, **fields: bool) -> ShardedScheduler:
    group = KVGroup(num_kv_heads=1, head_dim=1, window=None, layers=(0,))

    def scheduler() -> Scheduler:
        manager = KVCacheManager([group], [40], 4, [16], 4, **fields)
        return Scheduler(SchedulerConfig(4, 16, 64), manager)

    return ShardedScheduler([scheduler() for _ in range(num_lanes * num_shards)], num_lanes)


def sequence(name: str, token_ids: list[int], max_tokens: int = 4) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return Sequence(
        request_id=name, token_ids=list(token_ids), params=params, eos_token_ids=frozenset(), sample_index=0, seed=0
    )


def shards_of(scheduler: ShardedScheduler, schedules: tuple[Schedule, ...] | None) -> dict[str, int]:
    assert schedules is not None
    return {row.sequence.request_id: shard for shard, own in enumerate(schedules) for row in own.rows}


def commit(scheduler: ShardedScheduler, schedules: tuple[Schedule, ...] | None) -> None:
    assert schedules is not None
    for shard, schedule in enumerate(schedules):
        scheduler.commit(shard, schedule, np.full(len(schedule.sampling_rows), 9))
    scheduler.check_integrity()


def drain(scheduler: ShardedScheduler) -> None:
    while scheduler.has_unfinished():
        commit(scheduler, scheduler.schedule())


def test_requests_go_where_least_is_left_to_do() -> None:
    scheduler = sharded()
    for name, length in (("long", 12), ("short", 3), ("next", 5), ("last", 2)):
        scheduler.add(sequence(name, list(range(length))))
    placed = shards_of(scheduler, scheduler.schedule())
    assert placed == {"long": 0, "short": 1, "next": 1, "last": 0}


def test_a_free_slot_comes_before_all_else() -> None:
    scheduler = sharded()
    scheduler.add(sequence("long", [1] * 8, max_tokens=50))
    for number in range(5):
        scheduler.add(sequence(f"short {number}", [number + 2] * 2, max_tokens=1))
    placed = shards_of(scheduler, scheduler.schedule())
    assert placed == {"long": 0, **{f"short {number}": 1 for number in range(4)}, "short 4": 0}


def test_a_prefix_that_is_cached_outweighs_as_many_tokens() -> None:
    scheduler = sharded()
    scheduler.add(sequence("busy", [7] * 4, max_tokens=40))  # shard 0
    prompt = list(range(12))
    scheduler.add(sequence("first", prompt))  # shard 1
    for _ in range(5):  # until only the first request is left
        commit(scheduler, scheduler.schedule())
    assert scheduler.num_running == 1
    scheduler.add(sequence("third", [5] * 10, max_tokens=40))
    scheduler.add(sequence("again", prompt))  # shard 1 has more to do, but less of this
    schedules = scheduler.schedule()
    assert shards_of(scheduler, schedules) == {"busy": 0, "third": 1, "again": 1}
    commit(scheduler, schedules)
    drain(scheduler)
    assert scheduler.stats().prefix_hit_tokens == 8


def test_a_shard_without_work_has_nothing_to_do_and_others_go_on() -> None:
    scheduler = sharded(num_shards=3)
    scheduler.add(sequence("one", [1, 2, 3]))
    schedules = scheduler.schedule()
    assert schedules is not None
    assert schedules[1] is NOTHING
    assert schedules[2] is NOTHING
    assert scheduler.commit(1, NOTHING, np.zeros(0, np.int32)) == []
    scheduler.commit(0, schedules[0], np.array([9]))
    drain(scheduler)
    assert scheduler.schedule() is None


def test_abort_and_finish_reach_the_right_shard() -> None:
    scheduler = sharded()
    first, second = sequence("a", [1] * 5), sequence("b", [2] * 4)
    scheduler.add(first)
    scheduler.add(second)
    with pytest.raises(ValueError, match="request_id='b' is already running"):
        scheduler.add(sequence("b", [3]))
    scheduler.schedule()
    assert scheduler.abort("b") == [second]
    assert scheduler.abort("b") == []
    scheduler.check_integrity()
    scheduler.finish(first, "stop", "text")
    scheduler.check_integrity()
    assert not scheduler.has_unfinished()
    stats = scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv.num_held, stats.kv.num_pages) == (0, 0, 0, 78)


def test_lanes_share_no_sequences_and_take_turns() -> None:
    scheduler = sharded(num_shards=2, num_lanes=2)
    for number in range(4):
        scheduler.add(sequence(f"{number}", [number] * 4))
    first, second = scheduler.schedule(lane=0), scheduler.schedule(lane=1)
    assert shards_of(scheduler, first) == {"0": 0, "1": 1}
    assert shards_of(scheduler, second) == {"2": 0, "3": 1}
    assert first is not None
    assert second is not None
    scheduler.abort("2")
    for lane, schedules in ((1, second), (0, first)):  # a lane's steps are committed in order, lanes in any
        for shard, schedule in enumerate(schedules):
            scheduler.commit(shard, schedule, np.full(len(schedule.sampling_rows), 9), lane)
        scheduler.check_integrity()
    assert [len(own.token_ids) for own in scheduler.abort("3")] == [5]
    assert scheduler.has_unfinished(0)
    assert not scheduler.has_unfinished(1)
    assert scheduler.stats().num_running == 2
