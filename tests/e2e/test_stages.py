"""An engine over stages: several batches in flight, and what interrupts them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.sharding.run_on_devices import run_on_devices

LANES = """
import jax, pytest
jax.config.update("jax_disable_most_optimizations", True)
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.loading import load_model
from tests.e2e.harness import GOLDENS, add, few_programs, finish, greedy, num_pages_held, random_prompts, run, step

directory = str(GOLDENS / "gemma2")
sizes = dict(max_model_len=64, page_size=4, max_num_seqs=2, max_num_batched_tokens=16, num_pages=40)
prompts = random_prompts(3, 30, 5, 19, 9)
with pytest.MonkeyPatch.context() as patch:
    few_programs(patch, (16,))
    alone = Engine(EngineConfig(directory, compilation_cache_dir=False, **sizes))
    engine = Engine(EngineConfig(directory, mesh="stage=2", compilation_cache_dir=False, **sizes))

def tokens(engine, count=4):
    return [output.outputs[0].token_ids for output in run(engine, prompts[:count], greedy(12))]

def busy():
    names = [add(engine, prompt, greedy(12)) for prompt in prompts]
    for _ in range(5):
        step(engine)
    assert all(pending is not None for pending in engine._in_flight)
    return names

want = tokens(alone)
assert engine.plan.num_slots == 2 * alone.plan.num_slots
assert engine.plan.kv_cache_bytes == 2 * alone.plan.kv_cache_bytes
assert engine.plan.kv_cache_bytes == sum(pool.nbytes for lane in engine.runner._lanes for pool in lane.pools)
devices = jax.devices()
for index, layer in engine.loaded.params["layers"].items():
    stage = [int(index) in stage.layers for stage in engine.plan.stages].index(True)
    assert all(leaf.devices() == {devices[stage]} for leaf in jax.tree.leaves(layer)), index
    assert all(lane.pools[int(index)].devices() == {devices[stage]} for lane in engine.runner._lanes)

# One request leaves a lane without work.
assert tokens(engine, 1) == want[:1]

# Aborted requests leave those of both lanes undisturbed.
names = busy()
for name in names[1:3]:
    assert engine.abort(name).outputs[0].finish_reason == "abort"
done = finish(engine)
assert [done[name].outputs[0].token_ids for name in (names[0], names[3])] == [want[0], want[3]]
assert num_pages_held(engine) == 0

# A step that fails ends the requests of both lanes, and the engine goes on.
busy()
send = engine.runner.send
def fail(plan):
    send(plan)
    raise RuntimeError("no more")
engine.runner.send = fail
outputs = [state.output for state in engine._requests.values()]
with pytest.raises(RuntimeError, match="no more"):
    engine.step()
engine.runner.send = send
assert len(outputs) == 4 and all(output.error == "the engine failed: RuntimeError: no more" for output in outputs)
assert not engine.has_unfinished() and engine.step() == []
assert tokens(engine) == want

# New weights reach all stages, the second copy of tied embeddings included.
for name in busy():
    engine.abort(name)
other = jax.tree.map(lambda leaf: leaf * 1.5, alone.loaded.params)
engine.update_params(other)
alone.update_params(other)
swapped = tokens(alone)
assert tokens(engine) == swapped != want

for call in (lambda: engine.loaded.forward(other, [1]), lambda: engine.loaded.make_cache(1, 8)):
    with pytest.raises(ValueError, match="mesh axis stage=2: one program can not hold a model that is in stages"):
        call()

with pytest.MonkeyPatch.context() as patch:
    patch.setattr("jaxinfer.models.layout.memory_limit", lambda mesh: 2**14)
    with pytest.raises(ValueError, match="GiB on a device of the fullest stage of mesh"):
        load_model(directory, mesh="stage=2")
print("done")
"""


def test_lanes_are_as_good_as_one_and_survive_what_interrupts_them() -> None:
    assert run_on_devices(LANES, 2).split() == ["done"]


FOUR = """
import jax, json, pathlib, pytest
jax.config.update("jax_disable_most_optimizations", True)
import numpy as np
from jaxinfer.checkpoint.orbax import save_orbax
from jaxinfer.config import EngineConfig
from jaxinfer.engine import Engine
from jaxinfer.loading import load_model
from jaxinfer.models.model import Model
from jaxinfer.models.registry import resolve
from jaxinfer.models.stages import param_shardings
from jaxinfer.sharding.mesh import make_mesh
from tests.e2e.harness import GOLDENS, few_programs, greedy, random_prompts, run

directory = pathlib.Path({directory!r})
config = json.loads((GOLDENS / "llama3_gqa" / "config.json").read_text()) | dict(num_hidden_layers=6)
(directory / "config.json").write_text(json.dumps(config))
model = Model(resolve(config)[1])
saved = jax.device_put(model.init_params(3), param_shardings(model, make_mesh("fsdp=2,tensor=2")))
save_orbax(directory, saved)
sizes = dict(max_model_len=64, page_size=4, max_num_seqs=2, max_num_batched_tokens=16, num_pages=40)
prompts = random_prompts(3, 30, 5, 19, 9, 12)

def engine(mesh):
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch, (16,))
        return Engine(EngineConfig(str(directory), mesh=mesh, compilation_cache_dir={directory!r} + "/kept", **sizes))

def tokens(engine):
    return [output.outputs[0].token_ids for output in run(engine, prompts, greedy(12))]

want = tokens(engine(None))
for mesh in ("stage=4,context=2", "stage=4,tensor=2"):
    first = engine(mesh)
    assert [len(stage.layers) for stage in first.plan.stages] == [1, 2, 2, 1]
    jax.tree.map(np.testing.assert_array_equal, first.loaded.params, saved)
    assert jax.tree.map(lambda leaf: leaf.sharding, first.loaded.params) == first.loaded.shardings
    assert tokens(first) == want, mesh
second = engine("stage=4,tensor=2")
assert tokens(second) == want
started, again = first.stats(), second.stats()
assert started.num_programs_compiled and not started.num_programs_loaded
assert (again.num_programs_compiled, again.num_programs_loaded) == (0, started.num_programs_compiled)
print("done")
"""


@pytest.mark.slow
def test_four_stages_from_orbax_and_from_kept_programs(tmp_path: Path) -> None:
    """Restored from another layout than it was saved in; the second start compiles nothing."""
    assert run_on_devices(FOUR.format(directory=str(tmp_path)), 8).split() == ["done"]
