"""What is known of a model directory before its weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jaxinfer.loading import read_settings

DEMO = Path(__file__).parents[1] / "jaxinfer" / "assets" / "demo"


def copied(directory: Path) -> Path:
    """The demo model's configs and tokenizer, in which no config names an end token."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / file, directory / file)
    config = json.loads((DEMO / "config.json").read_text())
    del config["eos_token_id"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_the_tokenizers_end_token_where_the_configs_name_none(tmp_path: Path) -> None:
    _, generation = read_settings(copied(tmp_path))
    assert generation.eos_token_ids == (0,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    _, generation = read_settings(tmp_path)
    assert generation.eos_token_ids == (7, 9)


def test_no_end_token_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Models are still served by token ids: without a tokenizer, and with one that cannot be read."""
    copied(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    assert read_settings(tmp_path)[1].eos_token_ids == ()
    assert "no token is known that ends a text" in caplog.text
    (tmp_path / "tokenizer.json").unlink()
    assert read_settings(tmp_path)[1].eos_token_ids == ()
