"""Text as it streams: token by token, never half a character, never part of a stop string. Imports no jax."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfer.tokenizer.tokenizer import Tokenizer

_MAX_CHARACTER_BYTES = 4
_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 8


class IncrementalDetokenizer:
    """The text of one completion. `add` returns what each token makes certain; `finish` what is left at the end.

    The text is what the tokens add to the prompt's: with a SentencePiece model a completion that starts a word starts
    with a space. Bytes that make no character become U+FFFD where they stand; at the end, bytes of a character that
    was cut off are dropped. Byte tokens of a SentencePiece model are judged byte by byte, so valid characters survive
    beside an invalid one (the library's own decoding replaces the whole run). Otherwise the deltas joined are the
    decoding of the whole.

    stop: texts that end the completion. `stop_string` becomes the one whose match ends first (the longest, where two
    end together), and the text ends before it, or after it with include_stop. min_tokens: the text of so many tokens
    is not searched. Each token costs time in proportion to its own text and the number of stop strings.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        decoder = _PieceDecoder if tokenizer.pieces is not None else _WindowDecoder
        self._decoder = decoder(tokenizer, prompt_token_ids, skip_special_tokens)
        self._search = _StopSearch(stop, include_stop) if stop else None
        self._unsearched = min_tokens
        self.stop_string: str | None = None

    def add(self, token_id: int) -> str:
        """The text that is certain now and was not before; "" once a stop string was found."""
        if self.stop_string is not None:
            return ""
        text = self._decoder.add(token_id)
        if self._search is None:
            return text
        if self._unsearched > 0:
            self._unsearched -= 1
            return text
        text, self.stop_string = self._search.add(text)
        return text

    def finish(self) -> str:
        """The text held back because it could have become a stop string."""
        if self.stop_string is not None or self._search is None:
            return ""
        text, self._search.held = self._search.held, ""
        return text


class _PieceDecoder:
    """Tokens whose bytes are known one by one: they go through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        assert tokenizer.pieces is not None
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = (self._pieces[token_id] for token_id in prompt_token_ids if token_id not in self._skipped)
        self._at_start = self._pieces.strips_first_space and not any(pieces)
        # A prompt of token ids may end inside a character; what completes it belongs with its first bytes.
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if token_id not in self._skipped:
                tail = self._pieces[token_id] + tail
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
        self._utf8.decode(tail)

    def add(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces[token_id]
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)


class _WindowDecoder:
    """Any other tokenizer: the last few tokens are decoded with and without the new one, and the difference is new."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        size = _WINDOW_TOKENS
        self._window = list(prompt_token_ids[-size:])
        # A decoder may treat the start of a text differently, so the window must not look like one in the middle.
        while not self._decode() and size < len(prompt_token_ids):
            size *= 2
            self._window = list(prompt_token_ids[-size:])
        self._num_given = len(self._window)
        self._given = self._decode().rstrip(_REPLACEMENT)

    def add(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode()
        # U+FFFD at the end may be the first bytes of a character; after so many tokens it is not.
        if text.endswith(_REPLACEMENT) and len(self._window) - self._num_given < _WINDOW_TOKENS:
            return ""
        delta = text[len(self._given) :]
        if delta:
            self._window = self._window[self._num_given :]
            text = self._decode()
        self._num_given, self._given = len(self._window), text
        return delta

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, self._skip_special_tokens)


class _StopSearch:
    """All stop strings searched at once, each by Knuth, Morris and Pratt's automaton: every character is read once."""

    def __init__(self, stop: Sequence[str], include_stop: bool) -> None:
        self._stop = [(text, _borders(text)) for text in stop]
        self._matched = [0] * len(self._stop)  # characters of each stop string that the text read so far ends with
        self._include_stop = include_stop
        self.held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """The text that is certain now, and the stop string that ended it."""
        buffer = self.held + text
        for position, character in enumerate(text, start=len(self.held) + 1):
            found = ""
            for index, (stop, borders) in enumerate(self._stop):
                matched = self._matched[index]
                while matched and stop[matched] != character:
                    matched = borders[matched - 1]
                if stop[matched] == character:
                    matched += 1
                self._matched[index] = matched
                if matched == len(stop) > len(found):
                    found = stop
            if found:
                self.held = ""
                return buffer[: position if self._include_stop else position - len(found)], found
        num_held = 0 if self._include_stop else max(self._matched)
        certain = len(buffer) - num_held
        self.held = buffer[certain:]
        return buffer[:certain], None


def _borders(text: str) -> list[int]:
    """For each prefix of `text` the length of the longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders
