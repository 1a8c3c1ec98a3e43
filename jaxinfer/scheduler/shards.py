"""Several schedulers as one: data parallelism. Each shard of the mesh has pages, slots and a scheduler of its own.

A request stays on the shard it is placed on when it is added: one with a free slot, where there is one, and of those
the one with the least to do: the tokens of its sequences, when they are as long as they may become, less those of the
new prompt that its prefix cache has. Priorities hold within a shard. Imports no jax.
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
    """The methods of `Scheduler`; a step is a tuple of schedules, one a shard, NOTHING where a shard has none."""

    def __init__(self, schedulers: SequenceOf[Scheduler]) -> None:
        self._schedulers = tuple(schedulers)
        self._shard_of: dict[str, int] = {}

    def add(self, *samples: Sequence) -> None:
        shard = self._place(samples[0])
        self._schedulers[shard].add(*samples)
        self._shard_of[samples[0].request_id] = shard

    def _place(self, sequence: Sequence) -> int:
        """The shard with the least to do; of equals the first."""
        if len(self._schedulers) == 1:
            return 0
        if sequence.request_id in self._shard_of:  # whose scheduler will refuse it
            return self._shard_of[sequence.request_id]
        loads = []
        for scheduler in self._schedulers:
            manager, num_cached = scheduler.manager, 0
            if manager.enable_prefix_caching and not sequence.compute_all_prompt:
                extend_page_hashes(sequence.page_hashes, sequence.token_ids, manager.page_size, sequence.cache_salt)
                num_cached = manager.match_prefix(sequence.page_hashes, sequence.num_prompt_tokens)
            loads.append((scheduler.num_free_slots <= 0, scheduler.num_live_tokens - num_cached))
        return loads.index(min(loads))

    def abort(self, request_id: str) -> list[Sequence]:
        shard = self._shard_of.get(request_id)
        ended = [] if shard is None else self._schedulers[shard].abort(request_id)
        self._forget(request_id)
        return ended

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self._schedulers[self._shard_of[sequence.request_id]].finish(sequence, reason, stop_reason)
        self._forget(sequence.request_id)

    def _forget(self, request_id: str) -> None:
        shard = self._shard_of.get(request_id)
        if shard is not None and not self._schedulers[shard].is_live(request_id):
            del self._shard_of[request_id]

    def schedule(self, now: float = 0.0) -> tuple[Schedule, ...] | None:
        schedules = [scheduler.schedule(now) for scheduler in self._schedulers]
        if all(schedule is None for schedule in schedules):
            return None
        return tuple(schedule or NOTHING for schedule in schedules)

    def commit(self, shard: int, schedule: Schedule, token_ids: np.ndarray) -> list[SequenceUpdate]:
        if schedule is NOTHING:
            return []
        updates = self._schedulers[shard].commit(schedule, token_ids)
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

    def has_unfinished(self) -> bool:
        return any(scheduler.has_unfinished() for scheduler in self._schedulers)

    @property
    def tables(self) -> list[list[np.ndarray]]:
        """Page tables, by shard and group."""
        return [scheduler.manager.tables for scheduler in self._schedulers]

    def stats(self) -> SchedulerStats:
        """Sums over the shards."""
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
        """AssertionError unless every shard's books agree, and each request is where it is said to be."""
        for scheduler in self._schedulers:
            scheduler.check_integrity()
        for request_id, shard in self._shard_of.items():
            assert self._schedulers[shard].is_live(request_id)
        assert sum(scheduler.num_live_requests for scheduler in self._schedulers) == len(self._shard_of)
