"""config.json and generation_config.json: which of them speaks, and one line for what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxinfer.checkpoint.config import GenerationDefaults, copy_side_files, read_config


def write(directory: Path, config: Any, generation: Any = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({}, None, GenerationDefaults()),
        ({"eos_token_id": 2, "bos_token_id": 1}, None, GenerationDefaults((2,), 1)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6], "pad_token_id": 0}, GenerationDefaults((5, 6), None, 0)),
        ({"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": None}, GenerationDefaults((2,), 1)),
        ({"text_config": {"eos_token_id": 9}}, None, GenerationDefaults((9,))),
        ({"eos_token_id": 3, "text_config": {"eos_token_id": 9}}, None, GenerationDefaults((3,))),
        ({"eos_token_id": 3, "pad_token_id": -1}, None, GenerationDefaults((3,))),
    ],
)
def test_generation_config_comes_first(tmp_path: Path, config: Any, generation: Any, expected: Any) -> None:
    parsed, defaults = read_config(write(tmp_path, config, generation))
    assert parsed == config
    assert defaults == expected


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; give the directory of a model"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "must hold a JSON object, not list"), ('{"eos_token_id": "2"}', "eos_token_id='2'")],
)
def test_bad_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_unreadable_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_config(tmp_path)


def test_side_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    write(source, {"dtype": "bfloat16", "name": "é"})
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (source / name).write_text(name)
    for name in ("model.safetensors", "model.safetensors.index.json", "train.py", "pytorch_model.bin"):
        (source / name).write_text(name)
    copy_side_files(source, target, {"dtype": "float32"})
    names = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"}
    assert {file.name for file in target.iterdir()} == names
    assert read_config(target)[0] == {"dtype": "float32", "name": "é"}
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
