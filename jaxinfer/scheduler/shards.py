"""Several schedulers as one. Each shard of the mesh (data parallelism) has pages, slots and a scheduler of its own, and
has them once for each lane (pipeline parallelism). Lanes are batches in flight: while one is in the last stage, another
is in the stage before. They take turns with steps, and share no sequences.

A request stays on the shard and lane it is placed on when it is added: one with a free slot, where there is one, and of
those the one with the least to do: the tokens of its sequences, when they are as long as they may become, less those of
the new prompt that its prefix cache has. Priorities hold within a shard and lane. Imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from jaxinfer.cache.manager import KVUsage
from jaxinfer.cache.prefix import extend_page_hashes
from jaxinfer.scheduler.schedule import Schedule, SchedulerStats, SequenceUpdate
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.types import FinishReason

NOTHING = Schedule(
    rows=(), sampling_rows=(), copies=(), num_decode_tokens=0, num_prefill_tokens=0, num_single_rows=0, preempted=()
)


class ShardedScheduler:
    """The methods of `Scheduler`; a step is a tuple of schedules, one a shard, NOTHING where a shard has none.

    schedulers: those of lane 0, shard by shard, then those of lane 1.
    """

    def __init__(self, schedulers: SequenceOf[Scheduler], num_lanes: int = 1) -> None:
        self._schedulers = tuple(schedulers)
        self._num_shards = len(self._schedulers) // num_lanes
        self._place_of: dict[str, int] = {}  # of a request, which of the schedulers has it

    def _of(self, lane: int) -> tuple[Scheduler, ...]:
        return self._schedulers[lane * self._num_shards : (lane + 1) * self._num_shards]

    def add(self, *samples: Sequence) -> None:
        place = self._place(samples[0])
        self._schedulers[place].add(*samples)
        self._place_of[samples[0].request_id] = place

    def _place(self, sequence: Sequence) -> int:
        """The scheduler with the least to do; of equals the first."""
        if len(self._schedulers) == 1:
            return 0
        if sequence.request_id in self._place_of:  # which will refuse it
            return self._place_of[sequence.request_id]
        loads = []
        for scheduler in self._schedulers:
            manager, num_cached = scheduler.manager, 0
            if manager.enable_prefix_caching and not sequence.compute_all_prompt:
                extend_page_hashes(sequence.page_hashes, sequence.token_ids, manager.page_size, sequence.cache_salt)
                num_cached = manager.match_prefix(sequence.page_hashes, sequence.num_prompt_tokens)
            loads.append((scheduler.num_free_slots <= 0, scheduler.num_live_tokens - num_cached))
        return loads.index(min(loads))

    def abort(self, request_id: str) -> list[Sequence]:
        place = self._place_of.get(request_id)
        ended = [] if place is None else self._schedulers[place].abort(request_id)
        self._forget(request_id)
        return ended

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self._schedulers[self._place_of[sequence.request_id]].finish(sequence, reason, stop_reason)
        self._forget(sequence.request_id)

    def _forget(self, request_id: str) -> None:
        place = self._place_of.get(request_id)
        if place is not None and not self._schedulers[place].is_live(request_id):
            del self._place_of[request_id]

    def schedule(self, now: float = 0.0, lane: int = 0) -> tuple[Schedule, ...] | None:
        schedules = [scheduler.schedule(now) for scheduler in self._of(lane)]
        if all(schedule is None for schedule in schedules):
            return None
        return tuple(schedule or NOTHING for schedule in schedules)

    def commit(self, shard: int, schedule: Schedule, token_ids: np.ndarray, lane: int = 0) -> list[SequenceUpdate]:
        if schedule is NOTHING:
            return []
        updates = self._of(lane)[shard].commit(schedule, token_ids)
        for update in updates:
            if update.finish_reason is not None:
                self._forget(update.sequence.request_id)
        return updates

    def reset_cache(self) -> None:
        for scheduler in self._schedulers:
            scheduler.reset_cache()

    @property
    def num_running(self) -> int:
        return sum(scheduler.num_running for scheduler in self._schedulers)

    @property
    def num_waiting(self) -> int:
        return sum(scheduler.num_waiting for scheduler in self._schedulers)

    def has_unfinished(self, lane: int | None = None) -> bool:
        schedulers = self._schedulers if lane is None else self._of(lane)
        return any(scheduler.has_unfinished() for scheduler in schedulers)

    def tables(self, lane: int = 0) -> list[list[np.ndarray]]:
        """Page tables, by shard and group."""
        return [scheduler.manager.tables for scheduler in self._of(lane)]

    def stats(self) -> SchedulerStats:
        """Sums over the shards and lanes."""
        stats = [scheduler.stats() for scheduler in self._schedulers]
        return SchedulerStats(
            num_running=sum(own.num_running for own in stats),
            num_waiting=sum(own.num_waiting for own in stats),
            num_preemptions=sum(own.num_preemptions for own in stats),
            prefix_query_tokens=sum(own.prefix_query_tokens for own in stats),
            prefix_hit_tokens=sum(own.prefix_hit_tokens for own in stats),
            kv=KVUsage(
                num_pages=sum(own.kv.num_pages for own in stats),
                num_held=sum(own.kv.num_held for own in stats),
                num_evictable=sum(own.kv.num_evictable for own in stats),
                peak_held=sum(own.kv.peak_held for own in stats),
            ),
        )

    def check_integrity(self) -> None:
        """AssertionError unless all books agree, and each request is where it is said to be."""
        for scheduler in self._schedulers:
            scheduler.check_integrity()
        for request_id, place in self._place_of.items():
            assert self._schedulers[place].is_live(request_id)
        assert sum(scheduler.num_live_requests for scheduler in self._schedulers) == len(self._place_of)
