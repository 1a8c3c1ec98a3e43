"""Cutting a deep model into stretches of layers that share one program.

Compiling takes time in proportion to the layers of a program, sending in proportion to the number of programs of a
step. Layers repeat, one by one or in a pattern, so a few of them compiled once and sent several times cost little of
both. On CPU a program that is loaded keeps some 5 MiB for each of its layers, and sending takes less of a step: there
they are shorter.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from jaxinfer.ops.paged_attention import AttentionCase
from jaxinfer.plan import Plan

_LENGTHS, _LENGTHS_ON_CPU = range(4, 9), range(2, 9)
_PROGRAM = 3  # layers that take as long to compile as what else a program has


@dataclass(frozen=True)
class Segment:
    """Consecutive layers of a stage. pools: the pools they read or write. kinds: what their attention is prepared for.

    function: equal for two segments that are the same function of their layers' parameters and pools.
    """

    layers: tuple[int, ...]
    pools: tuple[int, ...]
    kinds: tuple[int, ...]
    function: Hashable


def attention_kinds(plan: Plan) -> tuple[tuple[AttentionCase, int], ...]:
    """The different (case, KV group) of a model's layers: what a batch is prepared for, once each."""
    return tuple(dict.fromkeys((layer.case, layer.group) for layer in plan.layers))


def segments(plan: Plan, layers: range) -> tuple[Segment, ...]:
    """A stage's layers, in order, in segments of the length for which the least is compiled."""
    on_cpu = plan.layers[0].case.platform == "cpu"
    cuts = [_cut(plan, layers, length) for length in (_LENGTHS_ON_CPU if on_cpu else _LENGTHS)]
    return min(cuts, key=lambda cut: (_compiled(cut), len(cut)))


def _compiled(cut: tuple[Segment, ...]) -> int:
    """What compiling the segments' programs costs, in layers."""
    return sum(_PROGRAM + len(layers) for layers in _distinct(cut).values())


def _distinct(cut: tuple[Segment, ...]) -> dict[Hashable, tuple[int, ...]]:
    return {segment.function: segment.layers for segment in cut}


def _cut(plan: Plan, layers: range, length: int) -> tuple[Segment, ...]:
    return tuple(_segment(plan, tuple(layers[first : first + length])) for first in range(0, len(layers), length))


def _segment(plan: Plan, layers: tuple[int, ...]) -> Segment:
    pools = tuple(dict.fromkeys(plan.layers[index].pool for index in layers))
    kinds = attention_kinds(plan)
    own_kinds = tuple(dict.fromkeys(kinds.index((plan.layers[i].case, plan.layers[i].group)) for i in layers))
    functions = []
    for index in layers:
        config, attention = plan.model.layers[index], plan.layers[index]
        shape = replace(config, kv_source=None), config.kv_source is None
        functions.append((shape, replace(attention, pool=pools.index(attention.pool))))
    return Segment(layers, pools, own_kinds, tuple(functions))
