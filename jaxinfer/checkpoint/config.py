"""A model directory's JSON files and the small files that travel with its weights. Imports no jax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"

# What is copied with the weights, so that a converted checkpoint stands alone: configs, tokenizers, chat templates.
_SIDE_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "additional_chat_templates/*.jinja")
_NOT_SIDE_FILES = ("*.safetensors.index.json", "*.bin.index.json")


@dataclass(frozen=True)
class GenerationDefaults:
    """Special token ids a model's generation ends, begins and pads with; () and None where the files name none."""

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None


def read_config(directory: str | Path) -> tuple[dict[str, Any], GenerationDefaults]:
    """The parsed config.json, and the generation defaults: from generation_config.json, else config.json, key by key.

    ValueError where config.json is missing, or either file is no JSON object or holds a token id that is none.
    """
    directory = Path(directory)
    config = _read_json_object(directory / CONFIG_FILE)
    if config is None:
        raise ValueError(
            f"{directory} has no {CONFIG_FILE}; give the directory of a model, with its config and weights"
        )
    generation = _read_json_object(directory / GENERATION_CONFIG_FILE) or {}
    # Multimodal models keep the language model's settings one level down.
    text = config.get("text_config")
    places = (
        (GENERATION_CONFIG_FILE, generation),
        (CONFIG_FILE, config),
        (CONFIG_FILE, text if isinstance(text, dict) else {}),
    )

    def token_ids(key: str) -> tuple[int, ...]:
        for file, values in places:
            value = values.get(key)
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            # -1 is how some configs say that there is none.
            if not all(isinstance(item, int) and not isinstance(item, bool) and item >= -1 for item in ids):
                raise ValueError(
                    f"{directory / file}: {key}={value!r} must be a token id or a list of them; correct it"
                )
            return tuple(item for item in ids if item >= 0)
        return ()

    def first(key: str) -> int | None:
        return next(iter(token_ids(key)), None)

    return config, GenerationDefaults(token_ids("eos_token_id"), first("bos_token_id"), first("pad_token_id"))


def _read_json_object(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; check its permissions") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}; copy it again")
    return value


def copy_side_files(source: Path, target: Path, config_changes: Mapping[str, Any]) -> None:
    """Copy configs, tokenizer and chat templates from one model directory to another, config.json with the changes.

    A key that changes to None is left out.
    """
    skipped = {file for pattern in _NOT_SIDE_FILES for file in source.glob(pattern)}
    for file in sorted({file for pattern in _SIDE_FILES for file in source.glob(pattern)} - skipped):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
    config, _ = read_config(source)
    config.update(config_changes)
    config = {key: value for key, value in config.items() if key not in config_changes or value is not None}
    (target / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
