"""Streaming text: the deltas joined are the decoding of the whole, and stop strings are found as in the whole text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from jaxinfer.tokenizer import IncrementalDetokenizer, Tokenizer
from tests.tokenizer.small_tokenizers import KINDS

FIXTURE_OK = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def tokenizers(model_dirs: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(path) for kind, path in model_dirs.items()}


def stream(detokenizer: IncrementalDetokenizer, ids: list[int]) -> list[str]:
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.finish()]


def whole_text(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """The slow twin: what decoding everything adds to decoding the prompt, without a character cut off at the end."""
    before, text = tokenizer.decode(prompt, skip), tokenizer.decode([*prompt, *ids], skip)
    assert text.startswith(before)
    return text[len(before) :]


def without_cut_off_end(text: str, data: bytes) -> str:
    """`text`, decoded from `data`, without the U+FFFD that stands for the start of a character at its end."""
    for length in (3, 2, 1):
        try:
            data[-length:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return text.removesuffix("\ufffd")
    return text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80, **FIXTURE_OK)
@given(prompt=st.text(max_size=8), text=st.text(max_size=30), skip=st.booleans())
@example(prompt="Hello", text=" 🙂👩‍🚀日本", skip=True)
@example(prompt="", text=" leading", skip=True)
def test_encoded_text_streams_whole(
    tokenizers: dict[str, Tokenizer], kind: str, prompt: str, text: str, skip: bool
) -> None:
    """Any text, cut into tokens, comes back whole, for every kind of tokenizer, after any prompt."""
    tokenizer = tokenizers[kind]
    prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
    deltas = stream(IncrementalDetokenizer(tokenizer, prompt_ids, skip_special_tokens=skip), ids)
    expected = whole_text(tokenizer, prompt_ids, ids, skip)
    if kind == "word_piece":  # the generic way cannot tell a U+FFFD in the text from half a character at the end
        expected = expected.rstrip("\ufffd")
    assert "".join(deltas) == expected


@settings(max_examples=300, **FIXTURE_OK)
@given(ids=st.lists(st.integers(0, 620), max_size=24), skip=st.booleans(), start=st.booleans())
def test_any_tokens_byte_level(tokenizers: dict[str, Tokenizer], ids: list[int], skip: bool, start: bool) -> None:
    """Tokens in any order, most of them no valid UTF-8: U+FFFD where decoding has it, less the one at a cut-off end."""
    tokenizer = tokenizers["byte_level"]
    prompt = [] if start else tokenizer.encode("a")
    text = "".join(stream(IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip), ids))
    expected = whole_text(tokenizer, prompt, ids, skip)
    assert tokenizer.pieces is not None
    kept = (token_id for token_id in [*prompt, *ids] if not (skip and token_id in tokenizer.special_token_ids))
    data = b"".join(tokenizer.pieces[token_id] for token_id in kept)
    assert text == without_cut_off_end(expected, data)


@settings(max_examples=200, **FIXTURE_OK)
@given(
    parts=st.lists(st.one_of(st.text(min_size=1, max_size=4), st.integers(0, 255)), max_size=10), start=st.booleans()
)
def test_byte_tokens_sentencepiece(tokenizers: dict[str, Tokenizer], parts: list[str | int], start: bool) -> None:
    """Words and single byte tokens mixed: all is read as UTF-8, invalid bytes replaced where they stand."""
    tokenizer = tokenizers["sentencepiece_no_prefix"]
    assert tokenizer.rust is not None
    ids, data = [], b""
    for part in parts:
        if isinstance(part, int):
            ids.append(tokenizer.rust.token_to_id(f"<0x{part:02X}>"))
            data += bytes([part])
        else:
            ids += tokenizer.encode(part, add_special_tokens=False)
            data += part.replace("▁", " ").encode()
    assume(not tokenizer.special_token_ids.intersection(ids))
    prompt = [] if start else tokenizer.encode("a")
    text = "".join(stream(IncrementalDetokenizer(tokenizer, prompt), ids))
    assert text == without_cut_off_end(data.decode(errors="replace"), data)
    if data.decode(errors="ignore").encode() == data:  # valid throughout: then it is the library's own decoding
        assert text == whole_text(tokenizer, prompt, ids, skip=True)


def test_no_half_characters(tokenizers: dict[str, Tokenizer]) -> None:
    """A character spread over several tokens appears at once, and not at all when it is cut off."""
    for kind in ("byte_level", "sentencepiece", "sentencepiece_no_prefix"):
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode("𐍈", add_special_tokens=False)
        deltas = stream(IncrementalDetokenizer(tokenizer, tokenizer.encode("a")), ids)
        assert len(deltas) > 3, kind
        assert deltas[-2].endswith("𐍈"), kind
        assert not any("\ufffd" in delta for delta in deltas), kind
        cut = "".join(stream(IncrementalDetokenizer(tokenizer, tokenizer.encode("a")), ids[:-1]))
        assert cut.strip() == "", kind


def test_prompt_that_ends_inside_a_character(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("x𐍈y")
    for cut in range(1, len(ids)):
        text = "".join(stream(IncrementalDetokenizer(tokenizer, ids[:cut]), ids[cut:]))
        assert "x𐍈y".endswith(text)
        assert "\ufffd" not in text


def test_first_space(tokenizers: dict[str, Tokenizer]) -> None:
    """A SentencePiece word starts with its space after a prompt, and without it at the start of a text."""
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer.encode("text", add_special_tokens=False)
    bos = tokenizer.bos_token_id
    assert "".join(stream(IncrementalDetokenizer(tokenizer, tokenizer.encode("wrap")), ids)) == " text"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, [bos]), ids)) == "text"
    assert "".join(stream(IncrementalDetokenizer(tokenizer), ids)) == "text"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, [bos], skip_special_tokens=False), ids)) == " text"


def test_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = [*tokenizer.encode("a", add_special_tokens=False), tokenizer.eos_token_id, 10_000]
    assert "".join(stream(IncrementalDetokenizer(tokenizer), ids)) == "a"
    assert "".join(stream(IncrementalDetokenizer(tokenizer, skip_special_tokens=False), ids)) == "a<|eos|>"


def cut_at_stop(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The slow twin of the stop search: of all matches in the whole text the one that ends first, then the longest."""
    matches = [(end, -len(s), s) for s in stop for end in range(len(s), len(text) + 1) if text[end - len(s) : end] == s]
    if not matches:
        return text, None
    end, negative_length, found = min(matches)
    return text[: end if include else end + negative_length], found


@settings(max_examples=400, **FIXTURE_OK)
@given(
    text=st.text("ab🙂", max_size=30),
    stop=st.lists(st.text("ab🙂", min_size=1, max_size=6), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings(tokenizers: dict[str, Tokenizer], text: str, stop: list[str], include: bool) -> None:
    """Found across tokens, cut where the whole text would be cut, and no part of one is ever shown too early."""
    tokenizer = tokenizers["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop, include_stop=include)
    expected, found = cut_at_stop(text, stop, include)
    shown = ""
    for delta in stream(detokenizer, tokenizer.encode(text, add_special_tokens=False)):
        shown += delta
        assert expected.startswith(shown)
    assert (shown, detokenizer.stop_string) == (expected, found)
    if found is not None:
        assert detokenizer.add(5) == detokenizer.finish() == ""


def test_held_back_no_longer_than_needed(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["###"])
    shown = [detokenizer.add(tokenizer.encode(c, add_special_tokens=False)[0]) for c in "a#b##c##"]
    assert shown == ["a", "", "#b", "", "", "##c", "", ""]
    assert detokenizer.finish() == "##"


def test_min_tokens_are_not_searched(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "x1x2x"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["x"], min_tokens=3)
    assert "".join(stream(detokenizer, ids)) == "x1x2"
    assert detokenizer.stop_string == "x"


@pytest.mark.parametrize("kind", KINDS)
def test_time_per_token_stays_flat(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """No token costs the text before it, invalid bytes without end included: ten times the tokens, about that time."""
    tokenizer = tokenizers[kind]
    assert tokenizer.rust is not None
    token_id = tokenizer.rust.token_to_id("<0x80>") or tokenizer.rust.token_to_id("Ģ") or 7

    def seconds(num_tokens: int) -> float:
        detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("a"), stop=["aab", "\ufffd\ufffd!"])
        start = time.process_time()
        for _ in range(num_tokens):
            detokenizer.add(token_id)
        return time.process_time() - start

    assert min(seconds(5000) for _ in range(3)) < 40 * min(seconds(500) for _ in range(3))
