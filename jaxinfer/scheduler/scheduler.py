"""Which tokens of which sequences run in the next step. Imports no jax.

Decodes and prefill chunks share a step under a token budget, decodes first (SARATHI, arXiv:2308.16369). Sequences go
by priority, then arrival. When pages run out the last running sequence in that order gives up its pages and is
recomputed later (PagedAttention, arXiv:2309.06180).

Steps are scheduled before the tokens of earlier steps are read. So a sequence's last token may still be on the device,
in an array indexed by slot: the next row says so (`input_slot`). What ends a sequence is seen at `commit`; rows already
scheduled for it are ignored there. This is safe because the device runs steps in schedule order: a slot or page given
away while a step that uses it is in flight is written by its new owner only after that step, and a slot's last token
is read only by a sequence that has sampled into that slot itself.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from jaxinfer.cache.manager import KVCacheManager, PageCopy
from jaxinfer.cache.prefix import extend_page_hashes
from jaxinfer.scheduler.queue import WaitingQueue
from jaxinfer.scheduler.schedule import Schedule, ScheduledRow, SchedulerConfig, SchedulerStats, SequenceUpdate
from jaxinfer.scheduler.sequence import Sequence, Status
from jaxinfer.types import FinishReason


@dataclass(slots=True)
class _Step:
    """The step being put together.

    budget     tokens left, of which `reserved` are for running sequences with one token to compute, not yet reached
    index      running sequences before it have had their turn and keep their pages: only later ones are preempted
    closed     no waiting sequence is admitted any more: pages or slots have run out
    promised   per group, pages that partly computed prompts of this step will still need
    forks      forked samples, each with its sample 0
    """

    now: float
    budget: int
    reserved: int
    promised: list[int]
    index: int = 0
    closed: bool = False
    num_decode_tokens: int = 0
    singles: list[ScheduledRow] = field(default_factory=list)
    chunks: list[ScheduledRow] = field(default_factory=list)
    forks: list[tuple[Sequence, Sequence]] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Call order of an engine: schedule() k + 1, run it, commit() k. Every schedule is run, and committed in order."""

    def __init__(self, config: SchedulerConfig, manager: KVCacheManager) -> None:
        largest = manager.max_chunk_tokens(config.max_model_len)
        if min(config.chunk_tokens, config.max_model_len) > largest:
            raise ValueError(
                f"a step may give one sequence {config.chunk_tokens} tokens, but the rings of the sliding-window "
                f"layers have room for {largest}; make their page tables wider or max_chunk_tokens smaller"
            )
        self.config = config
        self.manager = manager
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._capacity = manager.max_sequence_tokens()
        self._running: list[Sequence] = []  # sorted by order
        self._waiting = WaitingQueue()
        self._live: dict[str, list[Sequence]] = {}
        self._num_live = 0
        self.num_live_tokens = 0  # of all sequences that have not ended, when they are as long as they may become
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[Schedule] = deque()
        self._num_added = 0
        self._blocked: tuple[Sequence, int] | None = None  # (waiting head, pages freed) when it last found no room

    # Requests in and out

    def add(self, *samples: Sequence) -> None:
        """Queue all samples of one request, sample 0 first. ValueError, before any is queued, for what cannot run."""
        first = samples[0]
        request_id, num_prompt = first.request_id, first.num_prompt_tokens
        max_model_len = self.config.max_model_len
        if request_id in self._live:
            raise ValueError(f"request_id={request_id!r} is already running; use a new one")
        if num_prompt == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if num_prompt >= max_model_len:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, but max_model_len={max_model_len} leaves room for "
                f"{max_model_len - 1} and one output; shorten it or raise max_model_len"
            )
        if num_prompt > self._capacity:
            raise ValueError(
                f"the prompt has {num_prompt} tokens, but the KV cache holds at most {self._capacity} of one sequence; "
                f"shorten it or raise num_pages"
            )
        for sequence in samples:
            assert sequence.request_id == request_id
            assert sequence.num_prompt_tokens == num_prompt
            sequence.order = (sequence.priority, sequence.arrival_time, self._num_added)
            self._num_added += 1
            max_tokens = sequence.params.max_tokens or max_model_len
            # The last output's own keys and values are never needed: one token more than the cache holds.
            sequence.max_total_tokens = min(num_prompt + max_tokens, max_model_len, self._capacity + 1)
            self.num_live_tokens += sequence.max_total_tokens
        self._live[request_id] = list(samples)
        self._num_live += len(samples)
        first.followers = list(samples[1:])
        self._waiting.push(first)

    def abort(self, request_id: str) -> list[Sequence]:
        """End all samples of a request that have not finished, at any moment. Returns them; unknown ids are nothing."""
        samples = list(self._live.get(request_id, ()))
        for sequence in samples:
            sequence.followers = []
        for sequence in samples:
            self._end(sequence, "abort", None)
        return samples

    def finish(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End one sequence for a reason that the scheduler cannot see, such as a stop string."""
        assert sequence.status is not Status.FINISHED
        self._end(sequence, reason, stop_reason)

    def _end(self, sequence: Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._give_up_pages(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        samples = self._live[sequence.request_id]
        samples.remove(sequence)
        self._num_live -= 1
        self.num_live_tokens -= sequence.max_total_tokens
        if not samples:
            del self._live[sequence.request_id]
        for leader in samples:
            if sequence in leader.followers:
                leader.followers.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        for follower in sequence.followers:
            self._waiting.push(follower)
        sequence.followers = []

    def _give_up_pages(self, sequence: Sequence) -> None:
        assert sequence.pages is not None
        self.manager.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = None, -1

    def reset_cache(self) -> None:
        """Forget all keys and values and every step in flight, because weights changed or a step failed.

        Running sequences wait again and are recomputed from the tokens the host knows.
        """
        self._in_flight.clear()
        for sequence in self._running:
            self._requeue(sequence)
        self._running.clear()
        for samples in self._live.values():
            for sequence in samples:
                sequence.num_in_flight, sequence.num_total_tokens = 0, len(sequence.token_ids)
        self.manager.forget_prefixes()

    # Numbers

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold nothing: queued, preempted, or waiting for sample 0 to compute the prompt."""
        return self._num_live - len(self._running)

    @property
    def num_live_requests(self) -> int:
        return len(self._live)

    @property
    def num_free_slots(self) -> int:
        """Slots that no sequence has or waits for; less than 0 where more wait."""
        return self.config.max_num_seqs - self._num_live

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def has_unfinished(self) -> bool:
        return bool(self._live)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_preemptions=self.num_preemptions,
            prefix_query_tokens=self.prefix_query_tokens,
            prefix_hit_tokens=self.prefix_hit_tokens,
            kv=self.manager.usage(),
        )

    # One step

    def schedule(self, now: float = 0.0) -> Schedule | None:
        """The next step, or None when there is nothing to run before a commit (or at all). `now` in seconds."""
        step = _Step(
            now=now,
            budget=self.config.max_num_batched_tokens,
            reserved=sum(_has_one_token_to_run(sequence) for sequence in self._running),
            promised=[0] * len(self.manager.pools),
        )
        head = self._waiting.head()
        running = self._running
        while True:
            sequence = running[step.index] if step.index < len(running) else None
            if head is not None and (sequence is None or head.order < sequence.order):
                if not self._admit(step, head):
                    step.closed = True
                head = self._waiting.head()
            elif sequence is not None:
                step.index += 1
                if sequence.num_total_tokens < sequence.max_total_tokens:
                    self._continue(step, sequence)
            else:
                break
            if step.closed:
                head = None
        if not step.singles and not step.chunks:
            assert self._in_flight or not self._live, "nothing runs, nothing is in flight, and sequences are left"
            return None
        schedule = _finish_step(step)
        self._in_flight.append(schedule)
        return schedule

    def _continue(self, step: _Step, sequence: Sequence) -> None:
        """Give a running sequence its part of the step; one that finds no pages sits this step out."""
        pages, start = sequence.pages, sequence.num_computed_tokens
        assert pages is not None
        num_tokens = sequence.num_total_tokens - start
        if num_tokens == 1:
            step.reserved -= 1
        else:
            num_tokens = min(num_tokens, step.budget - step.reserved, self.config.chunk_tokens)
            if num_tokens <= 0:
                return
        allocate = self.manager.allocate
        copies = allocate(pages, start, start + num_tokens)
        while copies is None and len(self._running) > step.index:
            self._preempt_last(step)
            copies = allocate(pages, start, start + num_tokens)
        if copies is None:
            step.closed = True
            num_tokens = self.manager.largest_end(pages, start, start + num_tokens) - start
            if num_tokens == 0:
                return
            copies = allocate(pages, start, start + num_tokens)
            assert copies is not None
        self._place(step, sequence, num_tokens, copies, is_new=False)

    def _admit(self, step: _Step, head: Sequence) -> bool:
        """Start or resume the first waiting sequence if it fits; only less urgent priorities make room for it."""
        manager = self.manager
        budget = step.budget - step.reserved
        if head.num_in_flight or budget <= 0:
            return False
        victims = self._running and self._running[-1].priority > head.priority
        if not victims and (not self._free_slots or self._blocked == (head, manager.num_freed)):
            return False
        num_known = len(head.token_ids)
        num_cached = 0
        if manager.enable_prefix_caching:
            extend_page_hashes(head.page_hashes, head.token_ids, manager.page_size, head.cache_salt)
            if not head.compute_all_prompt or head.num_output_tokens:
                num_cached = manager.match_prefix(head.page_hashes, num_known)
        pages = None
        while pages is None:
            if self._free_slots:
                # Every running sequence keeps a page to grow into; one that is alone always fits.
                reserve = [len(self._running) + pages_left for pages_left in step.promised]
                pages = manager.open(self._free_slots[-1], head.page_hashes, num_cached, num_known, reserve)
            if pages is None:
                if not self._running or self._running[-1].priority <= head.priority:
                    self._blocked = (head, manager.num_freed) if self._free_slots else None
                    return False
                self._preempt_last(step)
        num_tokens = min(num_known - num_cached, step.budget - step.reserved, self.config.chunk_tokens)
        num_tokens = manager.largest_end(pages, num_cached, num_cached + num_tokens) - num_cached
        copies = manager.allocate(pages, num_cached, num_cached + num_tokens)
        assert num_tokens > 0
        assert copies is not None

        self._waiting.remove(head)
        self._start_running(step, head)
        head.pages = pages
        head.num_computed_tokens = num_cached
        if head.first_scheduled_time is None:
            head.first_scheduled_time = step.now
            head.num_cached_tokens = num_cached
            self.prefix_query_tokens += num_known
            self.prefix_hit_tokens += num_cached
        self._place(step, head, num_tokens, copies, is_new=True)
        return True

    def _start_running(self, step: _Step, sequence: Sequence) -> None:
        sequence.slot = self._free_slots.pop()
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=lambda s: s.order)
        step.index += 1
        assert self._running[step.index - 1] is sequence, "its turn was over before it started"

    def _place(
        self, step: _Step, sequence: Sequence, num_tokens: int, copies: SequenceOf[PageCopy], is_new: bool
    ) -> None:
        """Put a row into the step, as if it had run, and fork the followers of a prompt that it completes."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        samples = end == sequence.num_total_tokens
        in_flight = sequence.num_in_flight
        rows = step.singles if num_tokens == 1 else step.chunks
        input_slot = sequence.slot if in_flight else -1
        rows.append(ScheduledRow(sequence, sequence.slot, start, num_tokens, samples, input_slot, len(rows), is_new))
        step.budget -= num_tokens
        if copies:
            step.copies.extend(copies)
        sequence.num_computed_tokens = end
        if samples:
            sequence.num_in_flight = in_flight + 1
            sequence.num_total_tokens += 1
        if samples and num_tokens == 1 and start >= sequence.num_prompt_tokens:
            step.num_decode_tokens += 1  # the commit registers its page
            return
        assert not in_flight
        self._register(sequence)
        if not samples:
            assert sequence.pages is not None
            left = self.manager.growth(sequence.pages, len(sequence.token_ids))
            step.promised = [a + b for a, b in zip(step.promised, left, strict=True)]
        elif sequence.followers:
            self._fork_followers(step, sequence)

    def _fork_followers(self, step: _Step, parent: Sequence) -> None:
        """Start the other samples on sample 0's pages; those without a slot or a page to grow into wait in line."""
        assert parent.pages is not None
        for follower in parent.followers:
            if not self._free_slots or self.manager.num_available() <= len(self._running):
                self._waiting.push(follower)
                step.closed = True
                continue
            self._start_running(step, follower)
            follower.pages = self.manager.fork(parent.pages, follower.slot)
            follower.page_hashes = list(parent.page_hashes)
            follower.num_computed_tokens = follower.num_cached_tokens = parent.num_computed_tokens
            follower.num_in_flight, follower.num_total_tokens = 1, parent.num_total_tokens
            follower.first_scheduled_time = step.now
            step.forks.append((follower, parent))
        parent.followers = []

    def _preempt_last(self, step: _Step) -> None:
        victim = self._running[-1]
        assert len(self._running) > step.index
        step.reserved -= _has_one_token_to_run(victim)
        self._running.pop()
        self._requeue(victim)
        victim.num_preemptions += 1
        self.num_preemptions += 1
        step.preempted.append(victim)
        step.closed = True

    def _requeue(self, sequence: Sequence) -> None:
        self._give_up_pages(sequence)
        sequence.status = Status.WAITING
        sequence.num_computed_tokens = 0
        self._waiting.push(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Offer the pages that scheduled, known tokens fill to the prefix index.

        A later row of the same step may share them: in each layer a step writes all keys and values before it reads.
        """
        pages, manager = sequence.pages, self.manager
        num_tokens = min(sequence.num_computed_tokens, len(sequence.token_ids))
        if pages is not None and manager.enable_prefix_caching:
            extend_page_hashes(sequence.page_hashes, sequence.token_ids, manager.page_size, sequence.cache_salt)
            manager.register(pages, sequence.page_hashes, num_tokens)

    def commit(self, schedule: Schedule, token_ids: np.ndarray | SequenceOf[int]) -> list[SequenceUpdate]:
        """Learn the tokens that the oldest step in flight sampled, one for each of its `sampling_rows`.

        Sequences that end are finished here. Rows of sequences that had ended before are left out of the answer.
        """
        oldest = self._in_flight.popleft()
        assert oldest is schedule, "steps are committed in the order in which they were scheduled"
        updates = []
        page_size = self.manager.page_size
        tokens = np.asarray(token_ids).tolist()
        for index, row in enumerate(schedule.sampling_rows):
            sequence, token_id = row.sequence, tokens[index]
            if sequence.status is Status.FINISHED:
                continue
            sequence.num_in_flight -= 1
            known = sequence.token_ids
            known.append(token_id)
            # A page is full now, or was full when the token that has just become known was scheduled to be written.
            if len(known) % page_size <= 1:
                self._register(sequence)
            if token_id in sequence.stop_ids or len(known) >= sequence.max_total_tokens:
                ended = sequence.end_reason()
                if ended is not None:
                    self._end(sequence, *ended)
            updates.append(SequenceUpdate(sequence, index, token_id, sequence.finish_reason))
        return updates

    def check_integrity(self) -> None:
        """AssertionError unless slots, queues, sequences and the manager's books agree."""
        live = [sequence for samples in self._live.values() for sequence in samples]
        running = [sequence for sequence in live if sequence.status is Status.RUNNING]
        assert self._num_live == len(live)
        assert self.num_live_tokens == sum(sequence.max_total_tokens for sequence in live)
        assert sorted(self._running, key=lambda s: s.order) == self._running
        assert set(running) == set(self._running)
        assert sorted([s.slot for s in running] + self._free_slots) == list(range(self.config.max_num_seqs))
        held_back = [follower for sequence in live for follower in sequence.followers]
        assert len(running) + len(self._waiting) + len(held_back) == len(live)
        for sequence in live:
            assert (sequence.pages is not None) == (sequence.slot >= 0) == (sequence.status is Status.RUNNING)
            assert sequence.num_total_tokens == len(sequence.token_ids) + sequence.num_in_flight
            assert sequence.num_total_tokens <= sequence.max_total_tokens
            assert 0 <= sequence.num_in_flight <= len(self._in_flight)
            if sequence.pages is not None:
                assert sequence.pages.slot == sequence.slot
                assert sequence.pages.num_tokens == sequence.num_computed_tokens
                assert sequence.num_computed_tokens < sequence.num_total_tokens
        self.manager.check_integrity([s.pages for s in running if s.pages is not None])


def _has_one_token_to_run(sequence: Sequence) -> bool:
    return sequence.num_computed_tokens + 1 == sequence.num_total_tokens < sequence.max_total_tokens


def _finish_step(step: _Step) -> Schedule:
    """Rows in their final order, with the indices that depend on it."""
    num_singles = len(step.singles)
    chunks = [row._replace(hidden_row=num_singles + row.hidden_row) for row in step.chunks]
    rows = step.singles + chunks
    if step.forks:
        hidden_rows = {row.sequence: row.hidden_row for row in rows}
        for child, parent in step.forks:
            start = child.num_computed_tokens
            rows.append(ScheduledRow(child, child.slot, start, 0, True, -1, hidden_rows[parent], True))
    num_tokens = sum(row.num_tokens for row in rows)
    return Schedule(
        rows=tuple(rows),
        sampling_rows=tuple(row for row in rows if row.samples),
        copies=tuple(step.copies),
        num_decode_tokens=step.num_decode_tokens,
        num_prefill_tokens=num_tokens - step.num_decode_tokens,
        num_single_rows=num_singles,
        preempted=tuple(step.preempted),
    )
