"""The tokenizer gives what transformers' AutoTokenizer gives, whichever way it was loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.tokenizer import Tokenizer
from jaxinfer.tokenizer.direct import load_direct
from tests.tokenizer.small_tokenizers import KINDS, TEMPLATE, byte_level, sentencepiece, write_model_dir

TEXTS = [
    "",
    "Hello, world!",
    "  two  spaces\n\ttab ",
    "def f(x):\n    return x . y !\n",
    "naïve café — 日本語 🙂👩‍🚀 \u0000 \ufffd",
    "<|bos|>not <s> plain added <|eos|></s> <unk> <0x41>",
]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}]


@pytest.fixture(scope="module")
def pairs(model_dirs: dict[str, Path]) -> dict[str, tuple[Tokenizer, Any]]:
    return {
        kind: (Tokenizer(path), transformers.AutoTokenizer.from_pretrained(str(path)))
        for kind, path in model_dirs.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_same_as_transformers(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )
    assert ours.special_token_ids >= set(theirs.all_special_ids)
    for arguments in ({}, {"add_generation_prompt": False}, {"continue_final_message": True}):
        expected = {"add_generation_prompt": not arguments, **arguments}
        assert ours.apply_chat_template(MESSAGES, **arguments) == theirs.apply_chat_template(
            MESSAGES, tokenize=True, return_dict=False, **expected
        )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), ids=st.lists(st.integers(0, 700), max_size=20), data=st.data())
def test_any_text_and_ids(
    pairs: dict[str, tuple[Tokenizer, Any]], text: str, ids: list[int], data: st.DataObject
) -> None:
    """Text of any characters, and ids in any order, beyond the vocabulary too."""
    ours, theirs = pairs[data.draw(st.sampled_from(list(KINDS)))]
    skip = data.draw(st.booleans())
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_loaded_directly_only_where_equal(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The Rust library alone serves the plain case; each entry that could change a token goes to transformers."""
    assert load_direct(model_dirs["byte_level"]) is not None
    assert load_direct(model_dirs["sentencepiece"]) is None  # LlamaTokenizer rebuilds what tokenizer.json says
    assert load_direct(model_dirs["word_piece"]) is None
    tokenizer, base = byte_level(), KINDS["byte_level"][1]
    added = {str(i): token for i, token in enumerate(json.loads(tokenizer.to_str())["added_tokens"][:4])}
    for token in added.values():
        del token["id"]
    plain = {**base, "added_tokens_decoder": added, "additional_special_tokens": ["<|start|>"], "add_bos_token": False}
    assert load_direct(write_model_dir(tmp_path, tokenizer, plain)) is not None
    changed = added["0"] | {"lstrip": True}
    for entry in (
        {"pad_token": "<|new|>"},
        {"eos_token": "plain added"},
        {"additional_special_tokens": ["<|new|>"]},
        {"extra_special_tokens": {"image_token": "<|start|>"}},
        {"added_tokens_decoder": {"0": changed}},
        {"added_tokens_decoder": {"999": added["0"]}},
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
        {"split_special_tokens": True},
        {"tokenizer_class": "GPT2Tokenizer"},
    ):
        assert load_direct(write_model_dir(tmp_path, tokenizer, {**plain, **entry})) is None, entry
    assert load_direct(write_model_dir(tmp_path, tokenizer, plain, "qwen2")) is None


def test_added_entries_agree_with_transformers(tmp_path: Path) -> None:
    """Settings that name tokens, direct or not, give transformers' ids."""
    tokenizer, base = byte_level(), KINDS["byte_level"][1]
    for entry in ({"add_bos_token": False}, {"pad_token": "<|new|>"}, {"eos_token": "plain added"}):
        path = write_model_dir(tmp_path, tokenizer, {**base, **entry})
        ours, theirs = Tokenizer(path), transformers.AutoTokenizer.from_pretrained(str(path))
        for text in (*TEXTS, "<|new|>plain added"):
            assert ours.encode(text) == theirs.encode(text)
            assert ours.decode(ours.encode(text), True) == theirs.decode(theirs.encode(text), skip_special_tokens=True)


def test_chat_template_files(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    path = write_model_dir(tmp_path, byte_level(), {**KINDS["byte_level"][1], "chat_template": None})
    tokenizer = Tokenizer(path)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="has no chat template; give a plain prompt"):
        tokenizer.apply_chat_template(MESSAGES)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = Tokenizer(path)
    assert tokenizer.apply_chat_template(MESSAGES) == Tokenizer(model_dirs["byte_level"]).apply_chat_template(MESSAGES)
    text = tokenizer.decode(tokenizer.apply_chat_template(MESSAGES))
    assert text == "<|start|>system\nBe brief.<|end|><|start|>user\nHi 🙂<|end|><|start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("{{ raise_exception('only\nusers speak') }}", {}, r"rejects this conversation \(only\)"),
        ("{% for", {}, "rejects this conversation"),
        ("{{ messages.__class__.__mro__ }}", {}, "rejects this conversation.*unsafe"),
        (TEMPLATE, {"tokenize": False}, "argument tokenize=False cannot be set"),
        (TEMPLATE, {"add_generation_prompt": True, "continue_final_message": True}, "rejects this conversation"),
    ],
)
def test_chat_refusals(tmp_path: Path, template: str, arguments: dict[str, Any], message: str) -> None:
    path = write_model_dir(tmp_path, byte_level(), {**KINDS["byte_level"][1], "chat_template": template})
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer(path).apply_chat_template(MESSAGES, **arguments)
    assert "\n" not in str(error.value)


def test_bad_text(model_dirs: dict[str, Path]) -> None:
    tokenizer = Tokenizer(model_dirs["byte_level"])
    with pytest.raises(ValueError, match="half of a surrogate pair at character 1"):
        tokenizer.encode("a\ud83d")
    with pytest.raises(ValueError, match="half of a surrogate pair at character 0"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\udc00"}])
    with pytest.raises(ValueError, match="token id -3 is negative"):
        tokenizer.decode([5, -3])


def test_no_tokenizer(tmp_path: Path) -> None:
    assert not Tokenizer.exists(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer .* give token ids instead of text"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_damaged_tokenizer(tmp_path: Path, model_dirs: dict[str, Path], kind: str) -> None:
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((model_dirs[kind] / name).read_text())
    (tmp_path / "tokenizer.json").write_text((model_dirs[kind] / "tokenizer.json").read_text()[:500])
    with pytest.raises(ValueError, match=r"cannot be loaded .* copy its files again") as error:
        Tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_direct_use_needs_no_transformers(model_dirs: dict[str, Path]) -> None:
    """The plain case neither imports transformers nor jax: what makes a start quick."""
    code = (
        "import sys; from jaxinfer.tokenizer import IncrementalDetokenizer, Tokenizer\n"
        "assert 'tokenizers' not in sys.modules\n"
        f"t = Tokenizer({str(model_dirs['byte_level'])!r})\n"
        "IncrementalDetokenizer(t, t.encode('a'), stop=['x']).add(5); assert t.eos_token_id == 1\n"
        "assert not {'transformers', 'jax', 'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_is_printed(tmp_path: Path) -> None:
    """No advice to install torch, and no warnings, where transformers is used."""
    path = write_model_dir(tmp_path, sentencepiece(), KINDS["sentencepiece"][1] | {"model_max_length": 100})
    code = (
        "from jaxinfer.tokenizer import Tokenizer\n"
        f"t = Tokenizer({str(path)!r})\n"
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}]); t.encode('word ' * 3000)"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert result.stderr == ""
