"""The safetensors reader: the same numbers as the library that owns the format, and one clear line for damage."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint import reader as reader_module
from jaxinfer.checkpoint.hub import resolve_model_dir
from jaxinfer.checkpoint.reader import CheckpointReader


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((7, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((300, 11)).astype(ml_dtypes.bfloat16),
        "c.scale": rng.standard_normal(3).astype(np.float16),
        "d.ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "e.scalar": np.array(2.5, np.float32),
    }


def save_sharded(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> None:
    for file, part in shards.items():
        save_file(part, directory / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (directory / reader_module.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_reads_what_the_library_wrote(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        assert set(reader.tensors) == set(tensors)
        assert reader.nbytes == sum(value.nbytes for value in tensors.values())
        for name, value in load_file(tmp_path / "model.safetensors").items():
            assert reader.tensors[name].shape == value.shape
            got = reader.read(name)
            assert got.dtype == value.dtype
            np.testing.assert_array_equal(got, value)
        np.testing.assert_array_equal(reader.read("b.weight", (5, 17)), tensors["b.weight"][5:17])


def test_reads_shards(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    names = list(tensors)
    first, second = ({name: tensors[name] for name in part} for part in (names[:2], names[2:]))
    save_sharded(tmp_path, {"model-1-of-2.safetensors": first, "model-2-of-2.safetensors": second})
    with CheckpointReader(tmp_path) as reader:
        for name, value in tensors.items():
            np.testing.assert_array_equal(reader.read(name), value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_parallel_read_casts_as_astype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type, wanted: type
) -> None:
    """Many chunks on several threads give exactly numpy's cast, for every range."""
    value = np.random.default_rng(1).standard_normal(1000).astype(dtype)
    save_file({"w": value}, tmp_path / "model.safetensors")
    monkeypatch.setattr(reader_module, "CHUNK_BYTES", 64)
    with CheckpointReader(tmp_path) as reader, ThreadPoolExecutor(4) as pool:
        for start, stop in ((0, 1000), (3, 998), (17, 18)):
            out = np.empty(stop - start, wanted)
            reader.read_flat("w", start, out, pool)
            np.testing.assert_array_equal(out.view(np.uint8), value[start:stop].astype(wanted).view(np.uint8))


def test_truncated_file(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Cut anywhere, the file is refused when opened, in one line that names it."""
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    whole = file.read_bytes()
    for length in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is cut short: \d+ bytes .*copy it again") as error:
            CheckpointReader(tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json at all ", "damaged header"),
        (b"[1, 2]", "damaged header"),
        (b'{"w": {"dtype": "F32"}}', "damaged header"),
        (
            b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            r"'w' of shape \[2\] and dtype F32 in 4 bytes",
        ),
        (b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "damaged header"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}', "damaged header"),
        (b'{"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}', "dtype F4; readable are"),
        (b"\xff\xfe{}", "damaged header"),
    ],
)
def test_corrupt_header(tmp_path: Path, header: bytes, message: str) -> None:
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        CheckpointReader(tmp_path)


def test_absurd_header_length(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 this is no safetensors file")
    with pytest.raises(ValueError, match="not a safetensors file"):
        CheckpointReader(tmp_path)


def test_missing_shard_is_named(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    names = list(tensors)
    save_sharded(tmp_path, {f"model-{i}.safetensors": {name: tensors[name]} for i, name in enumerate(names)})
    (tmp_path / "model-3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names 5 shards and 1 of them are missing, the first 'model-3\.safetensors'"):
        CheckpointReader(tmp_path)


def test_index_that_disagrees_with_its_shard(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_sharded(tmp_path, {"model-1.safetensors": tensors})
    index = tmp_path / reader_module.INDEX_FILE
    index.write_text(index.read_text().replace("a.weight", "z.weight"))
    with pytest.raises(ValueError, match=r"places 'z\.weight' in model-1\.safetensors, which lacks it"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": {}}', '{"weight_map": {"w": "../w.safetensors"}}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    (tmp_path / reader_module.INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match="copy it again"):
        CheckpointReader(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model\.bin\).*convert them to safetensors"):
        CheckpointReader(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no weights; expected model\.safetensors"):
        CheckpointReader(tmp_path)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file or directory"):
        CheckpointReader(tmp_path / "absent")


def test_file_that_shrinks_while_read(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    with CheckpointReader(tmp_path) as reader:
        file.write_bytes(file.read_bytes()[:600])
        with pytest.raises(ValueError, match="became shorter while being read"):
            reader.read("b.weight")


def test_resolve_local_paths(tmp_path: Path) -> None:
    assert resolve_model_dir(tmp_path) == tmp_path
    (tmp_path / "f.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        resolve_model_dir(tmp_path / "f.safetensors")
    for wrong in (tmp_path / "absent", str(tmp_path / "absent"), "./absent/model", "a/b/c", "nowhere", "", "a/../b"):
        with pytest.raises(ValueError, match="no such directory"):
            resolve_model_dir(wrong)


def test_hub_id_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a network a hub id ends in one line that says so."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="could not be fetched from the hub") as error:
        resolve_model_dir("some-organisation/some-model")
    assert "\n" not in str(error.value)


def test_hub_download_takes_only_what_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Configs, tokenizers and safetensors; no pickles and no second copy of the weights in another layout."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, object] = {}

    def download(repo_id: str, **patterns: object) -> str:
        asked.update(patterns, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model_dir("meta-llama/Llama-3.1-8B") == tmp_path
    assert asked.pop("repo_id") == "meta-llama/Llama-3.1-8B"
    files = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.model", "merges.txt"]
    others = [
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "a.py",
    ]
    assert list(filter_repo_objects(files + others, **asked)) == files  # type: ignore[arg-type]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the HTTP client raises becomes one line."""
    import huggingface_hub

    def download(repo_id: str, **patterns: object) -> str:
        raise RuntimeError("[Errno -2] Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        ValueError, match=r"\(RuntimeError: \[Errno -2\] Name or service not known\); check the network"
    ):
        resolve_model_dir("some-organisation/some-model")
