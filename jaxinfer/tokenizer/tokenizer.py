"""One model's tokenizer: text to token ids and back, special tokens, chat templates. Imports no jax."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.tokenizer.direct import TOKENIZER_FILE, load_direct, token_text
from jaxinfer.tokenizer.pieces import PieceTable, piece_table

if TYPE_CHECKING:
    import tokenizers

_TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer.model", "tekken.json", "vocab.json")

# Decided here, not by the caller of apply_chat_template: it returns token ids.
_TEMPLATE_FIXED = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")


class Tokenizer:
    """The tokenizer in a model directory.

    Loaded by transformers, or by the `tokenizers` library alone where both give the same (see direct.py). The
    constructor raises ValueError, in one line, where the directory has no tokenizer or a damaged one.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.exists(self.directory):
            raise ValueError(
                f"{self.directory} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); "
                f"give token ids instead of text, or add its files"
            )
        try:
            direct = load_direct(self.directory)
        except Exception as error:  # the Rust library raises bare Exception for a file it cannot parse
            raise self._damaged(error) from error
        self._direct: tokenizers.Tokenizer | None = None
        self._settings: dict[str, Any] = {}
        if direct is not None:
            self._direct, self._settings = direct
        else:
            _ = self._transformers  # so that a damaged tokenizer is found here, not at the first request

    @staticmethod
    def exists(directory: str | Path) -> bool:
        """Whether a model directory has a tokenizer at all; without one, models take and give token ids."""
        return any((Path(directory) / name).is_file() for name in _TOKENIZER_FILES)

    @cached_property
    def _transformers(self) -> Any:
        """transformers' own tokenizer, imported on first use."""
        # Its advice at import is to install torch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                f"the tokenizer in {self.directory} needs transformers, which is not installed; "
                f"run 'pip install transformers'"
            ) from error
        try:
            # Code that comes with a checkpoint is never run.
            return transformers.AutoTokenizer.from_pretrained(
                str(self.directory), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers and the libraries below it share no error class
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        lines = str(error).splitlines() or [type(error).__name__]
        return ValueError(
            f"the tokenizer in {self.directory} cannot be loaded ({lines[0][:200]}); copy its files again"
        )

    @cached_property
    def rust(self) -> tokenizers.Tokenizer | None:
        """The `tokenizers` object that does the work; None for a tokenizer written in Python."""
        return self._direct or getattr(self._transformers, "backend_tokenizer", None)

    @cached_property
    def pieces(self) -> PieceTable | None:
        """Every token's bytes, where its text does not depend on its neighbours."""
        return None if self.rust is None else piece_table(self.rust)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id that has a text."""
        if self.rust is not None:
            return max(self.rust.get_vocab().values(), default=-1) + 1
        return len(self._transformers)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out of the text."""
        if self.rust is not None:
            added = self.rust.get_added_tokens_decoder()
            return frozenset(token_id for token_id, token in added.items() if token.special)
        return frozenset(self._transformers.all_special_ids)

    @cached_property
    def bos_token_id(self) -> int | None:
        return self._special("bos_token")

    @cached_property
    def eos_token_id(self) -> int | None:
        return self._special("eos_token")

    @cached_property
    def pad_token_id(self) -> int | None:
        return self._special("pad_token")

    def _special(self, name: str) -> int | None:
        if self._direct is not None:
            text = token_text(self._settings.get(name))
            return None if text is None else self._direct.token_to_id(text)
        return getattr(self._transformers, f"{name}_id")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text, with the special tokens (such as a leading bos) that the model was trained with."""
        _check_characters(text)
        if self._direct is not None:
            return self._direct.encode(text, add_special_tokens=add_special_tokens).ids
        return list(self._transformers.encode(text, add_special_tokens=add_special_tokens, verbose=False))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids. Bytes that make no character become U+FFFD; ids without a text become nothing."""
        ids = [int(token_id) for token_id in token_ids]
        if any(token_id < 0 for token_id in ids):
            raise ValueError(f"token id {min(ids)} is negative; ids start at 0")
        if self._direct is not None:
            return self._direct.decode(ids, skip_special_tokens=skip_special_tokens)
        return self._transformers.decode(ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def has_chat_template(self) -> bool:
        if self._settings.get("chat_template") or (self.directory / "chat_template.jinja").is_file():
            return True
        return self._direct is None and bool(self._transformers.chat_template)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool | None = None, **arguments: Any
    ) -> list[int]:
        """The token ids of a conversation, by the model's own template, which transformers renders in a sandbox.

        messages: dicts with "role" and "content". add_generation_prompt: end with the opening of the assistant's turn;
        by default so, unless `continue_final_message`. arguments: what transformers takes (tools, documents, ...) and
        variables of the template's own. ValueError for a model without a template and a conversation it rejects.
        """
        for name in _TEMPLATE_FIXED:
            if name in arguments:
                raise ValueError(f"chat template argument {name}={arguments[name]!r} cannot be set; leave it out")
        if not self.has_chat_template:
            raise ValueError(f"{self.directory} has no chat template; give a plain prompt, or add chat_template.jinja")
        _check_characters(messages)
        if add_generation_prompt is None:
            add_generation_prompt = not arguments.get("continue_final_message", False)
        try:
            return list(
                self._transformers.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                    tokenize=True,
                    return_dict=False,
                    **arguments,
                )
            )
        except Exception as error:  # a template is a program: it can fail in any way, and raise what it likes
            lines = str(error).splitlines() or [type(error).__name__]
            raise ValueError(f"the chat template rejects this conversation ({lines[0][:300]}); correct it") from error


def _check_characters(value: Any) -> None:
    """ValueError where a string, anywhere inside, holds half of a surrogate pair: no text that a tokenizer can read."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds half of a surrogate pair at character {error.start}; remove it") from None
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_characters(item)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            _check_characters(item)
