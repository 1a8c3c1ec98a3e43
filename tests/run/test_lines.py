"""Which lines are understood, as what, and what is said of the others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.batchjob.lines import InputFile, JobError, Line
from jaxinfer.batchjob.records import encode, failure_record, identity
from jaxinfer.batchjob.requests import Failure, Work, line_seed, read_work
from jaxinfer.openai.objects import BodyError, parse_object


def read(value: Any, defaults: dict[str, Any] | None = None, seed: int = 0) -> Work | Failure:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return read_work(Line(7, data, "0123456789abcdef"), defaults or {}, seed)


def chat(**body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(**body: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi", **body}}


def work(value: Any, defaults: dict[str, Any] | None = None) -> Work:
    result = read(value, defaults)
    assert isinstance(result, Work), result
    return result


def test_plain_line_with_every_kind_of_field() -> None:
    line = {
        "prompt": "def f",
        "id": 12,
        "n": 2,
        "temperature": 1,
        "top_k": 5,
        "stop": ["\n"],
        "logit_bias": {"12": -5},
        "max_tokens": None,
        "seed": 3,
        "ignore_eos": True,
        "stop_token_ids": [1, 2],
        "prompt_logprobs": 1,
    }
    got = work(line)
    assert (got.kind, got.prompts, got.user_id, got.has_id) == ("plain", ("def f",), 12, True)
    params = got.sampling_params
    assert (params.n, params.top_k, params.max_tokens, params.seed) == (2, 5, None, 3)
    assert params.logit_bias == {12: -5}
    assert params.stop_token_ids == (1, 2)


def test_token_ids_are_a_prompt() -> None:
    assert work({"prompt": [1, 2, 3]}).prompts == ((1, 2, 3),)
    assert not work({"prompt": [1]}).has_id


def test_defaults_fill_what_a_line_leaves_open() -> None:
    defaults = {"max_tokens": 5, "temperature": 0.0, "stop": ["x"]}
    params = work({"prompt": "a", "temperature": 0.5}, defaults).sampling_params
    assert (params.max_tokens, params.temperature, params.stop_strings) == (5, 0.5, ("x",))
    assert work({"prompt": "a"}).sampling_params.max_tokens == 16
    assert work(completion()).sampling_params.max_tokens == 16
    assert work(chat()).sampling_params.max_tokens is None
    assert work(chat(), defaults).sampling_params.max_tokens == 5
    assert work(chat(max_tokens=None), defaults).sampling_params.max_tokens == 5


def test_a_line_without_a_seed_gets_one_from_its_number() -> None:
    assert work({"prompt": "a"}).sampling_params.seed == line_seed(0, 7)
    assert len({line_seed(seed, number) for seed in range(10) for number in range(100)}) == 1000
    assert work({"prompt": "a", "seed": 5}).sampling_params.seed == 5


def test_chat_line() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "name": "n", "content": parts}]
    got = work(
        chat(
            messages=messages,
            model="any",
            user="u",
            stream=False,
            max_completion_tokens=9,
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "text"},
            tools=[],
            chat_template_kwargs={"loud": True},
        )
    )
    assert got.kind == "chat"
    assert got.messages[1] == {"role": "user", "name": "n", "content": "ab"}
    assert (got.sampling_params.max_tokens, got.sampling_params.logprobs) == (9, 3)
    assert got.template_arguments == {"loud": True}
    assert work(chat(logprobs=True)).sampling_params.logprobs == 0
    assert work(chat(logprobs=False), {"logprobs": 2}).sampling_params.logprobs is None
    assert work(chat(max_tokens=4, max_completion_tokens=4)).sampling_params.max_tokens == 4


def test_completion_line_of_several_prompts() -> None:
    assert work(completion(prompt=["a", "b"])).prompts == ("a", "b")
    assert work(completion(prompt=[[1], [2, 3]])).prompts == ((1,), (2, 3))
    assert work(completion(prompt=[1, 2])).prompts == ((1, 2),)
    assert work(completion(prompt=["a", [1]])).prompts == ("a", (1,))
    assert work(completion(logprobs=2, n=2, best_of=2)).sampling_params.logprobs == 2


BAD = [
    (b"{", "not JSON"),
    (b"\xff", "not UTF-8 at byte 0"),
    (b"[" * 100_000, "nested too deeply"),
    (b"[1]", "must be a JSON object, not an array"),
    (b"3", "not a number"),
    (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
    (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is not a finite number"),
    (b'{"id": 1e400}', "1e400 is not a finite number"),
    (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature=10* must be a finite number"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "a", "stop": "\\ud800"}', "surrogate"),
    ({}, '"prompt" is missing'),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": 5}, "text or an array of token ids"),
    ({"prompt": [1, True]}, "text or an array of token ids"),
    ({"prompt": ["a", "b"]}, "text or an array of token ids"),
    ({"prompt": "a", "max_token": 5}, "unknown key 'max_token'.*max_tokens"),
    ({"prompt": "a", "x": 5, "y": 1}, "unknown keys 'x', 'y'"),
    ({"prompt": "a", "id": {}}, "id must be"),
    ({"prompt": "a", "temperature": -1}, "temperature=-1 is out of range"),
    ({"prompt": "a", "temperature": "hot"}, "temperature='hot'"),
    ({"prompt": "a", "n": None}, "n=None must be a whole number"),
    ({"prompt": "a", "n": 0}, "n=0"),
    ({"prompt": "a", "top_p": 0}, "top_p=0"),
    ({"prompt": "a", "stop": 5}, "stop=5 must be text"),
    ({"prompt": "a", "stop": [5]}, "stop=5"),
    ({"prompt": "a", "stop_token_ids": 5}, "stop_token_ids=5 must be an array"),
    ({"prompt": "a", "ignore_eos": "yes"}, "ignore_eos='yes' must be true or false"),
    ({"prompt": "a", "ignore_eos": None}, "ignore_eos=None must be true or false"),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias=.* must be an object"),
    ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias key='a' must be a whole number"),
    ({"prompt": "a", "logprobs": True}, "logprobs=True"),
    ({"prompt": "a", "logprobs": 21}, "logprobs=21"),
    ({"prompt": "a", "min_tokens": 5, "max_tokens": 2}, "lower min_tokens"),
    ({**chat(), "extra": 1}, "unknown key 'extra' in a batch line"),
    ({**chat(), "custom_id": 5}, "custom_id=5"),
    ({**chat(), "custom_id": ""}, "custom_id=''"),
    ({**chat(), "method": "GET"}, "method='GET'"),
    ({**chat(), "url": "/v1/embeddings"}, "url='/v1/embeddings' is not served; use one of /v1/completions"),
    ({**chat(), "url": ["x"]}, "url="),
    ({"custom_id": "c", "url": "/v1/completions"}, "body must be"),
    (chat(messages=[]), "at least one message"),
    (chat(messages=[{}] * 20000), "messages has 20000 entries; use at most 16384"),
    (chat(messages="hi"), "messages must be an array"),
    (chat(messages=["hi"]), r"messages\[0\] must be an object"),
    (chat(messages=[{"role": "user"}]), r"messages\[0\].content must be text"),
    (chat(messages=[{"role": "user", "content": "a", "tool_calls": []}]), "unknown key 'tool_calls'"),
    (chat(messages=[{"role": "u", "content": [{"type": "image_url", "image_url": {}}]}]), "type 'image_url'"),
    (chat(messages=[{"role": "u", "content": [{"type": "text", "text": 3}]}]), "must be text"),
    (chat(max_tokens=3, max_completion_tokens=4), "differ; give one"),
    (chat(logprobs=3), "logprobs=3 must be true or false"),
    (chat(top_logprobs=3), "needs logprobs: true"),
    (chat(logprobs=True, top_logprobs=21), r"top_logprobs=21 must be a whole number in \[0, 20\]"),
    (chat(stream=True), "stream=True is not served"),
    (chat(stream_options={}), "stream_options={} is not served in a batch job; leave it out"),
    (chat(tools=[{"type": "function"}]), "tools="),
    (chat(response_format={"type": "json_object"}), "response_format="),
    (chat(prompt="x"), "unknown key 'prompt'"),
    (chat(chat_template_kwargs=3), "chat_template_kwargs=3"),
    (completion(echo=True), "echo=True"),
    (completion(best_of=3), "best_of=3"),
    (completion(messages=[]), "unknown key 'messages'"),
    (completion(prompt=None), "prompt must be text"),
    (completion(prompt=["a", ""]), r"prompt\[1\] is empty"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[str(index) for index in range(len(BAD))])
def test_bad_lines_say_what_is_wrong(line: Any, message: str) -> None:
    result = read(line)
    assert isinstance(result, Failure), result
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.message)
    assert "\n" not in result.message
    record = failure_record(result)
    assert identity(json.loads(encode(record))) == (7, "0123456789abcdef", True)
    assert "line 7: " in json.dumps(record)


def test_a_key_given_twice_among_many_is_found_at_once() -> None:
    keys = ",".join(f'"{number}":1' for number in range(20000))
    started = time.process_time()
    with pytest.raises(BodyError, match="'z' is there twice"):
        parse_object(f'{{{keys},"z":1,"z":2}}'.encode())
    assert time.process_time() - started < 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = """
prompt id n stop seed logit_bias temperature max_tokens logprobs stop_token_ids ignore_eos allowed_token_ids
messages model best_of top_logprobs chat_template_kwargs
"""
fields = st.sampled_from(FIELDS.split())


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(fields, json_values), st.sampled_from(["plain", "/v1/completions", "/v1/chat/completions"]))
def test_no_json_value_anywhere_ends_the_job(body: dict[str, Any], kind: str) -> None:
    line = body if kind == "plain" else {"custom_id": "c", "url": kind, "body": body}
    result = read(line)
    if isinstance(result, Failure):
        assert identity(json.loads(encode(failure_record(result)))) == (7, "0123456789abcdef", True)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_end_the_job(data: bytes) -> None:
    read(data)


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a":1}\r\n\n   \n{"b":2}\n{"c":3}')
    source = InputFile(str(path))
    assert [(line.number, line.data) for line in source.lines()] == [(1, b'{"a":1}'), (4, b'{"b":2}'), (5, b'{"c":3}')]


def test_digest_is_of_the_line_and_the_settings(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("a\nb\na\n")
    first, second, third = (line.digest for line in InputFile(str(path), "s").lines())
    assert first == third != second
    assert next(InputFile(str(path), "t").lines()).digest != first


def test_unreadable_input_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(JobError, match="cannot read the input"):
            InputFile(str(path)).check()
