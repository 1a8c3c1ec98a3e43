"""Runs schedules: packs them, sends them to the device, and hands back what to read later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer.cache.pool import empty_pools
from jaxinfer.distributed.lead import Lead
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.model import Model, Params
from jaxinfer.models.stages import Stage
from jaxinfer.outputs import ScoredTokens
from jaxinfer.plan import Plan
from jaxinfer.runner.batch import BatchLayout
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.step_plan import ScoredPart, StepPlan, StepPlanner
from jaxinfer.runner.step_programs import StepPrograms
from jaxinfer.sampling.logprobs import TokenLogprobs
from jaxinfer.sampling.sampler import SampleOutput
from jaxinfer.sampling.state import SamplerState
from jaxinfer.scheduler.schedule import Schedule
from jaxinfer.scheduler.sequence import Sequence
from jaxinfer.sharding.spmd import spans_processes


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
    """A step of one lane on its way through the devices, with a schedule for every shard."""

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


@dataclass
class _Lane:
    """What the devices keep for one lane: page pools, each on its layers' stage, and the last stage's sampler state."""

    planner: StepPlanner
    pools: list[Any]
    state: SamplerState


class Runner:
    """The devices' side of an engine: parameters, page pools, sampler states and the compiled programs."""

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
        self._spans_processes = spans_processes(plan.mesh)
        parts = self._parts(params)
        self._programs = tuple(
            StepPrograms(model, plan, stage, part, Programs(metrics, self._store(kept_in, stage, part)))
            for stage, part in zip(plan.stages, parts, strict=True)
        )
        self._params = self._split(parts)
        self._lanes: list[_Lane] = []
        self._start_afresh()

    def execute(self, lane: int, schedules: Several[Schedule], tables: Several[Several[np.ndarray]]) -> PendingStep:
        """Send one step of a lane: a schedule and page tables for every shard.

        `tables` are copied before this returns; nothing waits for the device.
        """
        step, scored = self._lanes[lane].planner.plan(schedules, tables)
        return PendingStep(tuple(schedules), scored, self.send(step))

    def send(self, step: StepPlan) -> SentStep:
        """Send a planned step; nothing waits for the device."""
        with self._all_do("step", step.content):
            return self._send(step)

    def _send(self, step: StepPlan) -> SentStep:
        lane, programs, (ends, _) = self._lanes[step.lane], self._programs[-1], self._params[-1]
        for new in step.admissions:
            counts, bias = (np.broadcast_to(own, (len(new.slots), *own.shape)) for own in (new.counts, new.bias))
            lane.state = programs.admission()(lane.state, *map(self._placed, (new.slots, counts, bias)))
        for pairs in step.copies:
            sources, targets = map(self._placed, pairs)
            lane.pools = [
                pool
                for stage in self._programs
                for pool in stage.copier()(tuple(lane.pools[number] for number in stage.pools), sources, targets)
            ]
        hidden, sampled_from = self._run_model(lane, programs.layout(step.num_tokens), step.batch)
        sampled = None
        if step.samples is not None:
            sampler = programs.sampler(step.samples.shape[1])
            sampled, lane.state = sampler(ends, lane.state, sampled_from, self._placed(step.samples))
        scorer = partial(programs.scorer, step.num_tokens)
        scores = tuple(scorer()(ends, hidden, *map(self._placed, pair)) for pair in step.scores)
        return SentStep(hidden, sampled, scores)

    def set_params(self, params: Params) -> None:
        """Use these parameters from the next step on; shaped as the model's, on their devices."""
        self._params = self._split(self._parts(params))

    def warm_up(self) -> None:
        """Compile every program."""
        with self._all_do("warm-up"):
            for programs in self._programs:
                programs.make_all()

    def reset(self) -> None:
        """Fresh pools and sampler states, after a failed step may have left them unusable."""
        with self._all_do("reset"):
            self._start_afresh()

    def expert_tokens(self) -> dict[int, np.ndarray]:
        """For every layer with experts, how many tokens each of them was chosen for since the start or the last reset:
        uint32 [E], beginning anew at 2 ** 32. It waits for what is sent."""
        with_experts = [
            (stage, loads) for stage, loads in zip(self._programs, self._loads, strict=True) if stage.has_experts
        ]
        if not with_experts:
            return {}
        found: dict[int, np.ndarray] = {}
        with self._all_do("expert-tokens"):
            for stage, loads in with_experts:
                for segment, total in zip(stage.segments, stage.expert_tokens()(tuple(loads)), strict=True):
                    layers = [index for index in segment.layers if self.plan.model.layers[index].experts is not None]
                    found |= zip(layers, () if total is None else np.asarray(total).view(np.uint32), strict=True)
        return found

    def _start_afresh(self) -> None:
        self._lanes.clear()
        self._lanes += map(self._new_lane, range(self.plan.num_lanes))
        self._loads = [
            [None if leaf is None else programs.zeros("load", leaf)() for leaf in programs.loads]
            for programs in self._programs
        ]

    def _new_lane(self, lane: int) -> _Lane:
        pools: list[Any] = []
        for programs in self._programs:
            make = programs.zeros
            pools += empty_pools(tuple(programs.pools.values()), lambda leaf, make=make: make("pool", leaf)())
        programs = self._programs[-1]
        return _Lane(StepPlanner(self.plan, lane), pools, programs.zeros("state", programs.state)())

    def _run_model(self, lane: _Lane, layout: BatchLayout, batch: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Send all layers over packed batches, one a shard: hidden states [shards, T, D], and those of the rows to
        sample from [shards, S, D]."""
        flow: Any = None
        for stage in range(len(self._programs)):
            flow = self._run_stage(stage, lane, layout, batch, flow)
        return flow

    def _run_stage(self, stage: int, lane: _Lane, layout: BatchLayout, batch: np.ndarray, flow: Any) -> Any:
        """Send one stage. flow: what the stage before returned, None for the first: x and all layers' own inputs. The
        last returns what _run_model does."""
        programs, (ends, layers), pools = self._programs[stage], self._params[stage], lane.pools
        mesh, own, loads = programs.stage.mesh, programs.stage.layers, self._loads[stage]
        words = self._placed(batch) if self._spans_processes else jax.device_put(batch, programs.per_shard)
        if stage == 0:
            last_tokens = lane.state.last_tokens
            if len(self._programs) > 1:
                last_tokens = _move(last_tokens, mesh)
            stream, prepared = programs.begin(layout)(ends, last_tokens, words)
            x, per_layer, rotations = stream.x, stream.per_layer, stream.rotations
            inputs = per_layer
        else:
            x, per_layer = flow
            x, inputs = _move((x, per_layer[own.start : own.stop]), mesh)
            rotations, prepared = programs.resume(layout)(words)
        for number, (segment, params) in enumerate(zip(programs.segments, layers, strict=True)):
            first = segment.layers[0] - own.start
            x, updated, loads[number] = programs.layers(layout, number)(
                params,
                x,
                tuple(pools[pool] for pool in segment.pools),
                rotations,
                inputs[first : first + len(segment.layers)],
                tuple(prepared[kind] for kind in segment.kinds),
                loads[number],
                words,
            )
            for pool, array in zip(segment.pools, updated, strict=True):
                pools[pool] = array
        return programs.end(layout)(ends, x, words) if stage == len(self._programs) - 1 else (x, per_layer)

    def _placed(self, array: np.ndarray) -> Any:
        """A host array [shards, ...] as programs take it. Every process has the same one."""
        if not self._spans_processes:
            return array
        return jax.make_array_from_callback(array.shape, self._programs[0].per_shard, lambda index: array[index])

    def _parts(self, params: Params) -> list[Params]:
        """The parameters of each stage, on its devices: embeddings that are the head's weights too come from the first
        stage's to the last one's."""
        parts = [stage.part(params) for stage in self.plan.stages]
        if len(parts) > 1 and self.model.config.tie_embeddings:
            parts[-1]["embed"] = _move(params["embed"], self.plan.stages[-1].mesh)
        return parts

    def _split(self, parts: list[Params]) -> tuple[tuple[Params, tuple[Any, ...]], ...]:
        return tuple(programs.split(part) for programs, part in zip(self._programs, parts, strict=True))

    def _store(self, directory: Path | None, stage: Stage, part: Params) -> ProgramStore | None:
        if directory is None:
            return None
        params = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), part)
        plan = replace(self.plan, seed=0, enable_prefix_caching=True)  # no program reads these
        made_from = plan, stage, self.model.config, self.model.dtype, self.model.fused, params
        return ProgramStore(directory, stage.mesh, repr(made_from))


def _move(arrays: Any, mesh: Mesh) -> Any:
    """Arrays on one stage's mesh to the same places of another's; nothing waits for them."""
    return jax.device_put(arrays, jax.tree.map(lambda array: NamedSharding(mesh, array.sharding.spec), arrays))
