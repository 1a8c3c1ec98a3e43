"""Runs schedules: packs them, sends them to the device, and hands back what to read later."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxinfer.cache.pool import empty_pools
from jaxinfer.distributed.lead import Lead
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.model import Model, Params
from jaxinfer.models.stages import Stage
from jaxinfer.plan import Plan
from jaxinfer.runner.batch import BatchLayout
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.sent import AwaitedStep, PendingStep, SentStep
from jaxinfer.runner.step_plan import StepPlan, StepPlanner
from jaxinfer.runner.step_programs import StepPrograms
from jaxinfer.scheduler.schedule import Schedule
from jaxinfer.sharding.hop import Hop
from jaxinfer.sharding.spmd import has_part, processes, spans_processes


@contextmanager
def _alone(what: str, content: Callable[[], Any] | None = None) -> Iterator[int]:
    """There are no other processes to tell."""
    yield 0


@dataclass
class _Lane:
    """What the devices keep for one lane: page pools, each on its layers' stage, and the last stage's sampler state.

    Of other processes' stages it has None. Where stages are spread over processes, process 0 keeps each slot's newest
    token [shards, slots], and the step that has drawn newer ones.
    """

    planner: StepPlanner
    pools: list[Any]
    state: Any
    newest: np.ndarray
    last: PendingStep | None = None


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
        self._lead, self._all_do = lead, _alone if lead is None else lead.all_do
        # To each stage from the one before, and to the first from the last.
        meshes = [stage.mesh for stage in plan.stages]
        self._hops = [Hop(meshes[number - 1], mesh) for number, mesh in enumerate(meshes) if len(meshes) > 1]
        self._programs = tuple(
            StepPrograms(model, plan, stage, part, Programs(metrics, self._store(kept_in, stage, part)))
            for stage, part in zip(plan.stages, self._parts(params), strict=True)
        )
        self._own = [programs for programs in self._programs if has_part(programs.stage.mesh)]
        self._has_last = self._programs[-1] in self._own
        # Of each stage, the process that reads what it computes: process 0, if it has a part in it.
        self._readers = [min(processes(stage.mesh)) for stage in plan.stages]
        self._is_spread = len(plan.stages) > 1 and spans_processes(plan.mesh)
        self._params = self._split(params)
        self._lanes: list[_Lane] = []
        self._start_afresh()

    def execute(self, lane: int, schedules: Several[Schedule], tables: Several[Several[np.ndarray]]) -> PendingStep:
        """Send one step of a lane: a schedule and page tables for every shard.

        `tables` are copied before this returns. Nothing waits for the device, but for the lane's last tokens where
        stages are spread over processes.
        """
        own = self._lanes[lane]
        step, scored = own.planner.plan(schedules, tables)
        started = time.monotonic()
        if self._is_spread:
            step = replace(step, last_tokens=_newest_tokens(own))
        waited = time.monotonic() - started
        pending = PendingStep(tuple(schedules), scored, self.send(step), waited)
        if self._is_spread and step.samples is not None:
            own.last = pending
        return pending

    def send(self, step: StepPlan) -> SentStep | AwaitedStep:
        """Send a planned step; nothing waits for the device."""
        with self._all_do("step", step.content) as number:
            sent = self.send_own(step)
        if self._lead is None or self._has_last:
            return sent
        return AwaitedStep(sent, step, lambda lead=self._lead: lead.answers(number)[0])

    def send_own(self, step: StepPlan) -> SentStep:
        """Send this process's part of a step."""
        lane, layout = self._lanes[step.lane], self._programs[-1].layout(step.num_tokens)
        if self._is_spread:  # or what one process compiles now would keep the others waiting in the middle
            self._make_model(layout)
        for pairs in step.copies:
            for stage in self._own:
                copied = stage.copier()(tuple(lane.pools[number] for number in stage.pools), *map(stage.placed, pairs))
                for number, pool in zip(stage.pools, copied, strict=True):
                    lane.pools[number] = pool
        if not self._has_last:
            x, _ = self._run_model(lane, layout, step)
            return SentStep(x, None, ())
        programs, (ends, _) = self._programs[-1], self._params[-1]
        placed = programs.placed
        for new in step.admissions:
            counts, bias = (np.broadcast_to(own, (len(new.slots), *own.shape)) for own in (new.counts, new.bias))
            lane.state = programs.admission()(lane.state, *map(placed, (new.slots, counts, bias)))
        hidden, sampled_from = self._run_model(lane, layout, step)
        sampled = None
        if step.samples is not None:
            sampler = programs.sampler(step.samples.shape[1])
            sampled, lane.state = sampler(ends, lane.state, sampled_from, placed(step.samples))
        scorer = partial(programs.scorer, step.num_tokens)
        scores = tuple(scorer()(ends, hidden, *map(placed, pair)) for pair in step.scores)
        return SentStep(hidden, sampled, scores)

    @property
    def answers_steps(self) -> bool:
        """Whether this process tells process 0 what steps have computed."""
        return 0 < self._readers[-1] == jax.process_index()

    def set_params(self, params: Params) -> None:
        """Use these parameters from the next step on; shaped as the model's, on their devices."""
        self._params = self._split(params)

    def warm_up(self) -> None:
        """Compile every program."""
        with self._all_do("warm-up"):
            for programs in self._own:
                programs.make_all()
            for num_tokens in self.plan.token_buckets:
                self._make_exchanges(num_tokens)

    def reset(self) -> None:
        """Fresh pools and sampler states, after a failed step may have left them unusable."""
        with self._all_do("reset"):
            self._start_afresh()

    def expert_tokens(self) -> dict[int, np.ndarray]:
        """For every layer with experts, how many tokens each of them was chosen for since the start or the last reset:
        uint32 [E], beginning anew at 2 ** 32. It waits for what is sent.

        On other processes than 0, of those layers that process 0 leaves to them.
        """
        with_experts = [number for number, stage in enumerate(self._programs) if stage.has_experts]
        if not with_experts:
            return {}
        found: dict[int, np.ndarray] = {}
        with self._all_do("expert-tokens") as number:
            for stage in with_experts:
                if self._programs[stage] in self._own:
                    counted = self._count_experts(stage)
                    found |= counted if self._readers[stage] == jax.process_index() else {}
        if self._lead is not None:
            others = {self._readers[stage] for stage in with_experts} - {0}
            for answer in self._lead.answers(number, len(others)):
                found |= answer
        return found

    def _count_experts(self, stage: int) -> dict[int, np.ndarray]:
        programs, found = self._programs[stage], dict[int, np.ndarray]()
        for segment, total in zip(programs.segments, programs.expert_tokens()(tuple(self._loads[stage])), strict=True):
            layers = [index for index in segment.layers if self.plan.model.layers[index].experts is not None]
            found |= zip(layers, () if total is None else np.asarray(total).view(np.uint32), strict=True)
        return found

    def _start_afresh(self) -> None:
        self._lanes.clear()
        self._lanes += map(self._new_lane, range(self.plan.num_lanes))
        self._loads = [
            [None if leaf is None else programs.zeros("load", leaf)() for leaf in programs.loads]
            if programs in self._own
            else []
            for programs in self._programs
        ]

    def _new_lane(self, lane: int) -> _Lane:
        pools: list[Any] = [None] * sum(len(programs.pools) for programs in self._programs)
        for programs in self._own:
            make = programs.zeros
            empty = empty_pools(tuple(programs.pools.values()), lambda leaf, make=make: make("pool", leaf)())
            for number, pool in zip(programs.pools, empty, strict=True):
                pools[number] = pool
        programs = self._programs[-1]
        state = programs.zeros("state", programs.state)() if self._has_last else None
        newest = np.zeros((self.plan.num_shards, self.plan.max_num_seqs + 1), np.int32)
        return _Lane(StepPlanner(self.plan, lane), pools, state, newest)

    def _run_model(self, lane: _Lane, layout: BatchLayout, step: StepPlan) -> tuple[jax.Array, jax.Array]:
        """Send all layers over packed batches, one a shard: hidden states [shards, T, D], and those of the rows to
        sample from [shards, S, D]. Without the last stage, what this process's last stage gives."""
        flow: Any = self._last_tokens(lane, step.last_tokens)
        given: Any = None
        for stage in range(len(self._programs)):
            flow = self._run_stage(stage, lane, layout, step.batch, flow)
            given = given if flow is None else flow
        return given

    def _run_stage(self, stage: int, lane: _Lane, layout: BatchLayout, batch: np.ndarray, flow: Any) -> Any:
        """Send one stage. flow: for the first, each slot's newest token; for others what the one before returned: x,
        and the inputs of the layers that follow. The last returns what _run_model does, one of other processes None."""
        programs, (ends, layers), pools = self._programs[stage], self._params[stage], lane.pools
        if stage > 0:
            leaves = programs.entering(layout.num_tokens)
            flow = self._taken(programs, self._hops[stage], layout.num_tokens, leaves, flow)
        if programs not in self._own:
            return None
        own, loads = programs.stage.layers, self._loads[stage]
        words = programs.words(batch)
        if stage == 0:
            stream, prepared = programs.begin(layout)(ends, flow, words)
            x, per_layer, rotations = stream.x, stream.per_layer, stream.rotations
        else:
            x, per_layer = flow
            rotations, prepared = programs.resume(layout)(words)
        for number, (segment, params) in enumerate(zip(programs.segments, layers, strict=True)):
            first = segment.layers[0] - own.start
            x, updated, loads[number] = programs.layers(layout, number)(
                params,
                x,
                tuple(pools[pool] for pool in segment.pools),
                rotations,
                per_layer[first : first + len(segment.layers)],
                tuple(prepared[kind] for kind in segment.kinds),
                loads[number],
                words,
            )
            for pool, array in zip(segment.pools, updated, strict=True):
                pools[pool] = array
        return programs.end(layout)(ends, x, words) if stage == len(self._programs) - 1 else (x, per_layer[len(own) :])

    def _last_tokens(self, lane: _Lane, told: np.ndarray | None) -> Any:
        """The newest token of each slot, where the first stage reads it. told: where process 0 tells them."""
        if told is not None:
            return self._programs[0].placed(told) if self._programs[0] in self._own else None
        return self._hops[0].copy(lane.state.last_tokens) if self._hops else lane.state.last_tokens

    def _taken(self, programs: StepPrograms, hop: Hop, name: Hashable, leaves: Any, arrays: Any) -> Any:
        """Arrays of another stage on this one's devices, as `leaves` lie there; None where these are other processes'.

        arrays: None where the other stage is other processes'.
        """
        if not hop.is_exchange:
            return hop.copy(arrays) if hop.has_part else None
        if not hop.has_part:
            return None
        room = programs.zeros("room", leaves)() if programs in self._own else None
        return hop.exchange(programs.exchange(name, hop, leaves), leaves, arrays, room)

    def _make_model(self, layout: BatchLayout) -> None:
        for programs in self._own:
            programs.make_model(layout)
        self._make_exchanges(layout.num_tokens)

    def _make_exchanges(self, num_tokens: int) -> None:
        for programs, hop in list(zip(self._programs, self._hops, strict=False))[1:]:
            if hop.has_part and hop.is_exchange:
                programs.exchange(num_tokens, hop, programs.entering(num_tokens))

    def _parts(self, params: Params) -> list[Params]:
        """The parameters of each stage, as they lie on its devices: embeddings that are the head's weights too on the
        last stage's as on the first one's."""
        parts = [stage.part(params) for stage in self.plan.stages]
        if self._has_two_embeddings:
            here = self.plan.stages[-1].mesh

            def leaf(array: Any) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(here, array.sharding.spec))

            parts[-1]["embed"] = jax.tree.map(leaf, params["embed"])
        return parts

    @property
    def _has_two_embeddings(self) -> bool:
        return len(self.plan.stages) > 1 and self.model.config.tie_embeddings

    def _split(self, params: Params) -> tuple[tuple[Params, tuple[Any, ...]], ...]:
        """The parameters as the stages' programs take them."""
        parts = self._parts(params)
        if self._has_two_embeddings:
            hop = Hop(self.plan.stages[0].mesh, self.plan.stages[-1].mesh)
            embed = params["embed"]
            parts[-1]["embed"] = self._taken(self._programs[-1], hop, "embed", parts[-1]["embed"], embed)
        return tuple(programs.split(part) for programs, part in zip(self._programs, parts, strict=True))

    def _store(self, directory: Path | None, stage: Stage, part: Params) -> ProgramStore | None:
        if directory is None:
            return None
        params = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), part)
        plan = replace(self.plan, seed=0, enable_prefix_caching=True)  # no program reads these
        made_from = plan, stage, self.model.config, self.model.dtype, self.model.fused, params
        return ProgramStore(directory, stage.mesh, repr(made_from))


def _newest_tokens(lane: _Lane) -> np.ndarray:
    """Of each of a lane's slots, [shards, slots]; waits for the lane's last step."""
    if lane.last is not None:
        for own, schedule, token_ids in zip(lane.newest, lane.last.schedules, lane.last.token_ids(), strict=True):
            slots = [row.slot for row in schedule.sampling_rows]
            own[slots] = token_ids[: len(slots)]
        lane.last = None
    return lane.newest.copy()
