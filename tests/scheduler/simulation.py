"""A device made of Python lists, and an engine loop around the scheduler: the slow twin that its tests hold it to.

A page holds, for each of its positions, the hash of all tokens up to there: as keys and values do, it depends on the
whole prefix. Every row checks, after the step's writes, that each position it can see holds the right hash. The token
it samples is a function of the last hash, so any wrong page, copy or order changes the output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from jaxinfer.cache.groups import KVGroup
from jaxinfer.cache.manager import KVCacheManager
from jaxinfer.scheduler.schedule import Schedule, SchedulerConfig
from jaxinfer.scheduler.scheduler import Scheduler
from jaxinfer.scheduler.sequence import Sequence, Status
from jaxinfer.types import SamplingParams

VOCAB = 8
EOS = 7


class Text:
    """Tokens, and after each of them the hash of all so far."""

    def __init__(self, tokens: list[int], salt: str) -> None:
        self.tokens: list[int] = []
        self.hashes: list[int] = []
        self._start = crc32(salt.encode())
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        self.hashes.append(hash((self.hashes[-1] if self.hashes else self._start, token)))
        self.tokens.append(token)

    def next_token(self, sample_index: int) -> int:
        return hash((self.hashes[-1], sample_index)) % 1009 % VOCAB


def expected_tokens(sequence: Sequence, max_total: int) -> tuple[list[int], str]:
    """What the sequence must become when nothing disturbs it, and why it ends."""
    text = Text(sequence.token_ids[: sequence.num_prompt_tokens], sequence.cache_salt)
    params = sequence.params
    stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(sequence.eos_token_ids))
    while True:
        text.append(text.next_token(sequence.sample_index))
        num_outputs = len(text.tokens) - sequence.num_prompt_tokens
        if text.tokens[-1] in stops and num_outputs >= params.min_tokens:
            return text.tokens, "stop"
        if len(text.tokens) == max_total:
            return text.tokens, "length"


class SimulatedDevice:
    """Runs schedules in order. `truth[sequence]` has its tokens, those that the host does not know yet included."""

    def __init__(self, manager: KVCacheManager, config: SchedulerConfig) -> None:
        self.manager, self.config = manager, config
        size = manager.page_size
        self.pages: list[list[list[int | None]]] = [[[None] * size for _ in pool.ref_counts] for pool in manager.pools]
        self.last_token: list[int | None] = [None] * config.max_num_seqs
        self.truth: dict[Sequence, Text] = {}
        self.computed: dict[Sequence, int] = {}  # positions written since the sequence got its slot
        self.num_computed = 0

    def run(self, schedule: Schedule) -> list[int]:
        self._check_shape(schedule)
        targets = [(copy.group, copy.target) for copy in schedule.copies]
        assert len(set(targets)) == len(targets)
        sources = [self.pages[copy.group][copy.source] for copy in schedule.copies]
        for (group, target), source in zip(targets, map(list, sources), strict=True):
            self.pages[group][target] = source
        for row in schedule.rows:
            self._write(row)
        for row in schedule.rows:
            self._attend(row)
        sampled = {}
        for row in schedule.sampling_rows:
            sequence, donor = row.sequence, schedule.rows[row.hidden_row]
            text = self.truth[sequence]
            assert len(text.tokens) == row.start + row.num_tokens, "a position is sampled twice or out of order"
            seen = self.truth[donor.sequence].hashes[donor.start + donor.num_tokens - 1]
            assert seen == text.hashes[-1], "forked from another prefix"
            sampled[row.slot] = text.next_token(sequence.sample_index)
        for row in schedule.sampling_rows:
            self.truth[row.sequence].append(sampled[row.slot])
            self.last_token[row.slot] = sampled[row.slot]
        return [sampled[row.slot] for row in schedule.sampling_rows]

    def _check_shape(self, schedule: Schedule) -> None:
        rows = schedule.rows
        counts = [row.num_tokens for row in rows]
        kinds = [0 if count == 1 else 1 if count else 2 for count in counts]
        assert kinds == sorted(kinds)
        assert kinds.count(0) == schedule.num_single_rows
        assert 0 < sum(counts) == schedule.num_tokens <= self.config.max_num_batched_tokens
        assert max(counts) <= self.config.chunk_tokens
        assert len({row.slot for row in rows}) == len(rows) <= self.config.max_num_seqs
        assert schedule.sampling_rows == tuple(row for row in rows if row.samples)
        decodes = [r for r in rows if r.samples and r.num_tokens == 1 and r.start >= r.sequence.num_prompt_tokens]
        assert len(decodes) == schedule.num_decode_tokens
        for index, row in enumerate(rows):
            assert row.hidden_row == index or row.num_tokens == 0
        assert not {row.sequence for row in rows} & set(schedule.preempted)

    def _write(self, row: Any) -> None:
        sequence, end = row.sequence, row.start + row.num_tokens
        text = self.truth.setdefault(sequence, Text(sequence.token_ids, sequence.cache_salt))
        tokens = text.tokens
        if row.is_new:
            if row.num_tokens:
                assert row.start % self.manager.page_size == 0
                assert row.start == 0 or not (sequence.compute_all_prompt and len(tokens) == sequence.num_prompt_tokens)
        else:
            assert row.start == self.computed[sequence], "a position is left out or computed twice"
        self.computed[sequence] = end
        self.num_computed += row.num_tokens
        if row.input_slot >= 0:
            assert row.input_slot == row.slot
            assert row.num_tokens == 1
            assert row.start >= len(sequence.token_ids), "the host knows this token"
            given = [self.last_token[row.input_slot]]
        else:
            given = sequence.token_ids[row.start : end]
        assert given == tokens[row.start : end], "wrong input tokens"
        assert row.samples == (end == len(tokens))
        for group, (table, width) in enumerate(zip(self.manager.tables, self.manager.table_widths, strict=True)):
            for position in range(row.start, end):
                page = int(table[row.slot, position // self.manager.page_size % width])
                assert page != 0
                self.pages[group][page][position % self.manager.page_size] = text.hashes[position]

    def _attend(self, row: Any) -> None:
        sequence, end, size = row.sequence, row.start + row.num_tokens, self.manager.page_size
        text = self.truth[sequence]
        for group, (table, window) in enumerate(zip(self.manager.tables, self.manager.windows, strict=True)):
            pages, columns = self.pages[group], table[row.slot].tolist()
            for position in range(0 if window is None else max(0, row.start - window + 1), end):
                value = pages[columns[position // size % len(columns)]][position % size]
                assert value == text.hashes[position], (
                    f"{sequence.request_id}/{sequence.sample_index}: position {position} is not there (group {group})"
                )


@dataclass
class Setup:
    """Sizes of one simulated engine. `depth`: steps scheduled before the oldest one's tokens are read."""

    windows: tuple[int | None, ...] = (None,)
    num_pages: tuple[int, ...] = (33,)
    page_size: int = 4
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 16
    max_model_len: int = 64
    max_chunk_tokens: int | None = None
    enable_prefix_caching: bool = True
    depth: int = 1


@dataclass
class SimulatedEngine:
    """schedule, run, and commit `depth` steps late; every token checked against the undisturbed run."""

    setup: Setup
    finished: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup = self.setup
        self.config = SchedulerConfig(
            setup.max_num_seqs, setup.max_num_batched_tokens, setup.max_model_len, setup.max_chunk_tokens
        )
        groups = [KVGroup(1, 8, window, (index,)) for index, window in enumerate(setup.windows)]
        widths = [g.table_width(setup.max_model_len, self.config.chunk_tokens, setup.page_size) for g in groups]
        self.manager = KVCacheManager(
            groups, setup.num_pages, setup.page_size, widths, setup.max_num_seqs, setup.enable_prefix_caching
        )
        self.scheduler = Scheduler(self.config, self.manager)
        self.device = SimulatedDevice(self.manager, self.config)
        self.in_flight: deque[tuple[Schedule, list[int]]] = deque()
        self.live: list[Sequence] = []
        self.num_steps = 0
        self.num_requests = 0

    def add(self, prompt: list[int], n: int = 1, **options: Any) -> list[Sequence]:
        fields = {
            name: options.pop(name) for name in ("priority", "cache_salt", "compute_all_prompt") if name in options
        }
        params = SamplingParams(n=n, **options)
        samples = [
            Sequence(
                request_id=f"r{self.num_requests}",
                token_ids=list(prompt),
                params=params,
                eos_token_ids=frozenset({EOS}),
                sample_index=index,
                arrival_time=float(self.num_requests),
                **fields,
            )
            for index in range(n)
        ]
        self.scheduler.add(*samples)
        self.num_requests += 1
        self.live += samples
        return samples

    def step(self) -> Schedule | None:
        schedule = self.scheduler.schedule(now=float(self.num_steps))
        self.num_steps += 1
        if schedule is not None:
            self.in_flight.append((schedule, self.device.run(schedule)))
        if self.in_flight and (schedule is None or len(self.in_flight) > self.setup.depth):
            self.commit()
        return schedule

    def commit(self) -> None:
        schedule, tokens = self.in_flight.popleft()
        for update in self.scheduler.commit(schedule, tokens):
            sequence = update.sequence
            assert update.token_id == sequence.token_ids[-1]
            assert sequence.token_ids == self.device.truth[sequence].tokens[: len(sequence.token_ids)]
            assert (update.finish_reason is not None) == (sequence.status is Status.FINISHED)
        self.collect()

    def collect(self) -> None:
        self.finished += [s for s in self.live if s.status is Status.FINISHED]
        self.live = [s for s in self.live if s.status is not Status.FINISHED]

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.abort(sequence.request_id)
        self.collect()

    def reset_cache(self) -> None:
        self.in_flight.clear()
        self.scheduler.reset_cache()
        for sequence in self.device.truth:
            self.device.truth[sequence] = Text(sequence.token_ids, sequence.cache_salt)

    def drain(self, max_steps: int = 3000) -> None:
        """Run to the end. Fails when the scheduler stops making progress."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished() and not self.in_flight:
                break
            self.step()
        else:
            raise AssertionError(f"{len(self.live)} sequences are still unfinished after {max_steps} steps")
        self.check()
        assert all(pool.num_held == 0 for pool in self.manager.pools)
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0

    def check(self) -> None:
        """The books hold, and every sequence has the tokens of its undisturbed run."""
        self.scheduler.check_integrity()
        for sequence in self.live + self.finished:
            longest = self.manager.max_sequence_tokens() + 1
            wanted = sequence.num_prompt_tokens + (sequence.params.max_tokens or self.config.max_model_len)
            tokens, reason = expected_tokens(sequence, min(wanted, self.config.max_model_len, longest))
            if sequence.finish_reason in ("stop", "length") and sequence.stop_reason != "text":
                assert sequence.token_ids == tokens
                assert sequence.finish_reason == reason
            else:
                assert sequence.token_ids == tokens[: len(sequence.token_ids)]
