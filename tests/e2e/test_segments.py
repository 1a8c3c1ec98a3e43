"""Deep models are cut into segments that share programs, whatever pattern their layers have."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxinfer.config import EngineConfig
from jaxinfer.loading import load_model
from jaxinfer.models.config import LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models.model import Model
from jaxinfer.plan import Plan, resolve
from jaxinfer.runner.segments import segments
from jaxinfer.sharding.mesh import make_mesh
from tests.e2e.harness import GOLDENS, VOCAB_SIZE, Twin, greedy, make_engine, random_prompts, run

FULL = LayerConfig(4, 2, 8, 24, rope=RopeConfig(1e4, 8))
WINDOW = replace(FULL, window=8, rope=RopeConfig(1e3, 8))


def model_of(*layers: LayerConfig, per_layer: int = 0) -> ModelConfig:
    return ModelConfig(
        "llama", VOCAB_SIZE, 32, 96, layers, per_layer_input_dim=per_layer, per_layer_input_vocab=VOCAB_SIZE
    )


def plan_of(*layers: LayerConfig, platform: str = "tpu") -> Plan:
    """As it would be on another platform."""
    config = EngineConfig("x", max_model_len=64, num_pages=20, max_num_seqs=2)
    plan = resolve(config, model_of(*layers), np.dtype("float32"), make_mesh(None))
    return replace(plan, layers=tuple(replace(own, case=replace(own.case, platform=platform)) for own in plan.layers))


def cuts(plan: Plan) -> tuple[list[int], int]:
    """The length of every segment, and the number of different programs."""
    found = segments(plan, range(len(plan.layers)))
    assert [index for segment in found for index in segment.layers] == list(range(len(plan.layers)))
    return [len(segment.layers) for segment in found], len({segment.function for segment in found})


def test_equal_layers_share_one_program() -> None:
    assert cuts(plan_of(*[FULL] * 30)) == ([5] * 6, 1)
    assert cuts(plan_of(*[FULL] * 32)) == ([4] * 8, 1)
    assert cuts(plan_of(*[FULL] * 3)) == ([3], 1)


def test_segments_are_shorter_on_a_cpu() -> None:
    assert cuts(plan_of(*[FULL] * 30, platform="cpu")) == ([2] * 15, 1)
    assert cuts(plan_of(*[FULL] * 5, platform="cpu")) == ([5], 1)
    assert cuts(plan_of(*[FULL] * 2, platform="cpu")) == ([2], 1)
    assert cuts(plan_of(*[WINDOW, FULL] * 8, platform="cpu")) == ([2] * 8, 1)


def test_a_pattern_is_cut_where_it_repeats() -> None:
    assert cuts(plan_of(*[*[WINDOW] * 5, FULL] * 5)) == ([6] * 5, 1)
    assert cuts(plan_of(*[WINDOW, FULL] * 8)) == ([4] * 4, 1)


def test_layers_that_differ_are_told_apart() -> None:
    reader = replace(FULL, kv_source=3)
    assert cuts(plan_of(*[FULL] * 4, *[reader] * 12)) == ([4] * 4, 2)
    assert cuts(plan_of(*[FULL] * 4, *[replace(FULL, ffn_dim=32)] * 12)) == ([4] * 4, 2)


@pytest.mark.slow
def test_a_deep_model_equals_its_forward() -> None:
    """17 layers in segments of several kinds: rings, full attention, keys read across segments, per-layer inputs."""
    owners = [WINDOW, WINDOW, FULL] * 4
    readers = [replace(WINDOW, kv_source=10), replace(WINDOW, kv_source=10), replace(FULL, kv_source=11)]
    config = model_of(*owners, *readers, *readers[:2], per_layer=8)
    model = Model(config)
    loaded = replace(load_model(GOLDENS / "llama3_gqa"), model=model, params=model.init_params(3))
    engine = make_engine(loaded, num_pages=60)
    found = segments(engine.plan, range(17))
    assert len(found) > len({segment.function for segment in found}) > 1
    assert any(set(a.pools) & set(b.pools) for a, b in itertools.pairwise(found)), "no pool is shared"
    twin = Twin(loaded, 96)
    for output in run(engine, random_prompts(5, 30, 3, 19), greedy(20, logprobs=2)):
        twin.check(output)
