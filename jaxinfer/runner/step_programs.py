"""The compiled programs of a stage, for every bucket: what they are made of, and how their arrays lie on its mesh.

For each token bucket one that begins, one that ends and one for each kind of segment (segments.py); one sampler for
each row bucket, one scorer of prompt tokens for each token bucket that needs it, one page copier, one admission.
Where there are several stages, only the first begins, only the last ends and samples, and the others resume.
Everything is made from shapes: neither parameters nor devices need to be there.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.cache.pool import abstract_pools, copy_pages
from jaxinfer.models.model import Model, Params, Stream
from jaxinfer.models.stages import Stage
from jaxinfer.ops.matmul import compiler_options
from jaxinfer.plan import Plan
from jaxinfer.runner import step
from jaxinfer.runner.batch import BatchLayout
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.segments import Segment, segments
from jaxinfer.runner.step_plan import SCORED_ROWS
from jaxinfer.sampling.logprobs import score
from jaxinfer.sampling.rows import NUM_COLUMNS, SamplingRows
from jaxinfer.sampling.sampler import SampleOutput, sample
from jaxinfer.sampling.state import SamplerState, admit, init_state
from jaxinfer.sharding.hop import Hop
from jaxinfer.sharding.mesh import AXES
from jaxinfer.sharding.spmd import (
    PER_DEVICE,
    PER_PLACE,
    PER_SHARD,
    ROWS,
    SHARDS,
    each_device,
    each_shard,
    gather_options,
    shardings,
    spans_processes,
    specs,
)


class StepPrograms:
    """Programs of one stage of a model and plan; each is compiled, or loaded, when it is first asked for.

    params: the stage's part of the parameters, of which only shapes and shardings are read. pools: of the pools that
    the stage's layers own, by number. loads: of each segment's counts of its experts' tokens, device by device; None
    where it has no experts.
    """

    def __init__(self, model: Model, plan: Plan, stage: Stage, params: Params, programs: Programs) -> None:
        self.stage = stage
        self.segments = segments(plan, stage.layers)
        self.per_shard = NamedSharding(stage.mesh, PER_SHARD)
        pools = abstract_pools(plan, NamedSharding(stage.mesh, PER_DEVICE))
        self.pools = {pool: pools[pool] for pool in sorted({plan.layers[index].pool for index in stage.layers})}
        self.state = self._initial_state(model, plan, stage.mesh)
        self.loads = tuple(self._load(plan, segment) for segment in self.segments)
        self.has_experts = any(load is not None for load in self.loads)
        self._model, self._plan, self._programs = model, plan, programs
        self._ends, self._layers = self.split(params)
        self._platform = stage.mesh.devices.flat[0].platform
        self._model_has_experts = any(layer.experts is not None for layer in model.config.layers)
        self._gather_options = gather_options(plan.mesh)
        functions = [segment.function for segment in self.segments]
        self._same_as = [functions.index(function) for function in functions]
        self._begun: dict[int, Any] = {}  # by token bucket, the shapes of what enters its layers, once traced
        self._is_first, self._is_last = stage.layers.start == 0, stage.layers.stop == len(plan.layers)
        self._spans_processes = spans_processes(stage.mesh)
        # What the host reads: of all shards, where one process reads for several.
        self._read = NamedSharding(stage.mesh, PartitionSpec() if self._spans_processes else PER_SHARD)

    def split(self, params: Params) -> tuple[Params, tuple[Any, ...]]:
        """The stage's part of the parameters as its programs take them: all but the layers, and by segment these."""
        ends = {name: value for name, value in params.items() if name != "layers"}
        layers = params["layers"]
        return ends, tuple(tuple(layers[str(index)] for index in segment.layers) for segment in self.segments)

    def layout(self, num_tokens: int) -> BatchLayout:
        return BatchLayout(num_tokens, self._plan.max_num_seqs, self._plan.table_widths)

    def placed(self, array: np.ndarray) -> Any:
        """A host array [shards, ...] as programs take it. Every process of the stage has the same one."""
        if not self._spans_processes:
            return array
        return jax.make_array_from_callback(array.shape, self.per_shard, lambda index: array[index])

    def words(self, batch: np.ndarray) -> jax.Array:
        """Packed batches [shards, layout's size] on their devices."""
        return self.placed(batch) if self._spans_processes else jax.device_put(batch, self.per_shard)

    def make_all(self) -> None:
        """Every program that serving can need; afterwards nothing compiles."""
        for num_tokens in self._plan.token_buckets:
            self.make_model(self.layout(num_tokens))
            if self._is_last:
                self.scorer(num_tokens)
        self.copier()
        if self.has_experts:
            self.expert_tokens()
        if self._is_last:
            for num_rows in self._plan.sequence_buckets:
                self.sampler(num_rows)
            self.admission()

    def make_model(self, layout: BatchLayout) -> None:
        """The programs of all layers."""
        if self._is_first:
            self.begin(layout)
        else:
            self.resume(layout)
        for number in range(len(self.segments)):
            self.layers(layout, number)
        if self._is_last:
            self.end(layout)

    def entering(self, num_tokens: int) -> tuple[jax.ShapeDtypeStruct, tuple[jax.ShapeDtypeStruct, ...]]:
        """What comes from the stage before, as it lies on this one: x, and the inputs of all layers from here on."""
        width, count = self._model.config.per_layer_input_dim, len(self._plan.layers) - self.stage.layers.start
        own = self._per_shard((num_tokens, width), self._plan.dtype, ROWS)
        return self._hidden(num_tokens, ROWS), (own,) * count if width else ()

    def exchange(self, name: Hashable, hop: Hop, leaves: Any) -> Any:
        """(arrays of another stage's devices and of this one's) -> the same, of which this one's are the other's: what
        `hop` exchanges, by a name of its own."""
        return self._programs.get(("exchange", name), lambda: hop.lower(leaves))

    def zeros(self, name: str, leaves: Any) -> Any:
        """() -> zeros of the leaves' shapes, where they lie."""

        def make() -> Any:
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), leaves)

        def lower() -> jax.stages.Lowered:
            return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, leaves)).lower()

        return self._programs.get((name, *((leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(leaves))), lower)

    def begin(self, layout: BatchLayout) -> Any:
        """(ends, last tokens, buffers) -> Stream, prepared."""
        return self._programs.get(("begin", layout.num_tokens), lambda: self._trace_begin(layout).lower())

    def _trace_begin(self, layout: BatchLayout) -> jax.stages.Traced:
        cuts = specs(self._ends)
        function = partial(step.begin, self._model, self._plan, layout, cuts)
        outputs = (ROWS, PER_PLACE)
        run = self._jit(function, (cuts, PER_SHARD, PER_SHARD), outputs)
        traced = run.trace(self._ends, self.state.last_tokens, self._buffer(layout))
        self._begun[layout.num_tokens] = self._placed(traced.out_info, outputs)
        return traced

    def resume(self, layout: BatchLayout) -> Any:
        """(buffers) -> rotations, prepared: on a stage that is not the first."""
        return self._programs.get(("resume", layout.num_tokens), lambda: self._trace_resume(layout).lower())

    def _trace_resume(self, layout: BatchLayout) -> jax.stages.Traced:
        function = partial(step.resume, self._model, self._plan, layout)
        outputs = (ROWS, PER_PLACE)
        traced = self._jit(function, (PER_SHARD,), outputs).trace(self._buffer(layout))
        rotations, prepared = self._placed(traced.out_info, outputs)
        shapes: tuple[Any, Any] = self.entering(layout.num_tokens)
        self._begun[layout.num_tokens] = Stream(shapes[0], rotations, shapes[1]), prepared
        return traced

    def layers(self, layout: BatchLayout, number: int) -> Any:
        """(parameters, x, pools, rotations, per-layer inputs, prepared, load, buffers) -> x, pools, load: the program
        of a segment, which it shares with those of the same function."""
        number = self._same_as[number]
        segment = self.segments[number]

        def lower() -> jax.stages.Lowered:
            if layout.num_tokens not in self._begun:  # `begin` came from the store
                (self._trace_begin if self._is_first else self._trace_resume)(layout)
            stream, prepared = self._begun[layout.num_tokens]
            cuts = specs(self._layers[number])
            function = partial(step.run_layers, self._model, self._plan, layout, segment, cuts)
            inputs = (cuts, ROWS, PER_DEVICE, ROWS, ROWS, PER_PLACE, PER_DEVICE, PER_SHARD)
            return self._jit(function, inputs, (ROWS, PER_DEVICE, PER_DEVICE), donate=(1, 2, 6)).lower(
                self._layers[number],
                stream.x,
                tuple(self.pools[pool] for pool in segment.pools),
                stream.rotations,
                stream.per_layer[: len(segment.layers)],
                tuple(prepared[kind] for kind in segment.kinds),
                self.loads[number],
                self._buffer(layout),
            )

        options = self._options(layout.num_tokens, with_attention=True) | self._gather_options
        return self._programs.get(("layers", layout.num_tokens, number), lower, options)

    def end(self, layout: BatchLayout) -> Any:
        """(ends, x, buffers) -> hidden states, and those to sample from."""

        def lower() -> jax.stages.Lowered:
            cuts = specs(self._ends)
            function = partial(step.end, self._model, layout, cuts)
            run = self._jit(function, (cuts, ROWS, PER_SHARD), (ROWS, PER_SHARD), donate=(1,))
            return run.lower(self._ends, self._hidden(layout.num_tokens, ROWS), self._buffer(layout))

        return self._programs.get(("end", layout.num_tokens), lower)

    def sampler(self, num_rows: int) -> Any:
        """(ends, state, hidden states, words) -> SampleOutput, state."""

        def run(ends: Any, state: SamplerState, hidden: jax.Array, words: jax.Array) -> tuple[SampleOutput, Any]:
            cuts = specs(self._ends)
            function = partial(step.logits, self._model, num_rows, cuts)
            logits = each_device(function, self.stage.mesh, (cuts, PER_SHARD), self._logits)(ends, hidden)
            draw = each_shard(lambda *given: sample(given[0], given[1], SamplingRows(given[2])), self.stage.mesh, 3)
            return draw(logits, state, words)

        def lower() -> jax.stages.Lowered:
            outputs = (self._read, jax.tree.map(lambda leaf: leaf.sharding, self.state))
            jitted = jax.jit(run, donate_argnums=1, out_shardings=outputs)
            words = self._per_shard((num_rows, NUM_COLUMNS))
            return jitted.lower(self._ends, self.state, self._hidden(self._plan.max_num_seqs, PER_SHARD), words)

        return self._programs.get(("sampler", num_rows), lower, self._options(num_rows))

    def scorer(self, num_tokens: int) -> Any:
        """(ends, hidden states, rows, targets) -> TokenLogprobs."""

        def run(ends: Any, hidden: jax.Array, rows: jax.Array, targets: jax.Array) -> Any:
            cuts = specs(self._ends)
            function = partial(step.logits_of, self._model, cuts)
            inputs = (cuts, ROWS, PER_SHARD)
            logits = each_device(function, self.stage.mesh, inputs, self._logits)(ends, hidden, rows)
            return each_shard(score, self.stage.mesh, 2)(logits, targets)

        def lower() -> jax.stages.Lowered:
            rows = self._per_shard((SCORED_ROWS,))
            jitted = jax.jit(run, out_shardings=self._read)
            return jitted.lower(self._ends, self._hidden(num_tokens, ROWS), rows, rows)

        return self._programs.get(("scorer", num_tokens), lower, self._options(SCORED_ROWS))

    def copier(self) -> Any:
        """(the stage's pools, source pages, target pages) -> its pools."""
        groups = {layer.pool: layer.group for layer in self._plan.layers}
        group_of_pool = tuple(groups[pool] for pool in self.pools)

        def copy(pools: Any, sources: jax.Array, targets: jax.Array) -> Any:
            return copy_pages(pools, group_of_pool, sources, targets)

        def lower() -> jax.stages.Lowered:
            pairs = self._per_shard((len(self._plan.groups), self._plan.max_num_seqs))
            run = self._jit(copy, (PER_DEVICE, PER_SHARD, PER_SHARD), PER_DEVICE, donate=(0,))
            return run.lower(tuple(self.pools.values()), pairs, pairs)

        return self._programs.get("page copier", lower)

    def admission(self) -> Any:
        """(state, slots, counts, bias) -> state."""

        def lower() -> jax.stages.Lowered:
            size = self._model.config.vocab_size
            outputs = jax.tree.map(lambda leaf: leaf.sharding, self.state)
            jitted = jax.jit(each_shard(admit, self.stage.mesh, 4), donate_argnums=0, out_shardings=outputs)
            counts, bias = self._per_shard((size,)), self._per_shard((size,), np.float32)
            return jitted.lower(self.state, self._per_shard(()), counts, bias)

        return self._programs.get("admission", lower)

    def expert_tokens(self) -> Any:
        """(loads) -> the same of all devices together, int32 [layers with experts, E] on each."""

        def total(loads: Any) -> Any:
            different = tuple(axis for axis in AXES if axis != "tensor")  # along which devices have the same tokens
            return jax.tree.map(lambda load: jax.lax.psum(load, different), loads)

        def lower() -> jax.stages.Lowered:
            return self._jit(total, (PER_DEVICE,), PartitionSpec()).lower(self.loads)

        return self._programs.get("expert tokens", lower)

    def _jit(self, function: Any, inputs: tuple[Any, ...], outputs: Any, donate: tuple[int, ...] = ()) -> Any:
        mesh = self.stage.mesh
        run = each_device(function, mesh, inputs, outputs)
        return jax.jit(run, donate_argnums=donate, out_shardings=shardings(mesh, outputs))

    def _options(self, num_rows: int, *, with_attention: bool = False) -> dict[str, str]:
        with_experts = with_attention and self._model_has_experts
        return compiler_options(num_rows, self._platform, with_attention=with_attention, with_experts=with_experts)

    def _per_shard(
        self, shape: tuple[int, ...], dtype: Any = np.int32, spec: PartitionSpec = PER_SHARD
    ) -> jax.ShapeDtypeStruct:
        here = NamedSharding(self.stage.mesh, spec)
        return jax.ShapeDtypeStruct((self._plan.num_shards, *shape), dtype, sharding=here)

    def _placed(self, parts: Any, specs: tuple[PartitionSpec, ...]) -> Any:
        """The shapes of a function's results, each part where its spec puts it."""
        return tuple(
            jax.tree.map(lambda leaf, here=here: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), part)
            for part, here in zip(parts, shardings(self.stage.mesh, specs), strict=True)
        )

    @property
    def _logits(self) -> PartitionSpec:
        head = specs(self._ends["embed" if self._model.config.tie_embeddings else "lm_head"]["weight"])
        return PartitionSpec(SHARDS, None, *head[:1])

    def _buffer(self, layout: BatchLayout) -> jax.ShapeDtypeStruct:
        return self._per_shard((layout.size,))

    def _hidden(self, num_rows: int, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return self._per_shard((num_rows, self._model.config.hidden_size), self._plan.dtype, spec)

    def _load(self, plan: Plan, segment: Segment) -> jax.ShapeDtypeStruct | None:
        experts = [plan.model.layers[index].experts for index in segment.layers]
        sizes = [own.num_experts for own in experts if own is not None]
        if not sizes:
            return None
        shape = (self.stage.mesh.size * len(sizes), sizes[0])
        return jax.ShapeDtypeStruct(shape, np.int32, sharding=NamedSharding(self.stage.mesh, PER_DEVICE))

    @staticmethod
    def _initial_state(model: Model, plan: Plan, mesh: Mesh) -> SamplerState:
        """Shapes of the sampler's state: slots by shard, and a slot's rows cut as the vocabulary is."""
        shapes = jax.eval_shape(partial(init_state, plan.max_num_seqs, model.config.vocab_size))

        def placed(leaf: Any) -> jax.ShapeDtypeStruct:
            dense = leaf.ndim > 1 and leaf.shape[1] % mesh.shape["tensor"] == 0
            spec = PartitionSpec(SHARDS, None, "tensor") if dense else PER_SHARD
            shape = (plan.num_shards, *leaf.shape)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(placed, shapes)
