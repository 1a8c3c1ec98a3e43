"""A model with quantized weights is the model of the numbers that they stand for, wherever they came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.quantize import before, is_quantized
from jaxinfer.convert import convert
from jaxinfer.loading import LoadedModel, load_model
from jaxinfer.models.layout import bytes_per_device
from jaxinfer.models.model import Model
from jaxinfer.models.registry import resolve
from jaxinfer.ops.quantized_matmul import Quantized, dequantize
from jaxinfer.quantization import BY_NAME, num_bytes
from jaxinfer.sharding.rules import param_shardings
from tests.sharding.run_on_devices import run_on_devices
from tests.sharding.test_rules import mesh

GOLDENS = Path(__file__).parents[1] / "conformance" / "goldens"
TOKENS = jnp.arange(3, 20)


def compiled(function: Any) -> Any:
    """Quickly, to code that is slow."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options)


def numbers_of(params: Any) -> Any:
    def numbers(node: Any) -> Any:
        return dequantize(Quantized(**node), jnp.float32) if is_quantized(node) else node

    return jax.tree.map(numbers, params, is_leaf=is_quantized)


def weights(params: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


CASES = [
    ("llama3_gqa", "int8"),
    pytest.param("qwen2_moe", "int4", marks=pytest.mark.slow),  # experts beside a shared one
    pytest.param("llama3_gqa", "int4", marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "int8", marks=pytest.mark.slow),  # latent attention
    pytest.param("gpt_oss_mxfp4", "int4", marks=pytest.mark.slow),  # experts with biases, which are packed
    pytest.param("gemma4_e", "int8", marks=pytest.mark.slow),  # inputs of every layer's own, keys of other layers
]


@pytest.mark.parametrize(("golden", "quantization"), CASES)
def test_it_is_the_model_of_the_numbers_its_weights_stand_for(golden: str, quantization: str) -> None:
    plain, loaded = load_model(GOLDENS / golden), load_model(GOLDENS / golden, quantization=quantization)
    numbers = numbers_of(loaded.params)
    assert jax.tree.structure(numbers) == jax.tree.structure(plain.params)
    want = compiled(plain.forward)(numbers, TOKENS)
    model, params = loaded.serving_form()
    np.testing.assert_allclose(compiled(model.forward)(params, TOKENS), want, atol=2e-4, rtol=2e-4)
    for path, leaf in weights(loaded.params).items():
        number, wanted = weights(numbers)[path], weights(plain.params)[path]
        step = 2.0 * np.abs(wanted).max() / (2 ** BY_NAME[quantization].bits - 2)
        error = np.abs(number - wanted).max()
        assert (1e-4 * step < error <= 0.51 * step) if is_quantized(leaf) else error == 0, path


def test_which_weights_are_quantized() -> None:
    """The projections of layers, and nothing else."""
    for golden in ("qwen2_moe", "deepseek_v3"):
        _, config = resolve(json.loads((GOLDENS / golden / "config.json").read_text()))
        params = Model(replace(config, quantization=BY_NAME["int8"])).abstract_params
        plain = {path for path, leaf in weights(params).items() if not is_quantized(leaf)}
        projections = {"q", "k", "v", "o", "q_down", "kv_down", "gate", "up", "down"}
        for path in weights(params):
            *_, module, leaf = path.split("/")
            assert (path not in plain) == (module in projections and leaf == "weight"), path
        assert any("router" in path for path in plain)


@pytest.mark.parametrize("quantization", BY_NAME)
def test_bytes_of_the_parameters(quantization: str) -> None:
    """As many as devices give them: two int4 share a byte."""
    loaded = load_model(GOLDENS / "qwen3_moe", quantization=quantization)
    of_values = of_scales = 0
    for leaf in filter(is_quantized, weights(loaded.params).values()):
        of_values += leaf["values"].on_device_size_in_bytes()
        of_scales += leaf["scales"].on_device_size_in_bytes()
        assert leaf["values"].on_device_size_in_bytes() == leaf["values"].size * BY_NAME[quantization].bits // 8
    plain = before(loaded.model.abstract_params)
    unquantized = num_bytes(jax.tree.leaves(plain)) - 4 * of_values * 8 // BY_NAME[quantization].bits
    everything = unquantized + of_values + of_scales
    assert num_bytes(jax.tree.leaves(loaded.params)) == everything
    assert bytes_per_device(loaded.model.abstract_params, loaded.shardings) == everything


def assert_same(one: LoadedModel, other: LoadedModel) -> None:
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_through_orbax(tmp_path: Path) -> None:
    """Quantized before or after, the weights are the same; what is quantized says so by itself."""
    directory, quantization, other = GOLDENS / "qwen2", "int4", "int8"
    wanted = load_model(directory, quantization=quantization)
    convert(directory, tmp_path / "plain")
    assert_same(load_model(tmp_path / "plain", quantization=quantization), wanted)
    convert(tmp_path / "plain", tmp_path / "quantized", dtype="float32", quantization=quantization, to="orbax")
    assert_same(load_model(tmp_path / "quantized"), wanted)
    convert(tmp_path / "quantized", tmp_path / "again")  # to Orbax, which alone keeps it
    assert_same(load_model(tmp_path / "again", quantization=quantization), wanted)

    with pytest.raises(ValueError, match=rf"quantization='{other}': .* are {quantization} already"):
        load_model(tmp_path / "quantized", quantization=other)
    with pytest.raises(ValueError, match="kept by orbax alone"):
        convert(tmp_path / "quantized", tmp_path / "back", to="safetensors")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (tmp_path / "again" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"jaxinfer has bits=3, group_size=.*; read are 4 or 8 bits"):
        load_model(tmp_path / "again")


def test_unknown_quantization() -> None:
    with pytest.raises(ValueError, match="quantization='int2' is not supported; use one of int8, int4, or leave it"):
        load_model(GOLDENS / "llama3_gqa", quantization="int2")


@pytest.mark.slow
@pytest.mark.parametrize(("golden", "quantization"), [("llama3_gqa", "int8"), ("qwen3_moe", "int4")])
def test_every_layout_rounds_alike_and_gives_the_tokens_of_one_device(
    tmp_path: Path, golden: str, quantization: str
) -> None:
    source, target = str(GOLDENS / golden), str(tmp_path / golden)
    code = f"""
import jax, numpy as np, pytest
from jaxinfer.engine import Engine
from jaxinfer.config import EngineConfig
from jaxinfer.convert import convert
from jaxinfer.loading import load_model
from tests.e2e.harness import add, few_programs, finish, greedy, random_prompts
jax.config.update("jax_disable_most_optimizations", True)
few_programs(pytest.MonkeyPatch(), (16,))
answers = []
for mesh in (None, "tensor=2", "fsdp=2", "stage=2", "data=2,tensor=2"):
    sizes = dict(max_model_len=48, page_size=4, max_num_seqs=4, max_num_batched_tokens=16, num_pages=40)
    config = EngineConfig({source!r}, mesh=mesh, quantization={quantization!r}, compilation_cache_dir=False, **sizes)
    engine = Engine(config)
    names = [add(engine, prompt, greedy(12)) for prompt in random_prompts(11, 5, 15, 7)]
    outputs = finish(engine)
    answers.append([outputs[name].outputs[0].token_ids for name in names])
    params = jax.tree.map(np.asarray, engine.loaded.params)
    first = params if mesh is None else first
    jax.tree.map(np.testing.assert_array_equal, params, first)
print(len(answers), all(answer == answers[0] for answer in answers))
convert({source!r}, {target!r}, dtype="float32", quantization={quantization!r})
spread = load_model({target!r}, mesh="tensor=2,fsdp=2").params
jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), other), spread, first)
"""
    assert run_on_devices(code, 4).splitlines()[-1] == "5 True"


def test_groups_that_a_mesh_would_cut_apart_are_refused() -> None:
    _, config = resolve(json.loads((GOLDENS / "qwen2" / "config.json").read_text()))
    model = Model(replace(config, quantization=BY_NAME["int4"]))
    param_shardings(model.abstract_params, model.logical_axes, mesh(fsdp=2))
    with pytest.raises(ValueError, match="mlp/down/weight/scales: ffn=3 is not a multiple of mesh axis tensor=2; use"):
        param_shardings(model.abstract_params, model.logical_axes, mesh(tensor=2))
