"""What each token contributes to the text, as bytes, for the two kinds of decoder that nearly all models have.

Byte-level BPE (GPT-2's) writes each byte as one printable character. SentencePiece (arXiv:1808.06226) writes spaces as
U+2581 and bytes it has no token for as <0xNN>. In both a text is the concatenation of its tokens' bytes, so a token can
be decoded without looking at its neighbours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP_FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class PieceTable:
    """The bytes of every token. strips_first_space: a text's very first space is dropped."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, to_bytes: Callable[[str], bytes], strips_first_space: bool
    ) -> None:
        self.strips_first_space = strips_first_space
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        """A token's bytes; none for an id without a token, as in a vocabulary that was padded."""
        piece = self._known.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id)
            piece = self._known[token_id] = b"" if token is None else self._to_bytes(token)
        return piece


def piece_table(tokenizer: tokenizers.Tokenizer) -> PieceTable | None:
    """The table for this tokenizer; None where its decoder is of another kind."""
    if tokenizer.decoder is None:
        return None
    decoder = json.loads(tokenizer.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return PieceTable(tokenizer, _byte_level, strips_first_space=False)
    steps = decoder.get("decoders")
    if steps == _SENTENCEPIECE:
        return PieceTable(tokenizer, _sentencepiece, strips_first_space=False)
    if steps == [*_SENTENCEPIECE, _STRIP_FIRST_SPACE]:
        return PieceTable(tokenizer, _sentencepiece, strips_first_space=True)
    return None


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character for each byte: itself where printable, else the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # an added token, written as it is
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace("▁", " ").encode()
