"""What a step sends to the devices, worked out on the host: schedules in, arrays out, and no device is asked."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from jaxinfer.cache.manager import PageCopy
from jaxinfer.plan import Plan
from jaxinfer.runner.batch import BatchLayout, pack
from jaxinfer.sampling.rows import SamplingTable
from jaxinfer.sampling.state import dense_rows, uses_dense_state
from jaxinfer.scheduler.schedule import Schedule
from jaxinfer.scheduler.sequence import Sequence

# Prompt positions whose log-probabilities one program computes; their logits take this many rows of the vocabulary.
SCORED_ROWS = 32


@dataclass(frozen=True)
class Admission:
    """A sampler slot's dense rows: slots int32 [shards], the spare one where nothing is to be set; counts int32 [V] and
    bias float32 [V]."""

    slots: np.ndarray
    counts: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class StepPlan:
    """All that the devices are told of one step, in the order in which they are told. Arrays are int32, by shard.

    lane        whose page pools and sampler state the step is for (scheduler/shards.py)
    admissions  dense rows of the sampler's state, for sequences that are new in their slot
    copies      pairs of pages to copy, sources and targets [2, shards, groups, max_num_seqs]
    num_tokens  the token bucket
    batch       packed batches [shards, layout's size]
    samples     what the sampler is told of each row [shards, rows, columns]; None where no row samples
    scores      rows and targets of prompt tokens to score [2, shards, SCORED_ROWS]
    last_tokens the newest token of each slot [shards, slots], where the first stage does not find them on the devices
    """

    lane: int
    admissions: tuple[Admission, ...]
    copies: tuple[np.ndarray, ...]
    num_tokens: int
    batch: np.ndarray
    samples: np.ndarray | None
    scores: tuple[np.ndarray, ...]
    last_tokens: np.ndarray | None = None

    def content(self) -> dict[str, Any]:
        """As plain values and arrays, to be sent to another process."""
        admissions = [(new.slots, new.counts, new.bias) for new in self.admissions]
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"admissions": admissions}

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> StepPlan:
        admissions = tuple(Admission(*new) for new in content["admissions"])
        return cls(**{**content, "admissions": admissions})


@dataclass(frozen=True)
class ScoredPart:
    """What one of a StepPlan's `scores` is of: tokens of a shard's sequence, from prompt position `first` on."""

    shard: int
    sequence: Sequence
    first: int
    token_ids: list[int]


class StepPlanner:
    """Turns the schedules of a lane into step plans; knows each slot's sampling parameters."""

    def __init__(self, plan: Plan, lane: int) -> None:
        self._plan = plan
        self._lane = lane
        self._tables = [SamplingTable(plan.max_num_seqs) for _ in range(plan.num_shards)]

    def plan(
        self, schedules: Several[Schedule], tables: Several[Several[np.ndarray]]
    ) -> tuple[StepPlan, tuple[ScoredPart, ...]]:
        """A step of a schedule and page tables for every shard; `tables` are copied. Second, what is scored in it."""
        admissions = [
            admission
            for shard, schedule in enumerate(schedules)
            for row in schedule.rows
            if row.is_new and (admission := self._admission(shard, row.slot, row.sequence)) is not None
        ]
        num_tokens = bucket(max(schedule.num_tokens for schedule in schedules), self._plan.token_buckets)
        layout = BatchLayout(num_tokens, self._plan.max_num_seqs, self._plan.table_widths)
        batch = np.stack([pack(schedule, own, layout) for schedule, own in zip(schedules, tables, strict=True)])
        has_samples = any(schedule.sampling_rows for schedule in schedules)
        samples = self._samples(schedules) if has_samples else None
        scored = [part for shard, schedule in enumerate(schedules) for part in _scored(shard, schedule)]
        scores = tuple(self._scores(part, row) for part, row in scored)
        copies = self._copies(schedules)
        step = StepPlan(self._lane, tuple(admissions), copies, num_tokens, batch, samples, scores)
        return step, tuple(part for part, _ in scored)

    def _admission(self, shard: int, slot: int, sequence: Sequence) -> Admission | None:
        """Give a slot to a sequence: its parameters, and its dense rows if it has any."""
        self._tables[shard].set(slot, sequence.params, sequence.seed, sequence.sample_index)
        if not uses_dense_state(sequence.params):
            return None
        slots = np.full(self._plan.num_shards, self._plan.max_num_seqs, np.int32)
        slots[shard] = slot
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        stop_ids, vocab_size = sorted(sequence.stop_ids), self._plan.model.vocab_size
        return Admission(slots, *dense_rows(sequence.params, stop_ids, prompt, sequence.output_token_ids, vocab_size))

    def _copies(self, schedules: Several[Schedule]) -> tuple[np.ndarray, ...]:
        """Copies go in blocks of max_num_seqs a group; the rest of a block copies page 0 onto itself."""
        size, num_groups = self._plan.max_num_seqs, len(self._plan.groups)
        by_group: list[list[list[PageCopy]]] = [[[] for _ in range(num_groups)] for _ in schedules]
        for shard, schedule in enumerate(schedules):
            for copy in schedule.copies:
                by_group[shard][copy.group].append(copy)
        most = max(len(own) for shard in by_group for own in shard)
        blocks = []
        for start in range(0, most, size):
            pairs = np.zeros((2, len(schedules), num_groups, size), np.int32)
            for shard, groups in enumerate(by_group):
                for group, own in enumerate(groups):
                    for place, copy in enumerate(own[start : start + size]):
                        pairs[:, shard, group, place] = copy.source, copy.target
            blocks.append(pairs)
        return tuple(blocks)

    def _samples(self, schedules: Several[Schedule]) -> np.ndarray:
        size = bucket(max(len(schedule.sampling_rows) for schedule in schedules), self._plan.sequence_buckets)
        words = []
        for schedule, table in zip(schedules, self._tables, strict=True):
            rows = schedule.sampling_rows
            positions = [row.start + row.num_tokens - row.sequence.num_prompt_tokens for row in rows]
            words.append(table.rows([row.slot for row in rows], positions, size).words)
        return np.stack(words)

    def _scores(self, part: ScoredPart, first_row: int) -> np.ndarray:
        pairs, count = np.zeros((2, self._plan.num_shards, SCORED_ROWS), np.int32), len(part.token_ids)
        pairs[0, part.shard, :count] = first_row + np.arange(count)
        pairs[1, part.shard, :count] = part.token_ids
        return pairs


def _scored(shard: int, schedule: Schedule) -> list[tuple[ScoredPart, int]]:
    """Prompt tokens whose predecessors this step computes, of sequences that asked, and the batch row of the first
    predecessor."""
    found, first_row = [], 0
    for row in schedule.rows:
        sequence = row.sequence
        if sequence.compute_all_prompt and not sequence.num_output_tokens:
            stop = min(row.start + row.num_tokens, sequence.num_prompt_tokens - 1)
            for start in range(row.start, stop, SCORED_ROWS):
                token_ids = sequence.token_ids[start + 1 : min(start + SCORED_ROWS, stop) + 1]
                found.append((ScoredPart(shard, sequence, start + 1, token_ids), first_row + start - row.start))
        first_row += row.num_tokens
    return found


def bucket(size: int, sizes: Several[int]) -> int:
    """The smallest of the sorted `sizes` that holds `size`."""
    return sizes[bisect_left(sizes, size)]
