"""Runs schedules: packs them, sends them to the device, and hands back what to read later."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.cache.manager import PageCopy
from jaxinfer.cache.pool import abstract_pools, copy_pages, empty_pools
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.model import Model, Params
from jaxinfer.ops.matmul import compiler_options
from jaxinfer.outputs import ScoredTokens
from jaxinfer.plan import Plan
from jaxinfer.runner import step
from jaxinfer.runner.batch import BatchLayout, pack
from jaxinfer.runner.program_store import ProgramStore
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.segments import segments
from jaxinfer.sampling.logprobs import TokenLogprobs
from jaxinfer.sampling.rows import NUM_COLUMNS, SamplingTable
from jaxinfer.sampling.sampler import SampleOutput
from jaxinfer.sampling.state import admit, dense_rows, init_state, uses_dense_state
from jaxinfer.scheduler.schedule import Schedule, ScheduledRow
from jaxinfer.scheduler.sequence import Sequence

# Prompt positions whose log-probabilities one program computes; their logits take this many rows of the vocabulary.
SCORED_ROWS = 32


@dataclass(frozen=True)
class StepResult:
    """What a step computed, on the host. Rows are those of `schedule.sampling_rows`.

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
    """A step on its way through the device. `sampled` is None where no row samples."""

    schedule: Schedule
    hidden: jax.Array
    sampled: SampleOutput | None
    wants_logprobs: bool
    scored: tuple[tuple[Sequence, int, list[int], TokenLogprobs], ...]

    def read(self) -> StepResult:
        """Wait for the step and fetch what was asked for."""
        scored = tuple((sequence, first, ids, _fetch(scores, len(ids))) for sequence, first, ids, scores in self.scored)
        if self.sampled is None:
            self.hidden.block_until_ready()
            return StepResult(np.zeros(0, np.int32), None, (), scored)
        rows = self.schedule.sampling_rows
        invalid = np.asarray(self.sampled.invalid)[: len(rows)]
        return StepResult(
            token_ids=np.asarray(self.sampled.token_ids)[: len(rows)],
            logprobs=_fetch(self.sampled.logprobs, len(rows)) if self.wants_logprobs else None,
            invalid=tuple(row.sequence for row, bad in zip(rows, invalid, strict=True) if bad),
            prompt_logprobs=scored,
        )


def _fetch(scores: TokenLogprobs, count: int) -> ScoredTokens:
    parts = scores.logprob, scores.rank, scores.top_token_ids, scores.top_logprobs
    return ScoredTokens(*(np.asarray(part)[:count] for part in parts))


class Runner:
    """The device's side of an engine: parameters, page pools, sampler state and the compiled programs.

    Programs: for each token bucket one that begins, one that ends and one for each kind of segment (segments.py); one
    sampler for each row bucket, one scorer of prompt tokens for each token bucket that needs it, one page copier, one
    admission.
    """

    def __init__(
        self, model: Model, params: Params, plan: Plan, metrics: EngineMetrics, kept_in: Path | None = None
    ) -> None:
        self.model = model
        self.plan = plan
        self._segments = segments(plan)
        functions = [segment.function for segment in self._segments]
        self._same_as = [functions.index(function) for function in functions]
        self._begun: dict[int, Any] = {}  # by token bucket, the shapes of what its `begin` returns, once traced
        self.set_params(params)
        self._programs = Programs(metrics, None if kept_in is None else self._store(kept_in))
        self._table = SamplingTable(plan.max_num_seqs)
        self._replicated = NamedSharding(plan.mesh, PartitionSpec())
        self._platform = plan.mesh.devices.flat[0].platform
        self._abstract_pools = abstract_pools(plan, self._replicated)
        self._group_of_pool = _group_of_pool(plan)
        self.reset()

    def execute(self, schedule: Schedule, tables: Several[np.ndarray]) -> PendingStep:
        """Send one step. `tables` are copied before this returns; nothing waits for the device."""
        layout = self._layout(bucket(schedule.num_tokens, self.plan.token_buckets))
        buffer = pack(schedule, tables, layout)
        for row in schedule.rows:
            if row.is_new:
                self._admit(row)
        if schedule.copies:
            self._copy_pages(schedule.copies)
        hidden, sampled_from = self._run_model(layout, buffer)
        sampled = None
        rows = schedule.sampling_rows
        if rows:
            positions = [row.start + row.num_tokens - row.sequence.num_prompt_tokens for row in rows]
            size = bucket(len(rows), self.plan.sequence_buckets)
            words = self._table.rows([row.slot for row in rows], positions, size).words
            sampled, self._state = self._sampler(size)(self._ends, self._state, sampled_from, words)
        return PendingStep(
            schedule,
            hidden,
            sampled,
            wants_logprobs=any(row.sequence.params.logprobs is not None for row in rows),
            scored=self._score_prompts(schedule, hidden),
        )

    def set_params(self, params: Params) -> None:
        """Use these parameters from the next step on; shaped as the model's, on their devices."""
        layers = params["layers"]
        self._ends = {name: value for name, value in params.items() if name != "layers"}
        self._segment_params = tuple(
            tuple(layers[str(index)] for index in segment.layers) for segment in self._segments
        )

    def warm_up(self) -> None:
        """Compile every program."""
        for num_tokens in self.plan.token_buckets:
            layout = self._layout(num_tokens)
            self._begin(layout)
            for number in range(len(self._segments)):
                self._layers(layout, number)
            self._end(layout)
            self._scorer(num_tokens)
        for num_rows in self.plan.sequence_buckets:
            self._sampler(num_rows)
        self._copier()
        self._admission()

    def reset(self) -> None:
        """Fresh pools and sampler state: at the start, and after a failed step may have left them unusable."""
        self._pools = empty_pools(self._abstract_pools, lambda leaf: self._zeros(leaf)())
        self._state = self._initial_state()()

    def _run_model(self, layout: BatchLayout, buffer: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Send all layers over one packed batch: hidden states [T, D], and those of the rows to sample from [S, D]."""
        words = jax.device_put(buffer, self._replicated)
        stream, prepared = self._begin(layout)(self._ends, self._state.last_tokens, words)
        x, pools = stream.x, list(self._pools)
        for number, (segment, params) in enumerate(zip(self._segments, self._segment_params, strict=True)):
            x, updated = self._layers(layout, number)(
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
        return self._end(layout)(self._ends, x, words)

    def _layout(self, num_tokens: int) -> BatchLayout:
        return BatchLayout(num_tokens, self.plan.max_num_seqs, self.plan.table_widths)

    def _admit(self, row: ScheduledRow) -> None:
        """Give a slot to a sequence: its parameters, and its dense rows if it has any."""
        sequence = row.sequence
        self._table.set(row.slot, sequence.params, sequence.seed, sequence.sample_index)
        if uses_dense_state(sequence.params):
            prompt = sequence.token_ids[: sequence.num_prompt_tokens]
            counts, bias = dense_rows(
                sequence.params,
                sorted(sequence.stop_ids),
                prompt,
                sequence.output_token_ids,
                self.model.config.vocab_size,
            )
            self._state = self._admission()(self._state, np.int32(row.slot), counts, bias)

    def _copy_pages(self, copies: Several[PageCopy]) -> None:
        """Copies are sent in blocks of max_num_seqs a group; the rest of a block copies page 0 onto itself."""
        size = self.plan.max_num_seqs
        by_group: list[list[PageCopy]] = [[] for _ in self.plan.groups]
        for copy in copies:
            by_group[copy.group].append(copy)
        for start in range(0, max(map(len, by_group)), size):
            pairs = np.zeros((2, len(by_group), size), np.int32)
            for group, own in enumerate(by_group):
                for place, copy in enumerate(own[start : start + size]):
                    pairs[:, group, place] = copy.source, copy.target
            self._pools = self._copier()(self._pools, pairs[0], pairs[1])

    def _score_prompts(
        self, schedule: Schedule, hidden: jax.Array
    ) -> tuple[tuple[Sequence, int, list[int], TokenLogprobs], ...]:
        """Send the scoring of prompt tokens whose predecessors this step computed, for sequences that asked."""
        scored = []
        first = 0
        for row in schedule.rows:
            sequence = row.sequence
            if sequence.compute_all_prompt and not sequence.num_output_tokens:
                stop = min(row.start + row.num_tokens, sequence.num_prompt_tokens - 1)
                for start in range(row.start, stop, SCORED_ROWS):
                    targets = sequence.token_ids[start + 1 : min(start + SCORED_ROWS, stop) + 1]
                    rows = np.zeros((2, SCORED_ROWS), np.int32)
                    rows[0, : len(targets)] = first + start - row.start + np.arange(len(targets))
                    rows[1, : len(targets)] = targets
                    scorer = self._scorer(hidden.shape[0])
                    scored.append((sequence, start + 1, targets, scorer(self._ends, hidden, rows[0], rows[1])))
            first += row.num_tokens
        return tuple(scored)

    def _store(self, directory: Path) -> ProgramStore:
        params = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), (self._ends, self._segment_params))
        plan = replace(self.plan, seed=0, enable_prefix_caching=True)  # no program reads these
        made_from = plan, self.model.config, self.model.dtype, self.model.fused, params
        return ProgramStore(directory, plan.mesh, repr(made_from))

    # Programs. Arguments that come from the host are described by shape; they are small and go to every device.

    def _host(self, shape: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._replicated)

    def _options(self, num_rows: int, *, with_attention: bool = False) -> dict[str, str]:
        with_experts = with_attention and any(layer.experts is not None for layer in self.model.config.layers)
        return compiler_options(num_rows, self._platform, with_attention=with_attention, with_experts=with_experts)

    def _zeros(self, leaf: jax.ShapeDtypeStruct) -> Any:
        def lower() -> jax.stages.Lowered:
            return jax.jit(partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=leaf.sharding).lower()

        return self._programs.get(("empty pool", leaf.shape), lower)

    def _initial_state(self) -> Any:
        def lower() -> jax.stages.Lowered:
            make = partial(init_state, self.plan.max_num_seqs, self.model.config.vocab_size)
            return jax.jit(make, out_shardings=self._replicated).lower()

        return self._programs.get("initial state", lower)

    def _begin(self, layout: BatchLayout) -> Any:
        return self._programs.get(("begin", layout.num_tokens), lambda: self._trace_begin(layout).lower())

    def _trace_begin(self, layout: BatchLayout) -> jax.stages.Traced:
        run = jax.jit(partial(step.begin, self.model, self.plan, layout), out_shardings=self._replicated)
        traced = run.trace(self._ends, self._state.last_tokens, self._host((layout.size,)))
        shapes = jax.tree.map(lambda leaf: self._host(leaf.shape, leaf.dtype), traced.out_info)
        self._begun[layout.num_tokens] = shapes
        return traced

    def _layers(self, layout: BatchLayout, number: int) -> Any:
        """The program of a segment, which it shares with those of the same function."""
        number = self._same_as[number]
        segment = self._segments[number]

        def lower() -> jax.stages.Lowered:
            if layout.num_tokens not in self._begun:  # `begin` came from the store
                self._trace_begin(layout)
            stream, prepared = self._begun[layout.num_tokens]
            run = jax.jit(
                partial(step.run_layers, self.model, self.plan, layout, segment),
                donate_argnums=(1, 2),
                out_shardings=self._replicated,
            )
            return run.lower(
                self._segment_params[number],
                stream.x,
                tuple(self._abstract_pools[pool] for pool in segment.pools),
                stream.rotations,
                stream.per_layer[: len(segment.layers)],
                tuple(prepared[kind] for kind in segment.kinds),
                self._host((layout.size,)),
            )

        options = self._options(layout.num_tokens, with_attention=True)
        return self._programs.get(("layers", layout.num_tokens, number), lower, options)

    def _end(self, layout: BatchLayout) -> Any:
        def lower() -> jax.stages.Lowered:
            run = jax.jit(partial(step.end, self.model, layout), donate_argnums=1, out_shardings=self._replicated)
            x = self._host((layout.num_tokens, self.model.config.hidden_size), self.plan.dtype)
            return run.lower(self._ends, x, self._host((layout.size,)))

        return self._programs.get(("end", layout.num_tokens), lower)

    def _sampler(self, num_rows: int) -> Any:
        def lower() -> jax.stages.Lowered:
            run = jax.jit(partial(step.sample_tokens, self.model), donate_argnums=1, out_shardings=self._replicated)
            hidden = self._host((self.plan.max_num_seqs, self.model.config.hidden_size), self.plan.dtype)
            return run.lower(self._ends, self._state, hidden, self._host((num_rows, NUM_COLUMNS)))

        return self._programs.get(("sampler", num_rows), lower, self._options(num_rows))

    def _scorer(self, num_tokens: int) -> Any:
        def lower() -> jax.stages.Lowered:
            run = jax.jit(partial(step.score_tokens, self.model), out_shardings=self._replicated)
            hidden = self._host((num_tokens, self.model.config.hidden_size), self.plan.dtype)
            rows = self._host((SCORED_ROWS,))
            return run.lower(self._ends, hidden, rows, rows)

        return self._programs.get(("scorer", num_tokens), lower, self._options(SCORED_ROWS))

    def _copier(self) -> Any:
        def lower() -> jax.stages.Lowered:
            run = jax.jit(copy_pages, static_argnums=1, donate_argnums=0, out_shardings=self._replicated)
            pairs = self._host((len(self.plan.groups), self.plan.max_num_seqs))
            return run.lower(self._pools, self._group_of_pool, pairs, pairs)

        return self._programs.get("page copier", lower)

    def _admission(self) -> Any:
        def lower() -> jax.stages.Lowered:
            run = jax.jit(admit, donate_argnums=0, out_shardings=self._replicated)
            row = (self.model.config.vocab_size,)
            return run.lower(self._state, self._host(()), self._host(row), self._host(row, np.float32))

        return self._programs.get("admission", lower)


def bucket(size: int, sizes: Several[int]) -> int:
    """The smallest of the sorted `sizes` that holds `size`."""
    return sizes[bisect_left(sizes, size)]


def _group_of_pool(plan: Plan) -> tuple[int, ...]:
    groups = {layer.pool: layer.group for layer in plan.layers}
    return tuple(groups[pool] for pool in range(len(groups)))
