"""Corpus, tokenizer and training windows of the bundled demo models.

The corpus is the Python standard library of the interpreter that runs the script, without its tests. Whole modules are
held out, so that the figures in the model card are measured on code that neither the tokenizer nor a model has seen.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
VOCAB_SIZE = 4096
WINDOW = 1024

# First path component (or file stem) of the modules that are kept out of training.
HELD_OUT = frozenset(
    {
        *("bisect", "cmd", "contextlib", "csv", "fnmatch", "fractions", "ftplib", "graphlib", "heapq", "json"),
        *("queue", "quopri", "sched", "shlex", "statistics", "string", "textwrap", "tomllib", "wave", "zipapp"),
    }
)
# Tests, generated tables and bundled wheels: they are not code that anybody wants completed.
EXCLUDED = re.compile(
    r"(^|/)(site-packages|tests?|idle_test|pydoc_data|_bundled|__pycache__|config-[^/]*)/|"
    r"^encodings/(?!__init__|aliases|utf_8|idna|punycode)|(^|/)(_sysconfigdata|test_)[^/]*$"
)
# Newlines, runs of spaces, words, digits and punctuation are kept apart, so that a prompt may end after any of them.
# One space belongs to the word or the punctuation that follows it.
PIECES = r"\n+|[ \t]{2,}| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}# {{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)


def read_corpus() -> tuple[dict[str, str], dict[str, str]]:
    """Returns (training, held out): the source of each module by its path inside the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    training: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if EXCLUDED.search(name):
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue  # a handful of files declare another encoding
        if text.strip():
            module = name.split("/")[0].removesuffix(".py")
            (held_out if module in HELD_OUT else training)[name] = text
    return training, held_out


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE tokens; encoding with special tokens puts END_OF_TEXT in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return tokenizer


def split_at_definitions(text: str) -> list[str]:
    """Cuts a module before each top-level definition, so that a model also learns to begin with one."""
    return [piece for piece in re.split(r"\n\n\n(?=def |class |@|async def )", text) if piece.strip()]


def windows(texts: list[str], tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """Yields int32 [windows, WINDOW + 1], one array an epoch, for ever; the same seed gives the same epochs.

    Every epoch shuffles the modules, cuts half of them at their top-level definitions, joins all with END_OF_TEXT,
    shifts the result by a random offset, cuts it into windows and shuffles those.
    """
    encoded: dict[str, list[int]] = {}

    def encode(text: str) -> list[int]:
        if text not in encoded:
            encoded[text] = tokenizer.encode(text).ids  # begins with END_OF_TEXT
        return encoded[text]

    epoch = 0
    while True:
        rng = np.random.default_rng([seed, epoch])
        stream: list[int] = []
        for index in rng.permutation(len(texts)):
            pieces = split_at_definitions(texts[index]) if rng.random() < 0.5 else [texts[index]]
            for piece in pieces:
                stream += encode(piece)
        tokens = np.asarray(stream[rng.integers(WINDOW) :], np.int32)
        count = (len(tokens) - 1) // WINDOW
        starts = rng.permutation(count) * WINDOW
        yield tokens[starts[:, None] + np.arange(WINDOW + 1)]
        epoch += 1
