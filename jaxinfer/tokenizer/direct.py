"""When `tokenizer.json` alone says everything, so that the Rust library can be used without importing transformers.

transformers takes seconds to import and may change what the file says: it picks a class by the model's type, rebuilds
the tokenizer in it, and adds special tokens. The few cases in which all of that changes nothing are recognised here,
with every condition spelled out; in any other transformers loads the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# Classes that take tokenizer.json as it is, and the model types for which transformers heeds the class that is named.
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
_PLAIN_MODEL_TYPES = ("llama", "olmo2", "smollm3")

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Entries of tokenizer_config.json that add or change no token. `add_bos_token` and `add_eos_token` are among them:
# transformers drops both where there is a tokenizer.json, whose post-processor decides.
_HARMLESS = frozenset(
    {
        "add_bos_token",
        "add_eos_token",
        "add_prefix_space",
        "added_tokens_decoder",
        "additional_special_tokens",
        "backend",
        "chat_template",
        "clean_up_tokenization_spaces",
        "extra_special_tokens",
        "is_local",
        "legacy",
        "local_files_only",
        "max_length",
        "model_input_names",
        "model_max_length",
        "name_or_path",
        "padding_side",
        "tokenizer_class",
        "truncation_side",
        *SPECIAL_NAMES,
    }
)


def load_direct(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]] | None:
    """The tokenizer of tokenizer.json and the parsed tokenizer_config.json, or None: then transformers must load it."""
    settings = _read_object(directory / TOKENIZER_CONFIG_FILE)
    config = _read_object(directory / "config.json")
    if settings is None or config is None or not (directory / TOKENIZER_FILE).is_file():
        return None
    if settings.get("tokenizer_class") not in _PLAIN_CLASSES or config.get("model_type") not in _PLAIN_MODEL_TYPES:
        return None
    if not _HARMLESS.issuperset(settings) or (directory / "added_tokens.json").exists():
        return None
    if "added_tokens_decoder" not in settings and (directory / "special_tokens_map.json").exists():
        return None  # transformers then takes special tokens from that file

    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    # With other models transformers may tidy spaces after decoding.
    if not isinstance(tokenizer.model, tokenizers.models.BPE) or not _adds_nothing(tokenizer, settings):
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, settings


def token_text(value: Any) -> str | None:
    """A special token's text: the configs spell it as a string or as an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _adds_nothing(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any]) -> bool:
    """Whether every token that tokenizer_config.json names is in tokenizer.json already, as what it would become."""
    there = tokenizer.get_added_tokens_decoder()
    for token_id, entry in (settings.get("added_tokens_decoder") or {}).items():
        token = there.get(int(token_id)) if str(token_id).isdecimal() else None
        if token is None or not isinstance(entry, dict):
            return False
        flags = {name: getattr(token, name) for name in ("content", "lstrip", "rstrip", "single_word", "special")}
        if any(entry.get(name, False) != value for name, value in flags.items()):
            return False
        if entry.get("normalized", not entry.get("special", False)) != token.normalized:
            return False
    plain_special = {
        token.content
        for token in there.values()
        if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    }
    named = [settings.get(name) for name in SPECIAL_NAMES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        extra = settings.get(name) or []
        if not isinstance(extra, list):
            return False
        named += extra
    return all(value is None or token_text(value) in plain_special for value in named)


def _read_object(file: Path) -> dict[str, Any] | None:
    """A JSON file's object; None where there is none to read: transformers then says what is wrong with it."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
