"""The offline API: generate, chat, stream, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxinfer.llm import LLM, Delta
from jaxinfer.types import SamplingParams
from tests.e2e.harness import GOLDENS, Twin, greedy, random_prompts, text_of, tokens_of


def test_prompts_of_every_form(llm: LLM) -> None:
    text = 'text of "a prompt"'
    token_ids = llm.engine.tokenizer.encode(text)
    assert text_of(token_ids) == text
    (expected,) = llm.generate(text, greedy(6))
    assert expected.prompt == text
    assert expected.prompt_token_ids == token_ids
    assert expected.outputs[0].text == text_of(expected.outputs[0].token_ids)
    forms: list[Any] = [token_ids, tuple(token_ids), np.array(token_ids), [text], [token_ids], np.array([token_ids])]
    for form in forms:
        (output,) = llm.generate(form, greedy(6))
        assert output.prompt_token_ids == token_ids
        assert tokens_of([output]) == tokens_of([expected])
    assert len(llm.generate([text, token_ids], greedy(2))) == 2
    assert llm.generate([], greedy(2)) == []


def test_outputs_come_in_the_prompts_order(llm: LLM, twin: Twin) -> None:
    prompts = random_prompts(1, 30, 3, 12, 60, 5, 9)
    params = [greedy(count) for count in (3, 20, 1, 12, 7, 2)]
    outputs = llm.generate(prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    for output, own in zip(outputs, params, strict=True):
        assert len(output.outputs[0].token_ids) == own.max_tokens
        times = output.metrics
        assert times.finished_time is not None
        assert times.first_token_time is not None
        assert times.first_scheduled_time is not None
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
        assert len(times.token_times) == own.max_tokens


BAD_CALLS: dict[str, tuple[Any, Any]] = {
    "2 sampling_params for 3 prompts; give one, or one for each": ([[5], [6], [7]], [greedy(1)] * 2),
    "the prompt is empty": ([[5], []], None),
    "prompt token id 96 is outside the vocabulary": ([[5], [6, 96]], None),
    "prompt token id 1.5 must be a whole number": ([[5], [1.5]], None),
    "prompt token id 'a' must be a whole number": ([[5], ["a"]], None),
    "prompt=None must be text or token ids": ([[5], None], None),
    "prompt=b'bytes' must be text or token ids": ([[5], b"bytes"], None),
    "prompts=None must be text, token ids, or a list of these": (None, None),
    "must be SamplingParams": ([[5], [6]], [greedy(1), {"temperature": 0}]),
    "the prompt has 100 tokens, but max_model_len=96": ([[5], [5] * 100], None),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_are_refused_before_anything_runs(llm: LLM, message: str) -> None:
    prompts, params = BAD_CALLS[message]
    num_steps = llm.engine.stats().num_steps
    with pytest.raises(ValueError, match=message) as refused:
        llm.generate(prompts, params)
    assert "\n" not in str(refused.value)
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats().num_steps == num_steps


def test_chat_without_a_template_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match="messages is empty"):
        llm.chat([])


def joined(deltas: list[Delta], index: int) -> tuple[str, list[int], Any, Any]:
    own = [delta for delta in deltas if delta.index == index]
    assert [delta.finish_reason is None for delta in own] == [True] * (len(own) - 1) + [False]
    logprobs = [entry for delta in own for entry in delta.logprobs or []]
    return "".join(delta.text for delta in own), [t for delta in own for t in delta.token_ids], logprobs, own[-1]


@pytest.mark.parametrize("stop", [None, "found"])
def test_streamed_deltas_join_to_the_whole(llm: LLM, stop: str | None) -> None:
    (prompt,) = random_prompts(2, 20)
    fields: dict[str, Any] = {"n": 3, "seed": 4, "max_tokens": 15, "ignore_eos": True, "logprobs": 1}
    (whole,) = llm.generate(prompt, SamplingParams(**fields))
    if stop is not None:
        fields["stop"] = whole.outputs[1].text[5:8]
        (whole,) = llm.generate(prompt, SamplingParams(**fields))
    deltas = list(llm.stream(prompt, SamplingParams(**fields)))
    assert len(deltas) > 15
    for completion in whole.outputs:
        text, token_ids, logprobs, last = joined(deltas, completion.index)
        assert (text, token_ids) == (completion.text, completion.token_ids)
        assert (last.finish_reason, last.stop_reason) == (completion.finish_reason, completion.stop_reason)
        assert completion.logprobs is not None
        assert [list(entry) for entry in logprobs] == [list(entry) for entry in completion.logprobs]


def test_streams_beside_each_other(llm: LLM) -> None:
    """Two streams taken in turns, and a generate between: whoever steps, each gets all of its own."""
    prompts = random_prompts(3, 10, 18, 5)
    expected = llm.generate(prompts, greedy(12))
    streams = [llm.stream(prompt, greedy(12)) for prompt in prompts[:2]]
    deltas: list[list[Delta]] = [[next(streams[0])], []]
    (between,) = llm.generate(prompts[2], greedy(12))
    assert tokens_of([between]) == tokens_of(expected[2:])
    for own, stream in zip(deltas, streams, strict=True):
        own.extend(stream)
    for own, output in zip(deltas, expected, strict=False):
        assert joined(own, 0)[:2] == (output.outputs[0].text, output.outputs[0].token_ids)


def test_closed_and_dropped_streams_end_their_requests(llm: LLM) -> None:
    (prompt,) = random_prompts(4, 10)
    stream = llm.stream(prompt, greedy(50))
    next(stream)
    assert llm.engine.has_unfinished()
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_unfinished()
    never_read = llm.stream(prompt, greedy(50))
    assert llm.engine.has_unfinished()
    del never_read
    assert not llm.engine.has_unfinished()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        llm.stream([1000])


def test_stop_strings_need_a_tokenizer() -> None:
    without = LLM(GOLDENS / "gemma2", max_model_len=96, page_size=4, num_pages=30, max_num_seqs=4)
    with pytest.raises(ValueError, match=r"stop=\('x',\) needs text, and .*gemma2 has no tokenizer"):
        without.generate([5], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match=r"gemma2 has no tokenizer .* give token ids instead of text"):
        without.generate("text")
    assert not without.engine.has_unfinished()


def test_bad_settings_are_refused(model_directory: Path) -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=4 is less than max_num_seqs=8"):
        LLM(model_directory, max_num_seqs=8, max_num_batched_tokens=4)
    with pytest.raises(ValueError, match="num_pages=3 and kv_cache_memory=100 both size the KV cache"):
        LLM(model_directory, num_pages=3, kv_cache_memory=100)
    with pytest.raises(ValueError, match=r"kv_cache_memory=100 bytes holds 0 pages .* give at least"):
        LLM(model_directory, kv_cache_memory=100)
    with pytest.raises(ValueError, match="attention backend 'fast' is unknown; choose one of"):
        LLM(model_directory, attention_backend="fast")


def test_kv_cache_memory_named_by_the_error_is_enough(model_directory: Path) -> None:
    settings: dict[str, Any] = {"max_model_len": 96, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    with pytest.raises(ValueError, match="give at least") as refused:
        LLM(model_directory, kv_cache_memory=100, **settings)
    enough = int(str(refused.value).split("give at least ")[1].split(" ")[0])
    engine = LLM(model_directory, kv_cache_memory=enough, **settings).engine
    assert engine.plan.kv_cache_bytes <= enough
    assert engine.scheduler.stats().kv.num_pages > 0


def test_environment_chooses_the_mesh(model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFER_MESH", "tensor=64")
    with pytest.raises(ValueError, match="64"):
        LLM(model_directory)
