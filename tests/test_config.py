"""What EngineConfig takes and refuses, and where files go."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from jaxinfer.config import EngineConfig, cache_directory, parse_bytes


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("JAXINFER_"):
            monkeypatch.delenv(name)


def test_defaults_are_decided_later_or_plain() -> None:
    config = EngineConfig("model")
    unset = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None}
    assert unset == {
        "quantization",
        "mesh",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "num_pages",
        "kv_cache_memory",
        "page_size",
        "attention_backend",
        "compilation_cache_dir",
    }
    assert (config.dtype, config.enable_prefix_caching, config.seed) == ("auto", True, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("2GiB", 2**31),
        ("2 gib", 2**31),
        ("2G", 2**31),
        ("1.5KiB", 1536),
        ("3MB", 3_000_000),
    ],
)
def test_parse_bytes(value: int | str, size: int) -> None:
    assert parse_bytes(value) == size
    assert EngineConfig("m", kv_cache_memory=value).kv_cache_memory == size


@pytest.mark.parametrize("value", ["", "GiB", "2XB", "-1GiB", 0, -5, True, 1.5, "0.0001B", "nan"])
def test_parse_bytes_refuses(value: object) -> None:
    with pytest.raises(ValueError, match="2GiB"):
        parse_bytes(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("mesh", ["tensor", "tensor=0", "tensor=-1", "model=2", "tensor=2,tensor=2", "tensor=x"])
def test_mesh_is_checked_before_any_device_is_asked(mesh: str) -> None:
    assert EngineConfig("m", mesh="tensor=4,data=2").mesh == "tensor=4,data=2"
    with pytest.raises(ValueError, match="mesh="):
        EngineConfig("m", mesh=mesh)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": " "}, "directory or a hub id"),
        ({"dtype": "int3"}, "auto, float32, bfloat16, float16"),
        (
            {"kv_cache_dtype": "int4"},
            "'int4' is not supported; use one of auto, int8, float8_e4m3fn, fp8",
        ),
        ({"kv_cache_dtype": None}, "kv_cache_dtype=None is not supported"),
        ({"max_model_len": 0}, r"max_model_len=0 is out of range; use a value in \[1, "),
        ({"max_num_seqs": -1}, "max_num_seqs=-1"),
        ({"max_num_seqs": 2.0}, "must be a whole number; use 2"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens=True"),
        ({"num_pages": "12"}, "num_pages='12' must be a whole number"),
        ({"page_size": 0}, "page_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "4294967295"),
        ({"num_pages": 4, "kv_cache_memory": "1GiB"}, "both size the KV cache; give one"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "raise max_num_batched_tokens to at least 64"),
        ({"enable_prefix_caching": 1}, "True or False"),
        ({"attention_backend": ""}, "attention_backend is empty"),
        ({"mesh": {"tensor": 2}}, "must be text"),
        ({"compilation_cache_dir": True}, "give a path"),
    ],
)
def test_refusals_name_value_limit_and_fix(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        EngineConfig(**{"model": "m", **fields})
    assert "\n" not in str(caught.value)


def test_environment_fills_what_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFER_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("JAXINFER_KV_CACHE_MEMORY", "1MiB")
    monkeypatch.setenv("JAXINFER_ENABLE_PREFIX_CACHING", "no")
    monkeypatch.setenv("JAXINFER_DTYPE", "")
    config = EngineConfig("m")
    assert (config.max_num_seqs, config.kv_cache_memory, config.enable_prefix_caching) == (7, 2**20, False)
    assert config.dtype == "auto"
    assert EngineConfig("m", max_num_seqs=3).max_num_seqs == 3


@pytest.mark.parametrize(("name", "value"), [("MAX_NUM_SEQS", "many"), ("ENABLE_PREFIX_CACHING", "maybe")])
def test_environment_is_validated(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"JAXINFER_{name}", value)
    with pytest.raises(ValueError, match=f"JAXINFER_{name}='{value}'"):
        EngineConfig("m")


def test_unknown_variable_is_named_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("jaxinfer.config._warned", set())
    monkeypatch.setenv("JAXINFER_MAX_SEQS", "7")
    monkeypatch.setenv("JAXINFER_CACHE_DIR", "/somewhere")
    with caplog.at_level(logging.WARNING, "jaxinfer.config"):
        EngineConfig("m")
        EngineConfig("m")
    assert [record.args[0] for record in caplog.records] == ["JAXINFER_MAX_SEQS"]  # type: ignore[index]


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "jaxinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache" / "jaxinfer"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "jaxinfer"
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"

    assert EngineConfig("m").compilation_cache_path == tmp_path / "own" / "compiled"
    assert EngineConfig("m", compilation_cache_dir=False).compilation_cache_path is None
    assert EngineConfig("m", compilation_cache_dir="~/x").compilation_cache_path == tmp_path / "x"
    monkeypatch.setenv("JAXINFER_COMPILATION_CACHE_DIR", "off")
    assert EngineConfig("m").compilation_cache_path is None
