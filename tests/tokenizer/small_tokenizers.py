"""Small tokenizers trained here on the standard library's own source, in the shapes of the common model families."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def training_text() -> list[str]:
    return inspect.getsource(textwrap).splitlines(keepends=True) + ["naïve café — 日本語テキスト 🙂👩‍🚀\n"] * 3


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3: byte-level BPE, a bos set by the post-processor."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|bos|>", "<|eos|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.add_tokens(["plain added"])
    bos = tokenizer.token_to_id("<|bos|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|bos|> $A", "<|bos|> $A $B", [("<|bos|>", bos)])
    return tokenizer


def sentencepiece(prefix_space: bool = True) -> tokenizers.Tokenizer:
    """As Llama 2 (or, without the leading space, Gemma): BPE over characters with bytes to fall back on."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], limit_alphabet=90, show_progress=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if prefix_space else "never", split=False)
    tokenizer.train_from_iterator((line[:40] for line in training_text()), trainer)
    # The bytes are ordinary tokens there, not special ones.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in bytes_]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix_space else steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """A decoder that is of neither common kind."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(training_text(), trainer)
    return tokenizer


KINDS: dict[str, tuple[Callable[[], tokenizers.Tokenizer], dict[str, Any], str]] = {
    "byte_level": (
        byte_level,
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>"},
        "llama",
    ),
    "sentencepiece": (
        sentencepiece,
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "llama",
    ),
    "sentencepiece_no_prefix": (
        lambda: sentencepiece(prefix_space=False),
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "gemma2",
    ),
    "word_piece": (word_piece, {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}, "llama"),
}


def write_model_dir(
    directory: Path, tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], model_type: str = "llama"
) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **settings}))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return directory
