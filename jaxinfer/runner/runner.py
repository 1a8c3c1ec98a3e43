"""Runs schedules: packs them, sends them to the device, and hands back what to read later."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxinfer.cache.manager import PageCopy
from jaxinfer.cache.pool import empty_pools
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.model import Model, Params
from jaxinfer.outputs import ScoredTokens
from jaxinfer.plan import Plan
from jaxinfer.runner.batch import BatchLayout, pack
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.segments import segments
from jaxinfer.runner.step_programs import SCORED_ROWS, StepPrograms
from jaxinfer.sampling.logprobs import TokenLogprobs
from jaxinfer.sampling.rows import SamplingTable
from jaxinfer.sampling.sampler import SampleOutput
from jaxinfer.sampling.state import dense_rows, uses_dense_state
from jaxinfer.scheduler.schedule import Schedule, ScheduledRow
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.sharding.spmd import PER_SHARD


@dataclass(frozen=True)
class StepResult:
    """What a step computed for one shard, on the host. Rows are those of its schedule's `sampling_rows`.

    token_ids int32 [R]. logprobs: None unless a row asked. invalid: sequences whose logits were not finite.
    prompt_logprobs: for each sequence that asked, the first prompt position scored by this step, the tokens from there
    on, and their scores.
    """

    token_ids: np.ndarray
    logprobs: ScoredTokens | None
    invalid: tuple[Sequence, ...]
    prompt_logprobs: tuple[tuple[Sequence, int, list[int], ScoredTokens], ...]


@dataclass(frozen=True)
class PendingStep:
    """A step on its way through the devices, with a schedule for every shard.

    sampled: None where no row samples. scored: of prompts, the shard, sequence, first position, tokens and scores.
    """

    schedules: tuple[Schedule, ...]
    hidden: jax.Array
    sampled: SampleOutput | None
    scored: tuple[tuple[int, Sequence, int, list[int], TokenLogprobs], ...]

    def read(self) -> list[StepResult]:
        """Wait for the step and fetch what was asked for, shard by shard."""
        if self.sampled is None:
            self.hidden.block_until_ready()
            token_ids = invalid = np.zeros((len(self.schedules), 0), np.int32)
        else:
            token_ids, invalid = np.asarray(self.sampled.token_ids), np.asarray(self.sampled.invalid)
        return [
            self._result(shard, schedule, token_ids[shard], invalid[shard])
            for shard, schedule in enumerate(self.schedules)
        ]

    def _result(self, shard: int, schedule: Schedule, token_ids: np.ndarray, invalid: np.ndarray) -> StepResult:
        rows = schedule.sampling_rows
        logprobs = None
        if self.sampled is not None and any(row.sequence.params.logprobs is not None for row in rows):
            logprobs = _fetch(self.sampled.logprobs, shard, len(rows))
        return StepResult(
            token_ids=token_ids[: len(rows)],
            logprobs=logprobs,
            invalid=tuple(row.sequence for row, bad in zip(rows, invalid[: len(rows)], strict=True) if bad),
            prompt_logprobs=tuple(
                (sequence, first, ids, _fetch(scores, shard, len(ids)))
                for owner, sequence, first, ids, scores in self.scored
                if owner == shard
            ),
        )


def _fetch(scores: TokenLogprobs, shard: int, count: int) -> ScoredTokens:
    parts = scores.logprob, scores.rank, scores.top_token_ids, scores.top_logprobs
    return ScoredTokens(*(np.asarray(part)[shard, :count] for part in parts))


class Runner:
    """The devices' side of an engine: parameters, page pools, sampler state and the compiled programs."""

    def __init__(
        self, model: Model, params: Params, plan: Plan, metrics: EngineMetrics, kept_in: Path | None = None
    ) -> None:
        self.model = model
        self.plan = plan
        self._segments = segments(plan)
        self.set_params(params)
        store = None if kept_in is None else self._store(kept_in)
        self._programs = StepPrograms(model, plan, self._ends, self._segment_params, Programs(metrics, store))
        self._tables = [SamplingTable(plan.max_num_seqs) for _ in range(plan.num_shards)]
        self._per_shard = NamedSharding(plan.mesh, PER_SHARD)
        self.reset()

    def execute(self, schedules: Several[Schedule], tables: Several[Several[np.ndarray]]) -> PendingStep:
        """Send one step: a schedule and page tables for every shard.

        `tables` are copied before this returns; nothing waits for the device.
        """
        layout, buffer = self._pack(schedules, tables)
        for shard, schedule in enumerate(schedules):
            for row in schedule.rows:
                if row.is_new:
                    self._admit(shard, row)
        if any(schedule.copies for schedule in schedules):
            self._copy_pages([schedule.copies for schedule in schedules])
        hidden, sampled_from = self._run_model(layout, buffer)
        sampled = None
        if any(schedule.sampling_rows for schedule in schedules):
            words = self._sampling_words(schedules)
            sampler = self._programs.sampler(words.shape[1])
            sampled, self._state = sampler(self._ends, self._state, sampled_from, words)
        return PendingStep(tuple(schedules), hidden, sampled, self._score_prompts(schedules, hidden))

    def set_params(self, params: Params) -> None:
        """Use these parameters from the next step on; shaped as the model's, on their devices."""
        layers = params["layers"]
        self._ends = {name: value for name, value in params.items() if name != "layers"}
        self._segment_params = tuple(
            tuple(layers[str(index)] for index in segment.layers) for segment in self._segments
        )

    def warm_up(self) -> None:
        """Compile every program."""
        self._programs.make_all()

    def reset(self) -> None:
        """Fresh pools and sampler state: at the start, and after a failed step may have left them unusable."""
        self._pools = empty_pools(self._programs.pools, lambda leaf: self._programs.zeros("pool", leaf)())
        self._state = self._programs.zeros("state", self._programs.state)()

    def _pack(
        self, schedules: Several[Schedule], tables: Several[Several[np.ndarray]]
    ) -> tuple[BatchLayout, np.ndarray]:
        """The schedules as one buffer [shards, size]."""
        size = bucket(max(schedule.num_tokens for schedule in schedules), self.plan.token_buckets)
        layout = self._programs.layout(size)
        return layout, np.stack([pack(schedule, own, layout) for schedule, own in zip(schedules, tables, strict=True)])

    def _run_model(self, layout: BatchLayout, buffer: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Send all layers over packed batches, one a shard: hidden states [shards, T, D], and those of the rows to
        sample from [shards, S, D]."""
        words = jax.device_put(buffer, self._per_shard)
        stream, prepared = self._programs.begin(layout)(self._ends, self._state.last_tokens, words)
        x, pools = stream.x, list(self._pools)
        for number, (segment, params) in enumerate(zip(self._segments, self._segment_params, strict=True)):
            x, updated = self._programs.layers(layout, number)(
                params,
                x,
                tuple(pools[pool] for pool in segment.pools),
                stream.rotations,
                tuple(stream.per_layer[index] for index in segment.layers) if stream.per_layer else (),
                tuple(prepared[kind] for kind in segment.kinds),
                words,
            )
            for pool, array in zip(segment.pools, updated, strict=True):
                pools[pool] = array
            self._pools = tuple(pools)
        return self._programs.end(layout)(self._ends, x, words)

    def _sampling_words(self, schedules: Several[Schedule]) -> np.ndarray:
        """What the sampler is told of each row [shards, rows, columns]."""
        size = bucket(max(len(schedule.sampling_rows) for schedule in schedules), self.plan.sequence_buckets)
        words = []
        for schedule, table in zip(schedules, self._tables, strict=True):
            rows = schedule.sampling_rows
            positions = [row.start + row.num_tokens - row.sequence.num_prompt_tokens for row in rows]
            words.append(table.rows([row.slot for row in rows], positions, size).words)
        return np.stack(words)

    def _admit(self, shard: int, row: ScheduledRow) -> None:
        """Give a slot to a sequence: its parameters, and its dense rows if it has any."""
        sequence = row.sequence
        self._tables[shard].set(row.slot, sequence.params, sequence.seed, sequence.sample_index)
        if uses_dense_state(sequence.params):
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            rows = dense_rows(
                sequence.params,
                sorted(sequence.stop_ids),
                prompt,
                sequence.output_token_ids,
                self.model.config.vocab_size,
            )
            slots = np.full(self.plan.num_shards, self.plan.max_num_seqs, np.int32)  # elsewhere the padding's
            slots[shard] = row.slot
            counts, bias = (np.broadcast_to(own, (len(slots), *own.shape)) for own in rows)
            self._state = self._programs.admission()(self._state, slots, counts, bias)

    def _copy_pages(self, copies: Several[Several[PageCopy]]) -> None:
        """Copies are sent in blocks of max_num_seqs a group; the rest of a block copies page 0 onto itself."""
        size, num_groups = self.plan.max_num_seqs, len(self.plan.groups)
        by_group: list[list[list[PageCopy]]] = [[[] for _ in range(num_groups)] for _ in copies]
        for shard, own in enumerate(copies):
            for copy in own:
                by_group[shard][copy.group].append(copy)
        most = max(len(own) for shard in by_group for own in shard)
        for start in range(0, most, size):
            pairs = np.zeros((2, len(copies), num_groups, size), np.int32)
            for shard, groups in enumerate(by_group):
                for group, own in enumerate(groups):
                    for place, copy in enumerate(own[start : start + size]):
                        pairs[:, shard, group, place] = copy.source, copy.target
            self._pools = self._programs.copier()(self._pools, pairs[0], pairs[1])

    def _score_prompts(
        self, schedules: Several[Schedule], hidden: jax.Array
    ) -> tuple[tuple[int, Sequence, int, list[int], TokenLogprobs], ...]:
        """Send the scoring of prompt tokens whose predecessors this step computed, for sequences that asked."""
        scored = []
        for shard, schedule in enumerate(schedules):
            first = 0
            for row in schedule.rows:
                sequence = row.sequence
                if sequence.compute_all_prompt and not sequence.num_output_tokens:
                    stop = min(row.start + row.num_tokens, sequence.num_prompt_tokens - 1)
                    for start in range(row.start, stop, SCORED_ROWS):
                        targets = sequence.token_ids[start + 1 : min(start + SCORED_ROWS, stop) + 1]
                        rows = np.zeros((2, len(schedules), SCORED_ROWS), np.int32)
                        rows[0, shard, : len(targets)] = first + start - row.start + np.arange(len(targets))
                        rows[1, shard, : len(targets)] = targets
                        scorer = self._programs.scorer(hidden.shape[1])
                        scores = scorer(self._ends, hidden, rows[0], rows[1])
                        scored.append((shard, sequence, start + 1, targets, scores))
                first += row.num_tokens
        return tuple(scored)

    def _store(self, directory: Path) -> ProgramStore:
        params = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), (self._ends, self._segment_params))
        plan = replace(self.plan, seed=0, enable_prefix_caching=True)  # no program reads these
        made_from = plan, self.model.config, self.model.dtype, self.model.fused, params
        return ProgramStore(directory, plan.mesh, repr(made_from))


def bucket(size: int, sizes: Several[int]) -> int:
    """The smallest of the sorted `sizes` that holds `size`."""
    return sizes[bisect_left(sizes, size)]
