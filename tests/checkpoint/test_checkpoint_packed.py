"""Packed checkpoints of compressed-tensors, written here as their format is described: read number by number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint.packed import PackedReader
from jaxinfer.checkpoint.quantize import is_quantized
from jaxinfer.convert import convert
from jaxinfer.loading import load_model
from jaxinfer.models.registry import resolve
from tests.models.test_quantized import GOLDENS, assert_same, numbers_of, weights

# Heads of 8, of which two share a group; a scale for each output; experts.
CASES = [("qwen2", 4, 16), ("qwen2", 8, None), ("qwen3_moe", 4, 8)]
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "block_sparse_moe.gate.", "shared_expert_gate")


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """[out, in] to int32 words, the first number in the lowest bits."""
    in_word = 32 // bits
    codes = (values.astype(np.int64) + 2 ** (bits - 1)).reshape(len(values), -1, in_word)
    return (codes << np.arange(in_word) * bits).sum(-1).astype(np.uint32).view(np.int32)


def scheme(bits: int, group_size: int | None, **changes: Any) -> dict[str, Any]:
    strategy = "channel" if group_size is None else "group"
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    written = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    for place in (weights, group, written):
        place |= {key: value for key, value in changes.items() if key in place}
    return written


def write(golden: str, directory: Path, bits: int, group_size: int | None) -> dict[str, np.ndarray]:
    """A packed checkpoint of random numbers, shaped as a golden one; returns the numbers its weights stand for."""
    shutil.copytree(GOLDENS / golden, directory)
    rng = np.random.default_rng(bits)
    tensors, numbers = {}, {}
    for name, value in load_file(directory / "model.safetensors").items():
        if value.ndim != 2 or any(kept in name for kept in KEPT):
            tensors[name] = value
            continue
        values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), value.shape)
        num_groups = 1 if group_size is None else value.shape[1] // group_size
        scales = rng.uniform(0.01, 0.02, (len(value), num_groups)).astype(np.float32)
        tensors[f"{name}_packed"] = pack(values, bits)
        tensors[f"{name}_scale"] = scales
        tensors[f"{name}_shape"] = np.array(value.shape, np.int64)
        numbers[name] = (values * np.repeat(scales, value.shape[1] // num_groups, axis=1)).astype(np.float32)
    save_file(tensors, directory / "model.safetensors")
    change_config(directory, scheme(bits, group_size))
    return numbers


def change_config(directory: Path, quantization_config: dict[str, Any]) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))


@pytest.mark.parametrize(("golden", "bits", "group_size"), CASES)
def test_weights_are_the_numbers_that_were_packed(
    golden: str, bits: int, group_size: int | None, tmp_path: Path
) -> None:
    expected = write(golden, tmp_path / "packed", bits, group_size)
    loaded = load_model(tmp_path / "packed")
    assert loaded.config.quantization is not None
    assert (loaded.config.quantization.bits, loaded.config.quantization.group_size) == (bits, group_size)
    family, config = resolve(json.loads((GOLDENS / golden / "config.json").read_text()))
    numbers, num_read = weights(numbers_of(loaded.params)), 0
    for path, leaf in weights(loaded.params).items():
        if is_quantized(leaf):
            source = family.sources(config)[path]
            names = source.names(leaf["values"].shape[0])
            want = [expected[name].T if source.transpose else expected[name] for name in names]
            shape = leaf["values"].shape
            np.testing.assert_allclose(numbers[path], np.stack(want).reshape(shape), rtol=1e-6, err_msg=path)
            num_read += len(names)
    assert num_read == len(expected)

    if golden == "qwen3_moe":
        convert(tmp_path / "packed", tmp_path / "orbax")
        assert_same(load_model(tmp_path / "orbax"), loaded)


REFUSED = {
    "format": ("naive-quantized", "format='naive-quantized', and read is only 'pack-quantized'"),
    "symmetric": (False, "symmetric=False"),
    "type": ("float", "type='float'"),
    "num_bits": (3, "bits=3"),
    "strategy": ("tensor", "strategy='tensor', and read is only 'channel' or 'group'"),
    "input_activations": ({"num_bits": 8}, "input_activations="),
    "kv_cache_scheme": ({"num_bits": 8}, "kv_cache_scheme="),
    "targets": (["re:.*down_proj"], "targets="),
}


def test_other_schemes_are_refused_by_name() -> None:
    config = json.loads((GOLDENS / "qwen2" / "config.json").read_text())
    for key, (value, message) in REFUSED.items():
        with pytest.raises(ValueError, match=message) as caught:
            resolve(config | {"quantization_config": scheme(4, 16, **{key: value})})
        assert "\n" not in str(caught.value)


def test_other_methods_are_refused_with_those_that_are_read() -> None:
    config = json.loads((GOLDENS / "qwen2" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"awq.*that are read: .*compressed-tensors of packed weights"):
        resolve(config | {"quantization_config": {"quant_method": "awq"}})


def test_what_is_packed_only_in_part_is_refused(tmp_path: Path) -> None:
    write("qwen2", tmp_path / "packed", 4, 16)
    file = tmp_path / "packed" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.down_proj.weight"
    plain = load_file(GOLDENS / "qwen2" / "model.safetensors")
    some = {key: value for key, value in tensors.items() if not key.startswith(name)}
    save_file({**some, name: plain[name]}, file)
    with pytest.raises(ValueError, match=f"tensor '{name}' is not quantized; read are checkpoints in which"):
        load_model(tmp_path / "packed")
    save_file({key: value for key, value in tensors.items() if key != f"{name}_scale"}, file)
    with pytest.raises(ValueError, match=f"lacks 1 of .*'{name}_scale'"):
        load_model(tmp_path / "packed")
    save_file({**tensors, f"{name}_packed": tensors[f"{name}_packed"].astype(np.int64)}, file)
    with pytest.raises(ValueError, match="packed weights are matrices of int32"):
        load_model(tmp_path / "packed")
    save_file(plain, file)
    with pytest.raises(ValueError, match="says that weights are packed, and none is"):
        load_model(tmp_path / "packed")


def test_parts_of_a_packed_tensor(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(-8, 8, (6, 16))
    save_file({"w.weight_packed": pack(numbers, 4)}, tmp_path / "model.safetensors")
    with PackedReader(tmp_path, 4) as reader:
        np.testing.assert_array_equal(reader.read("w.weight"), numbers)
        np.testing.assert_array_equal(reader.read("w.weight", (2, 5)), numbers[2:5])
