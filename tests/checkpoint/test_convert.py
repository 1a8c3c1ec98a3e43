"""Conversion both ways: every family's checkpoint comes back tensor by tensor, and nothing half done is left behind."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint import export
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.orbax import is_orbax, load_orbax
from jaxinfer.checkpoint.reader import CheckpointReader
from jaxinfer.convert import appearing_whole, check_output, convert, main
from jaxinfer.models.model import Model
from jaxinfer.models.registry import resolve
from tests.sharding.run_on_devices import run_on_devices

GOLDENS = sorted(path.parent for path in (Path(__file__).parents[1] / "conformance" / "goldens").glob("*/config.json"))
PACKED = next(path for path in GOLDENS if path.name == "gpt_oss_mxfp4")
LLAMA = next(path for path in GOLDENS if path.name == "llama3_gqa")


def load(directory: Path) -> tuple[Model, dict[str, Any]]:
    family, config = resolve(json.loads((directory / "config.json").read_text()))
    model = Model(config)
    if is_orbax(directory):
        return model, load_orbax(directory, model.abstract_params)
    with CheckpointReader(directory) as reader:
        return model, load_params(reader, model.abstract_params, family, config)


def test_a_score_bias_is_not_rounded() -> None:
    """It alone is float32 in a bfloat16 model: near ties decide which experts are chosen."""
    directory = next(path for path in GOLDENS if path.name == "deepseek_v3")
    family, config = resolve(json.loads((directory / "config.json").read_text()))
    model = Model(config, jnp.bfloat16)
    with CheckpointReader(directory) as reader:
        params = load_params(reader, model.abstract_params, family, config)
    assert {path for path, leaf in by_path(params).items() if leaf.dtype != jnp.bfloat16} == {
        f"layers/{index}/mlp/router/score_bias" for index, layer in enumerate(config.layers) if layer.experts
    }


def test_a_head_beside_a_tied_embedding(tmp_path: Path) -> None:
    """The same numbers twice are one parameter; a head of its own is not dropped unseen."""
    source = tmp_path / "source"
    shutil.copytree(LLAMA, source)
    embed = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    for shift, target in ((0.0, "same"), (1e-3, "other")):
        head = embed.copy()
        head[-1, -1] += shift
        tensors = load_file(source / "model.safetensors") | {"lm_head.weight": head}
        save_file(tensors, source / "model.safetensors")
        if not shift:
            convert(source, tmp_path / target)
            continue
        with pytest.raises(ValueError, match=r"'lm_head\.weight' is not the same as 'model\.embed_tokens\.weight'"):
            convert(source, tmp_path / target)


def by_path(params: dict[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def stored_tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint that its model uses, under the names its family gives them."""
    family, config = resolve(json.loads((directory / "config.json").read_text()))
    shapes = {path: leaf.shape for path, leaf in by_path(Model(config).abstract_params).items()}
    with CheckpointReader(directory) as reader:
        there = family.find_sources(config, reader.tensors)
        tensors: dict[str, np.ndarray] = {}
        for path, source in family.sources(config).items():
            size = math.prod(shapes[path][:1])
            names = zip(source.names(size), there[path].names(size), strict=True)
            tensors.update({name: reader.read(stored) for name, stored in names})
        return tensors


@pytest.mark.parametrize("directory", [path for path in GOLDENS if path != PACKED], ids=lambda path: path.name)
def test_safetensors_come_back_tensor_by_tensor(directory: Path, tmp_path: Path) -> None:
    """What is written has the names, shapes, dtypes and numbers of what was read, for every family."""
    convert(directory, tmp_path / "out", to="safetensors")
    written, expected = load_file(tmp_path / "out" / "model.safetensors"), stored_tensors(directory)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert written[name].dtype == value.dtype
        np.testing.assert_array_equal(written[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["llama3_gqa", "gpt_bigcode_mha", "gpt_bigcode_mqa", "phi3", "gemma4_e", "gpt_oss"])
def test_orbax_and_back(name: str, tmp_path: Path) -> None:
    """Through Orbax and back nothing changes, fused tensors and configs included; the Orbax directory stands alone."""
    directory = next(path for path in GOLDENS if path.name == name)
    source = shutil.copytree(directory, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    convert(source, tmp_path / "orbax")
    assert is_orbax(tmp_path / "orbax")
    assert (tmp_path / "orbax" / "tokenizer.json").read_text() == "{}"
    shutil.rmtree(source)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "orbax")[1], load(directory)[1])
    convert(tmp_path / "orbax", tmp_path / "back")
    written, expected = load_file(tmp_path / "back" / "model.safetensors"), stored_tensors(directory)
    assert written.keys() == expected.keys()
    for tensor, value in expected.items():
        np.testing.assert_array_equal(written[tensor], value, err_msg=tensor)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_what_was_packed_is_written_unpacked(tmp_path: Path, to: str) -> None:
    """MXFP4 numbers are exact in bfloat16, and the config no longer calls them packed."""
    convert(PACKED, tmp_path / "out", to=to)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = load(PACKED)[1], load(tmp_path / "out")[1]
    jax.tree.map(np.testing.assert_array_equal, after, before)
    if to == "safetensors":
        written = load_file(tmp_path / "out" / "model.safetensors")
        weight = written["model.layers.0.mlp.experts.gate_up_proj"]  # [E, D, 2F], gate and up in turns
        assert weight.dtype == ml_dtypes.bfloat16
        gate = before["layers"]["0"]["mlp"]["experts"]["gate"]["weight"]
        np.testing.assert_array_equal(weight[:, :, 0::2], gate)


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_dtype(tmp_path: Path, to: str) -> None:
    """Weights and config say the new dtype, from either format to either."""
    convert(LLAMA, tmp_path / "first", to=to, dtype="bfloat16")
    convert(tmp_path / "first", tmp_path / "second", dtype="float16")
    convert(tmp_path / "second", tmp_path / "third", to="orbax" if is_orbax(tmp_path / "second") else "safetensors")
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float16), load(LLAMA)[1])
    for directory in ("second", "third"):
        config = json.loads((tmp_path / directory / "config.json").read_text())
        assert config.get("dtype", config.get("torch_dtype")) == "float16"
        jax.tree.map(np.testing.assert_array_equal, load(tmp_path / directory)[1], expected)


def test_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards and batches say the same as one file, and the library that owns the format reads each of them."""
    _, before = load(LLAMA)
    size = sum(file.stat().st_size for file in LLAMA.glob("*.safetensors"))
    monkeypatch.setattr(export, "_BATCH_BYTES", size // 30)
    monkeypatch.setattr(export.export_safetensors, "__defaults__", (size // 4,))
    convert(LLAMA, tmp_path / "out", to="safetensors")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    with safe_open(files[0], "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], before)


def test_bfloat16_numbers_round_to_nearest(tmp_path: Path) -> None:
    convert(LLAMA, tmp_path / "out", to="safetensors", dtype="bfloat16")
    with CheckpointReader(tmp_path / "out") as reader:
        for name, value in stored_tensors(LLAMA).items():
            np.testing.assert_array_equal(reader.read(name), value.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source, target: (target.mkdir(), (target / "x").touch()), "is not empty; give a new directory"),
        (lambda source, target: target.touch(), "is a file; give a new directory"),
        (lambda source, target: (source / "config.json").unlink(), "has no config.json"),
        (lambda source, target: (source / "model.safetensors").write_bytes(b"x"), "is cut short"),
        (lambda source, target: (source / "model.safetensors").unlink(), "holds no weights"),
        (lambda source, target: shutil.rmtree(source), "no such directory"),
    ],
)
@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, message: str, to: str) -> None:
    """One line and exit status 2; what was there stays as it was, and nothing new appears."""
    source, target = shutil.copytree(LLAMA, tmp_path / "source"), tmp_path / "target"
    spoil(source, target)
    before = sorted(tmp_path.iterdir())
    assert main(["--input", str(source), "--output", str(target), "--to", to]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_output_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "inside", Path("/proc/nowhere/out")):
        with pytest.raises(ValueError, match=r"cannot be (used|written)") as error:
            convert(LLAMA, output)
        assert "\n" not in str(error.value)
    check_output(tmp_path / "new")


FULL_DISK = """
import resource, sys
sys.dont_write_bytecode = True  # Python would keep what it could write of a module's bytecode, and fail ever after
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
import contextlib, io
from jaxinfer.convert import main
with contextlib.redirect_stderr(io.StringIO()) as errors:
    status = main(["--input", {source!r}, "--output", {target!r}, "--to", {to!r}])
print(status)
print(errors.getvalue().splitlines()[-1])
"""


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_no_room(tmp_path: Path, to: str) -> None:
    """Files that cannot grow (a limit stands in for a full disk): exit status 2, and nothing is left behind."""
    target = tmp_path / "target"
    status, error = run_on_devices(FULL_DISK.format(source=str(LLAMA), target=str(target), to=to)).splitlines()[-2:]
    assert status == "2"
    assert "File too large" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_no_room_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"has 0\.00 GB free and the weights take 0\.00 GB; free some space"):
        convert(LLAMA, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import threading, time
from jaxinfer import convert
from jaxinfer.checkpoint import export

def memory():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

convert.convert({warm!r}, {target!r} + "-warm", to={to!r})
export._BATCH_BYTES = 4_000_000
before, peak, running = memory(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, memory())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
convert.convert({source!r}, {target!r}, to={to!r}, dtype="bfloat16")
running = False
thread.join()
print((peak - before) / 1e6)
"""


def test_memory_stays_at_a_few_tensors(tmp_path: Path) -> None:
    """A checkpoint of 54 MB becomes safetensors of another dtype with half of that in memory."""
    config = json.loads((LLAMA / "config.json").read_text())
    config |= {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 4096, "num_hidden_layers": 3}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    family, model_config = resolve(config)
    model = Model(model_config)
    axes = jax.tree.leaves(model.logical_axes, is_leaf=lambda node: isinstance(node, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(model.abstract_params)
    params = {
        jax.tree_util.keystr(path, simple=True, separator="/"): export.Param(
            leaf.shape, leaf_axes, np.dtype(np.float32)
        )
        for (path, leaf), leaf_axes in zip(leaves, axes, strict=True)
    }

    def read(paths: list[str]) -> dict[str, np.ndarray]:
        return {path: np.ones(params[path].shape, np.float32) for path in paths}

    assert export.export_safetensors(source, params, family.sources(model_config), read) > 50e6
    code = MEMORY.format(warm=str(LLAMA), source=str(source), target=str(tmp_path / "out"), to="safetensors")
    assert float(run_on_devices(code)) < 27


def test_late_writers(tmp_path: Path) -> None:
    """A thread of the failed writer that makes its directory anew, after it was deleted, leaves nothing behind."""

    def write_late(file: Path) -> None:
        for _ in range(5):
            time.sleep(0.06)
            with contextlib.suppress(FileNotFoundError):  # deleted in between
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"late")

    def fail_half_way(threads: list[threading.Thread]) -> None:
        with appearing_whole(tmp_path / "out") as partial:
            (partial / "config.json").write_text("{}")
            threads.append(threading.Thread(target=write_late, args=(partial / "params" / "d",)))
            threads[0].start()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    threads: list[threading.Thread] = []
    with pytest.raises(ValueError, match="No space left on device"):
        fail_half_way(threads)
    threads[0].join()
    assert list(tmp_path.iterdir()) == []


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C half way leaves nothing; an empty directory that was there stays."""
    output = tmp_path / "out"
    output.mkdir()

    def interrupted_half_way() -> None:
        with appearing_whole(output) as partial:
            (partial / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_half_way()
    assert list(tmp_path.iterdir()) == [output]
    assert list(output.iterdir()) == []
    convert(LLAMA, output)
    assert is_orbax(output)
