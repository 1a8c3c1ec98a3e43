"""The real step of a large model, compiled for a TPU slice that is not there: what its programs say of themselves."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from published import MODELS, moved_bytes, weight_bytes

from jaxinfer.config import EngineConfig
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.layout import bytes_per_device, check_layout
from jaxinfer.models.model import Model
from jaxinfer.models.registry import resolve as resolve_family
from jaxinfer.models.stages import param_shardings
from jaxinfer.plan import Plan, resolve
from jaxinfer.runner.batch import BatchLayout
from jaxinfer.runner.programs import Programs
from jaxinfer.runner.step_programs import StepPrograms
from jaxinfer.sharding.mesh import make_mesh

DTYPE_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"

Moved = Counter[tuple[str, int]]


@dataclass(frozen=True)
class Case:
    """A model on a slice, and a step of one shard: tokens of up to num_seqs sequences of at most max_len each.

    By default it is a decode of 64 sequences. keys_travel: under `context`, a step whose keys are few.
    """

    model: str
    slice: str
    mesh: str
    tokens: int = 64
    num_seqs: int = 64
    max_len: int = 8192
    num_pages: int = 2048
    keys_travel: bool = False

    def __str__(self) -> str:
        return f"{self.model:<16} {self.slice:<11} {self.mesh:<24}"


@dataclass(frozen=True)
class Found:
    """Of the fullest device, in bytes.

    estimate: seconds of a step, through all stages, by the compiler's own cost model, without what it knows no cost
    of: Pallas kernels.
    moved: how often a step has each (kind of collective, bytes of its result).
    """

    devices: int
    weights: int
    weights_by_hand: float
    cache: int
    scratch: int
    estimate: float
    moved: Moved
    moved_in_layers: int
    moved_by_hand: float


def taken(text: str, keys_travel: bool) -> str:
    """Of a compiled program's computations, those that run where keys travel, or do not."""
    computations = {match[1]: match[0] for match in re.finditer(r"^(?:ENTRY )?%?([\w.-]+) .*?^}", text, re.M | re.S)}
    left_out: set[str] = set()
    for pair in re.findall(r"branch_computations=\{([^}]*)\}", text):
        queries, keys = pair.replace("%", "").split(", ")
        left_out.add(queries if keys_travel else keys)
    for keys, queries in re.findall(r"true_computation=%?([\w.-]+), false_computation=%?([\w.-]+)", text):
        left_out.add(queries if keys_travel else keys)
    (waiting,) = ([name] for name, body in computations.items() if body.startswith("ENTRY"))
    reached = set(waiting)
    while waiting:
        called = set(re.findall(r"[\w.-]+", computations[waiting.pop()])) & computations.keys()
        waiting += called - reached - left_out
        reached |= called - left_out
    return "\n".join(computations[name] for name in sorted(reached))


def collectives(text: str) -> Moved:
    """How often a compiled program has each (kind, bytes of the result)."""
    found = Moved()
    for match in re.finditer(rf"= (\([^=]*?\)|\S+) ({KINDS})(?:-start)?\(", text):
        sizes = [
            DTYPE_BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
            for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
            if dtype in DTYPE_BYTES
        ]
        found[match[2], max(sizes)] += 1
    return found


def compile_step(case: Case, *, with_ends: bool = True) -> Found:
    """Compile the programs of one step. AssertionError for what must not be.

    Of the ends and the sampler only what they move, their scratch and their time are read; they can be left out.
    """
    config = MODELS[case.model]
    _, model_config = resolve_family(config)
    mesh = make_mesh(case.mesh, topologies.get_topology_desc(platform="tpu", topology_name=case.slice).devices)
    check_layout(model_config, mesh)
    model = Model(model_config, jnp.bfloat16)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params,
        param_shardings(model, mesh),
    )
    engine = EngineConfig(
        "abstract",
        max_model_len=case.max_len,
        max_num_seqs=case.num_seqs,
        max_num_batched_tokens=case.tokens,
        num_pages=case.num_pages,
        compilation_cache_dir=False,
    )
    plan = resolve(engine, model_config, jnp.dtype("bfloat16"), mesh)
    in_layers, at_ends = Moved(), Moved()
    weights, scratch, estimate = 0, 0, 0.0
    for stage in plan.stages:
        part = stage.part(params)
        weights = max(weights, parameter_bytes(part))
        programs = StepPrograms(model, plan, stage, part, Programs(EngineMetrics(), None))
        layout, (_, layers) = programs.layout(case.tokens), programs.split(part)
        seen: dict[int, Moved] = {}
        with jax.set_mesh(stage.mesh):
            for number, segment in enumerate(programs.segments):
                program = programs.layers(layout, number)
                if id(program) not in seen:
                    seen[id(program)] = collectives(taken(program.as_text(), case.keys_travel))
                    scratch = max(scratch, program.memory_analysis().temp_size_in_bytes)
                    check_pools(program, plan, segment.pools)
                    check_weights(program, layers[number])
                    check_gathered(program, layers[number], mesh.shape["fsdp"])
                    check_collectives(seen[id(program)], mesh.shape, len(segment.layers), case.keys_travel)
                in_layers.update(seen[id(program)])
                estimate += estimated_seconds(program)
            for program in _ends(programs, layout, case, plan) if with_ends else ():
                at_ends.update(collectives(program.as_text()))
                scratch = max(scratch, program.memory_analysis().temp_size_in_bytes)
                estimate += estimated_seconds(program)
    by_hand = weight_bytes(config, mesh.shape)
    assert abs(weights / by_hand - 1) < 0.05, f"weights {weights} B, by hand {by_hand:.0f} B"
    return Found(
        devices=mesh.size,
        weights=weights,
        weights_by_hand=by_hand,
        cache=plan.kv_cache_bytes // mesh.size,
        scratch=scratch,
        estimate=estimate,
        moved=in_layers + at_ends,
        moved_in_layers=sum(size * count for (_, size), count in in_layers.items()),
        moved_by_hand=moved_bytes(config, mesh.shape, case.tokens, case.keys_travel),
    )


def _ends(programs: StepPrograms, layout: BatchLayout, case: Case, plan: Plan) -> list[Any]:
    """The programs of a stage that are not of its layers."""
    layers = programs.stage.layers
    own = [programs.begin(layout) if layers.start == 0 else programs.resume(layout)]
    if layers.stop == len(plan.layers):
        own += [programs.end(layout), programs.sampler(case.num_seqs)]
    return own


def parameter_bytes(params: Any) -> int:
    """Of one device."""
    return bytes_per_device(params, jax.tree.map(lambda leaf: leaf.sharding, params))


def estimated_seconds(program: Any) -> float:
    """The compiler's estimate of a program that takes less than a second; XLA counts -1 for what it has no idea of."""
    seconds = program.cost_analysis()["optimal_seconds"]
    return seconds - math.floor(seconds)


def check_weights(program: Any, layers: Any) -> None:
    """What the compiled program takes is no less than its device's part of the layers' weights, and not much more."""
    weights = parameter_bytes(layers)
    memory = program.memory_analysis()
    taken = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    assert weights <= taken < 1.05 * weights + 2**24, f"arguments take {taken} B, the weights {weights} B"


def check_gathered(program: Any, layers: Any, fsdp: int) -> None:
    """Of the matrices that devices keep parts of, no more than two layers' are whole at a time."""
    if fsdp > 1:
        layer = max(map(parameter_bytes, layers)) * fsdp
        scratch = program.memory_analysis().temp_size_in_bytes
        assert scratch < 2 * layer + 2**27, f"{scratch} B of scratch, a layer's parameters have {layer} B"


def check_pools(program: Any, plan: Plan, pools: tuple[int, ...]) -> None:
    """The segment's pools are updated where they are: what is aliased is them and the residual stream."""
    owners = {layer.pool: layer for layer in plan.layers}
    arrays = [
        array
        for pool in pools
        for array in jax.tree.leaves(
            owners[pool].backend.abstract_pool(owners[pool].case, plan.num_pages[owners[pool].group])
        )
    ]
    size = sum(array.size * array.dtype.itemsize for array in arrays)
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= size, f"{memory.alias_size_in_bytes} B aliased, the pools have {size} B"


def check_collectives(found: Moved, sizes: Mapping[str, int], num_layers: int, keys_travel: bool) -> None:
    """Two all-reduces a layer under tensor, one (of maxima) where queries travel; nothing gathered but under
    fsdp (weights), expert and context (rows).

    Gathers and scatters of fsdp and expert XLA makes all-reduces of where it takes them for faster.
    """
    number = Counter[str]()
    for (kind, _), count in found.items():
        number[kind] += count
    expected = num_layers * (2 * (sizes["tensor"] > 1) + (sizes["context"] > 1 and not keys_travel))
    if sizes["fsdp"] > 1 or sizes["expert"] > 1:
        assert number["all-reduce"] >= expected, f"{number['all-reduce']} all-reduces, expected {expected} or more"
        return
    assert number["all-reduce"] == expected, f"{number['all-reduce']} all-reduces, expected {expected}"
    gathers = 3 * num_layers * (sizes["context"] > 1)
    assert number["all-gather"] == gathers, f"{number['all-gather']} all-gathers, expected {gathers}"
