"""Runs schedules: packs them, sends them to the device, and hands back what to read later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxinfer.cache.pool import empty_pools
from jaxinfer.distributed.lead import Lead
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.model import Model, Params
from jaxinfer.outputs import ScoredTokens
from jaxinfer.plan import Plan
from jaxinfer.runner.batch import BatchLayout
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.segments import segments
from jaxinfer.runner.step_plan import ScoredPart, StepPlan, StepPlanner
from jaxinfer.runner.step_programs import StepPrograms
from jaxinfer.sampling.logprobs import TokenLogprobs
from jaxinfer.sampling.sampler import SampleOutput
from jaxinfer.scheduler.schedule import Schedule
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.sharding.spmd import PER_SHARD, spans_processes


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


@contextmanager
def _alone(what: str, content: Callable[[], Any] | None = None) -> Iterator[None]:
    """There are no other processes to tell."""
    yield


@dataclass(frozen=True)
class SentStep:
    """What the devices will have of a step. sampled: None where no row samples. scores: in the step plan's order."""

    hidden: jax.Array
    sampled: SampleOutput | None
    scores: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class PendingStep:
    """A step on its way through the devices, with a schedule for every shard."""

    schedules: tuple[Schedule, ...]
    scored: tuple[ScoredPart, ...]
    sent: SentStep

    def read(self) -> list[StepResult]:
        """Wait for the step and fetch what was asked for, shard by shard."""
        if self.sent.sampled is None:
            self.sent.hidden.block_until_ready()
            token_ids = invalid = np.zeros((len(self.schedules), 0), np.int32)
        else:
            token_ids, invalid = np.asarray(self.sent.sampled.token_ids), np.asarray(self.sent.sampled.invalid)
        return [
            self._result(shard, schedule, token_ids[shard], invalid[shard])
            for shard, schedule in enumerate(self.schedules)
        ]

    def _result(self, shard: int, schedule: Schedule, token_ids: np.ndarray, invalid: np.ndarray) -> StepResult:
        rows, sampled = schedule.sampling_rows, self.sent.sampled
        logprobs = None
        if sampled is not None and any(row.sequence.params.logprobs is not None for row in rows):
            logprobs = _fetch(sampled.logprobs, shard, len(rows))
        return StepResult(
            token_ids=token_ids[: len(rows)],
            logprobs=logprobs,
            invalid=tuple(row.sequence for row, bad in zip(rows, invalid[: len(rows)], strict=True) if bad),
            prompt_logprobs=tuple(
                (part.sequence, part.first, part.token_ids, _fetch(scores, shard, len(part.token_ids)))
                for part, scores in zip(self.scored, self.sent.scores, strict=True)
                if part.shard == shard
            ),
        )


def _fetch(scores: TokenLogprobs, shard: int, count: int) -> ScoredTokens:
    parts = scores.logprob, scores.rank, scores.top_token_ids, scores.top_logprobs
    return ScoredTokens(*(np.asarray(part)[shard, :count] for part in parts))


class Runner:
    """The devices' side of an engine: parameters, page pools, sampler state and the compiled programs."""

    def __init__(
        self,
        model: Model,
        params: Params,
        plan: Plan,
        metrics: EngineMetrics,
        kept_in: Path | None = None,
        lead: Lead | None = None,
    ) -> None:
        """kept_in: where compiled programs are kept. lead: tells other processes, whose runners do the same."""
        self.model = model
        self.plan = plan
        self._all_do = _alone if lead is None else lead.all_do
        self._segments = segments(plan)
        self.set_params(params)
        store = None if kept_in is None else self._store(kept_in)
        self._programs = StepPrograms(model, plan, self._ends, self._segment_params, Programs(metrics, store))
        self._planner = StepPlanner(plan)
        self._per_shard = NamedSharding(plan.mesh, PER_SHARD)
        self._spans_processes = spans_processes(plan.mesh)
        self._start_afresh()

    def execute(self, schedules: Several[Schedule], tables: Several[Several[np.ndarray]]) -> PendingStep:
        """Send one step: a schedule and page tables for every shard.

        `tables` are copied before this returns; nothing waits for the device.
        """
        step, scored = self._planner.plan(schedules, tables)
        return PendingStep(tuple(schedules), scored, self.send(step))

    def send(self, step: StepPlan) -> SentStep:
        """Send a planned step; nothing waits for the device."""
        with self._all_do("step", step.content):
            return self._send(step)

    def _send(self, step: StepPlan) -> SentStep:
        for new in step.admissions:
            counts, bias = (np.broadcast_to(own, (len(new.slots), *own.shape)) for own in (new.counts, new.bias))
            self._state = self._programs.admission()(self._state, *map(self._placed, (new.slots, counts, bias)))
        for sources, targets in step.copies:
            self._pools = self._programs.copier()(self._pools, self._placed(sources), self._placed(targets))
        hidden, sampled_from = self._run_model(self._programs.layout(step.num_tokens), step.batch)
        sampled = None
        if step.samples is not None:
            sampler = self._programs.sampler(step.samples.shape[1])
            sampled, self._state = sampler(self._ends, self._state, sampled_from, self._placed(step.samples))
        scores = tuple(
            self._programs.scorer(step.num_tokens)(self._ends, hidden, *map(self._placed, pair)) for pair in step.scores
        )
        return SentStep(hidden, sampled, scores)

    def set_params(self, params: Params) -> None:
        """Use these parameters from the next step on; shaped as the model's, on their devices."""
        layers = params["layers"]
        self._ends = {name: value for name, value in params.items() if name != "layers"}
        self._segment_params = tuple(
            tuple(layers[str(index)] for index in segment.layers) for segment in self._segments
        )

    def warm_up(self) -> None:
        """Compile every program."""
        with self._all_do("warm-up"):
            self._programs.make_all()

    def reset(self) -> None:
        """Fresh pools and sampler state, after a failed step may have left them unusable."""
        with self._all_do("reset"):
            self._start_afresh()

    def _start_afresh(self) -> None:
        self._pools = empty_pools(self._programs.pools, lambda leaf: self._programs.zeros("pool", leaf)())
        self._state = self._programs.zeros("state", self._programs.state)()

    def _run_model(self, layout: BatchLayout, buffer: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Send all layers over packed batches, one a shard: hidden states [shards, T, D], and those of the rows to
        sample from [shards, S, D]."""
        words = self._placed(buffer) if self._spans_processes else jax.device_put(buffer, self._per_shard)
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

    def _placed(self, array: np.ndarray) -> Any:
        """A host array [shards, ...] as programs take it. Every process has the same one."""
        if not self._spans_processes:
            return array
        return jax.make_array_from_callback(array.shape, self._per_shard, lambda index: array[index])

    def _store(self, directory: Path) -> ProgramStore:
        params = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), (self._ends, self._segment_params))
        plan = replace(self.plan, seed=0, enable_prefix_caching=True)  # no program reads these
        made_from = plan, self.model.config, self.model.dtype, self.model.fused, params
        return ProgramStore(directory, plan.mesh, repr(made_from))
