"""The published client of OpenAI, unmodified, against a real server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jaxinfer.llm import LLM
from jaxinfer.types import SamplingParams
from tests.serving.harness import Brake
from tests.serving.http.harness import threaded_server

PROMPT = "one small prompt"
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
RENDERED = "system: be brief user: hi answer: "
GREEDY: Any = {"model": "small", "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def address(shared_llm: LLM) -> Iterator[str]:
    with threaded_server(shared_llm.engine) as address:
        yield address


@pytest.fixture
def client(address: str, llm: LLM) -> Iterator[openai.OpenAI]:
    """`llm` checks afterwards that the engine is left empty."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def _expected(llm: LLM, prompt: str | list[int], max_tokens: int, **fields: Any) -> Any:
    """The engine's own answer; the server's thread sleeps meanwhile."""
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **fields))
    return output


def test_completion(client: openai.OpenAI, llm: LLM) -> None:
    expected = _expected(llm, PROMPT, 8)
    answer = client.completions.create(prompt=PROMPT, max_tokens=8, **GREEDY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.outputs[0].text, "length")
    assert (answer.object, answer.model) == ("text_completion", "small")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (16, 8, 24)


def test_streamed_completion(client: openai.OpenAI, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _expected(llm, PROMPT, 12)
    options: Any = {"include_usage": True}
    with Brake(llm.engine, monkeypatch) as brake:
        brake.let(6)
        stream = client.completions.create(prompt=PROMPT, max_tokens=12, stream=True, stream_options=options, **GREEDY)
        first = next(stream)
    chunks = [first, *stream]
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == expected.outputs[0].text
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len(parts) > 1, "it began while the engine was held"
    assert all(part.usage is None for part in parts)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (16, 12)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_chat(client: openai.OpenAI, llm: LLM, is_streamed: bool) -> None:
    expected = _expected(llm, RENDERED, 10).outputs[0].text
    if is_streamed:
        parts = list(client.chat.completions.create(messages=MESSAGES, max_tokens=10, stream=True, **GREEDY))
        assert parts[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
        assert parts[-1].choices[0].finish_reason == "length"
        assert all(part.usage is None for part in parts)
    else:
        answer = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=10, **GREEDY)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", expected)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(RENDERED)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_prompts_with_several_completions(client: openai.OpenAI, llm: LLM, is_streamed: bool) -> None:
    """Choices of prompt i begin at i * n, and their seeds make them what they are alone."""
    prompts: list[Any] = ["first", "second one"]
    alone = [llm.generate([prompt], SamplingParams(max_tokens=6, n=2, seed=7, ignore_eos=True)) for prompt in prompts]
    expected = [completion.text for (output,) in alone for completion in output.outputs]
    call: Any = {"model": "small", "prompt": prompts, "n": 2, "seed": 7, "max_tokens": 6}
    call |= {"extra_body": {"ignore_eos": True}}
    if is_streamed:
        texts = [""] * 4
        for part in client.completions.create(stream=True, **call):
            for choice in part.choices:
                texts[choice.index] += choice.text
    else:
        answer = client.completions.create(**call)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        texts = [choice.text for choice in answer.choices]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (15, 24)
    assert texts == expected
    assert len(set(texts)) == 4


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_of_completions(client: openai.OpenAI, llm: LLM, is_streamed: bool) -> None:
    expected = _expected(llm, PROMPT, 6, logprobs=2).outputs[0]
    call: Any = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 2, **GREEDY}
    if is_streamed:
        found = [part.choices[0].logprobs for part in client.completions.create(stream=True, **call)]
    else:
        found = [client.completions.create(**call).choices[0].logprobs]
    tokens = [token for part in found for token in part.tokens]
    assert "".join(tokens) == expected.text
    chosen = [at[token].logprob for token, at in zip(expected.token_ids, expected.logprobs, strict=True)]
    assert [value for part in found for value in part.token_logprobs] == pytest.approx(chosen, abs=1e-4)
    assert [at for part in found for at in part.text_offset] == [len("".join(tokens[:i])) for i in range(6)]
    for at in [at for part in found for at in part.top_logprobs]:
        assert 2 <= len(at) <= 3


@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_of_chat(client: openai.OpenAI, llm: LLM, is_streamed: bool) -> None:
    call: Any = {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 3, **GREEDY}
    if is_streamed:
        parts = list(client.chat.completions.create(stream=True, **call))
        content = [entry for part in parts for entry in part.choices[0].logprobs.content]
    else:
        content = client.chat.completions.create(**call).choices[0].logprobs.content
    assert len(content) == 6
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the best"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) < 1


def test_stop_and_what_is_beside_openais_fields(client: openai.OpenAI, llm: LLM) -> None:
    whole = _expected(llm, PROMPT, 20).outputs[0]
    stop = whole.text[4:6]
    answer = client.completions.create(prompt=PROMPT, max_tokens=20, stop=[stop], **GREEDY)
    assert answer.choices[0].text == whole.text[: whole.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop  # pyright: ignore[reportAttributeAccessIssue]
    for fields, check in (
        ({"allowed_token_ids": [40, 41]}, lambda ids: set(ids) <= {40, 41}),
        ({"logit_bias": {"50": 100}}, lambda ids: set(ids) == {50}),
        ({"banned_token_ids": list(range(90))}, lambda ids: min(ids) >= 90),
        ({"stop_token_ids": [int(whole.token_ids[2])], "min_tokens": 1}, lambda ids: ids[-1] == whole.token_ids[2]),
        ({"top_k": 1, "temperature": 1.0}, lambda ids: ids == whole.token_ids[:8]),
        ({"min_p": 1.0, "temperature": 1.0}, lambda ids: ids == whole.token_ids[:8]),
        ({"repetition_penalty": 50.0}, lambda ids: ids != whole.token_ids[:8]),
        ({"priority": 3, "cache_salt": "pepper", "skip_special_tokens": False}, lambda ids: ids == whole.token_ids[:8]),
    ):
        body = {"return_token_ids": True, "ignore_eos": True, **fields}
        temperature: Any = body.pop("temperature", 0)
        choice = client.completions.create(
            model="small", prompt=PROMPT, max_tokens=8, temperature=temperature, extra_body=body
        ).choices[0]
        assert check(choice.token_ids), fields  # pyright: ignore[reportAttributeAccessIssue]


def test_prompt_logprobs_and_token_ids(client: openai.OpenAI, llm: LLM) -> None:
    expected = _expected(llm, [5, 6, 7, 8], 2, prompt_logprobs=1)
    body = {"prompt_logprobs": 1, "return_token_ids": True, "ignore_eos": True}
    answer: Any = client.completions.create(
        model="small", prompt=[5, 6, 7, 8], max_tokens=2, temperature=0, extra_body=body
    )
    (choice,) = answer.choices
    assert choice.prompt_token_ids == [5, 6, 7, 8]
    assert choice.prompt_logprobs[0] is None
    for token_id, at, known in zip([6, 7, 8], choice.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert at[str(token_id)]["logprob"] == pytest.approx(known[token_id].logprob, abs=1e-4)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("small", "jaxinfer")
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError, match="'big'"):
        client.models.retrieve("big")


@pytest.mark.parametrize("prompt", [PROMPT, [5, 6, 7, 8]])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_echo(client: openai.OpenAI, llm: LLM, prompt: str | list[int], is_streamed: bool) -> None:
    """The prompt precedes each completion, and is scored as they are; its own logprobs come if they are asked for."""
    expected = _expected(llm, prompt, 4, logprobs=2, prompt_logprobs=2)
    body = {"ignore_eos": True, "echo": True, "prompt_logprobs": 2}
    arguments: Any = {"prompt": prompt, "max_tokens": 4, "n": 2, "logprobs": 2, **GREEDY, "extra_body": body}
    answer = client.completions.create(**arguments, stream=is_streamed)
    choices = [choice for part in (answer if is_streamed else [answer]) for choice in part.choices]
    tokenizer = llm.engine.tokenizer
    text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=True)
    for index in range(2):
        own = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in own) == text + expected.outputs[0].text
        scores = [score for choice in own for score in choice.logprobs.token_logprobs]
        (first, *known), token_ids = expected.prompt_logprobs, expected.prompt_token_ids + expected.outputs[0].token_ids
        pairs = zip(token_ids[1:], known + expected.outputs[0].logprobs, strict=True)
        assert first is None
        assert scores[0] is None
        assert scores[1:] == pytest.approx([at[token_id].logprob for token_id, at in pairs], abs=1e-4)
        offsets = [offset for choice in own for offset in choice.logprobs.text_offset]
        tokens = [token for choice in own for token in choice.logprobs.tokens]
        assert offsets == [sum(map(len, tokens[:place])) for place in range(len(tokens))]
    with_prompt = [choice for choice in choices if getattr(choice, "prompt_logprobs", None)]
    assert {choice.index for choice in with_prompt} >= {0}
    assert len(with_prompt[0].prompt_logprobs) == len(expected.prompt_token_ids)
    arguments["extra_body"] = {"ignore_eos": True, "echo": True}
    (choice, _) = client.completions.create(**arguments).choices
    assert choice.text.startswith(text)
    assert not hasattr(choice, "prompt_logprobs")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"frobnicate": 1}, "frobnicate", "unknown key"),
        ({"echo": 1}, "echo", "true or false"),
        ({"suffix": "x"}, "suffix", "not served"),
        ({"logprobs": 21}, "logprobs", "20"),
        ({"n": 5}, "n", "4"),
        ({"top_k": 1.5}, "top_k", "whole number"),
        ({"best_of": 3}, "best_of", "use n"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"prompt": [5, 96]}, "prompt", "vocabulary"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "x" * 96}, None, "max_model_len=96"),
        ({"prompt": ["x"] * 21}, "prompt", "21 prompts"),
        ({"stream": 1}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"x": True}}, "x", "unknown key"),
        ({"priority": "high"}, "priority", "whole number"),
        ({"request_id": "a\nb"}, "request_id", "printable"),
        ({"cache_salt": 5}, "cache_salt", "text"),
        ({"temperature": 10**400}, None, ""),
        ({"guided_json": {}}, "guided_json", "unknown key"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not served"),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str | None, words: str, is_streamed: bool
) -> None:
    """Before anything is sent, a stream included; the field is named."""
    body = {**({"stream": True} if is_streamed and "stream_options" not in fields else {}), **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="x", extra_body=body)
    assert words in caught.value.message
    assert caught.value.type == "invalid_request_error"
    if param is not None:
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"echo": True}, "echo"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_is_refused_of_chats(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="small", messages=MESSAGES, extra_body=fields)
    assert caught.value.param == param, caught.value.message


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'big' is not served") as caught:
        client.completions.create(model="big", prompt="x")
    assert caught.value.param == "model"


def test_without_waiting(address: str, llm: LLM) -> None:
    """Eight at a time from the client for asyncio, streamed and not."""
    expected = _expected(llm, PROMPT, 12).outputs[0].text

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=20) as client:

            async def stream() -> str:
                text = ""
                async for part in await client.completions.create(prompt=PROMPT, max_tokens=12, stream=True, **GREEDY):
                    text += part.choices[0].text
                return text

            async def whole() -> str:
                return (await client.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY)).choices[0].text

            texts = await asyncio.gather(*(one() for one in (stream, whole) * 4))
            assert texts == [expected] * 8

    asyncio.run(scenario())
