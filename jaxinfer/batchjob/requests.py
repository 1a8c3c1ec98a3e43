"""From a line's JSON to what the engine is asked, and the refusal of everything that would be ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Any, Literal

from jaxinfer.batchjob.lines import Line, LineError, parse_object
from jaxinfer.types import MAX_LOGPROBS, SamplingParams

Kind = Literal["plain", "completion", "chat"]

URLS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

_SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
_BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_ID_LISTS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")

# Fields of OpenAI's requests that change nothing here, whatever they are.
_HARMLESS = frozenset({"model", "user", "metadata", "safety_identifier", "prompt_cache_key"})
# Fields whose only served values are those that switch the feature off.
_ONLY_OFF: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class Work:
    """One line, understood. `prompts` are texts or token ids; chat has `messages` instead.

    user_id: a plain line's `id` or an OpenAI line's `custom_id`; has_id tells null from absent.
    """

    line: Line
    kind: Kind
    sampling_params: SamplingParams
    user_id: Any = None
    has_id: bool = False
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """One line that cannot be served, and why. `is_openai` says in which format to answer."""

    line: Line
    message: str
    is_openai: bool = False
    user_id: Any = None
    has_id: bool = False
    status_code: int = 400


def line_seed(seed: int, number: int) -> int:
    """The seed of a line that has none: the same whatever else runs, so a resumed job gives the same tokens."""
    return int.from_bytes(blake2b(f"{seed}/{number}".encode(), digest_size=4).digest(), "little")


def read_work(line: Line, defaults: Mapping[str, Any], seed: int) -> Work | Failure:
    """Understand one line. `defaults`: SamplingParams fields for lines that do not set them; `seed`: the job's."""
    is_openai, user_id, has_id = False, None, False
    try:
        value = parse_object(line.data)
        is_openai = bool(value.keys() & {"custom_id", "body", "method", "url"})
        key = "custom_id" if is_openai else "id"
        user_id, has_id = value.get(key), key in value
        base = {"seed": line_seed(seed, line.number), **defaults}
        work = _openai(line, value, base) if is_openai else _plain(line, value, base)
    except (ValueError, OverflowError) as error:
        return Failure(line, str(error), is_openai, user_id, has_id)
    return work


def _plain(line: Line, value: dict[str, Any], base: Mapping[str, Any]) -> Work:
    if "prompt" not in value:
        raise LineError('the key "prompt" is missing; write for example {"prompt": "..."}')
    given = {key: item for key, item in value.items() if key not in ("prompt", "id")}
    _refuse_unknown(given.keys() - _SAMPLING_FIELDS, "a line with a prompt", _SAMPLING_FIELDS | {"prompt", "id"})
    if isinstance(value.get("id"), dict | list):
        raise LineError("id must be text, a number or null")
    return Work(
        line=line,
        kind="plain",
        sampling_params=_sampling({**base, **given}),
        user_id=value.get("id"),
        has_id="id" in value,
        prompts=(_prompt(value["prompt"]),),
    )


def _openai(line: Line, value: dict[str, Any], base: Mapping[str, Any]) -> Work:
    _refuse_unknown(value.keys() - {"custom_id", "method", "url", "body"}, "a batch line", ())
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(f"custom_id={custom_id!r} must be text that is not empty")
    if value.get("method", "POST") != "POST":
        raise LineError(f"method={value['method']!r} is not served; use POST")
    kind = URLS.get(value["url"]) if isinstance(value.get("url"), str) else None
    if kind is None:
        raise LineError(f"url={value.get('url')!r} is not served; use one of {', '.join(URLS)}")
    body = value.get("body")
    if not isinstance(body, dict):
        raise LineError("body must be a JSON object")
    body = {key: item for key, item in body.items() if item is not None}  # null means "not set" in this API
    _refuse_unserved(body)
    own = ("messages", "chat_template_kwargs") if kind == "chat" else ("prompt", "best_of")
    given = {key: item for key, item in body.items() if key not in (*_HARMLESS, *_ONLY_OFF, *own)}
    best_of = body.get("best_of") if kind == "completion" else None
    if best_of is not None and best_of != body.get("n", 1):
        raise LineError(f"best_of={best_of!r} is not served unless it equals n; use n")
    if kind == "chat":
        base = {"max_tokens": None, **base}
        _chat_names(given)
    known = _SAMPLING_FIELDS | set(own) | ({"max_completion_tokens", "top_logprobs"} if kind == "chat" else set())
    _refuse_unknown(given.keys() - _SAMPLING_FIELDS, f"the body of {value['url']}", known)
    return Work(
        line=line,
        kind=kind,
        sampling_params=_sampling({**base, **given}),
        user_id=custom_id,
        has_id=True,
        prompts=_prompts(body.get("prompt")) if kind == "completion" else (),
        messages=_messages(body.get("messages")) if kind == "chat" else (),
        template_arguments=_template_arguments(body.get("chat_template_kwargs", {})) if kind == "chat" else {},
    )


def _refuse_unknown(unknown: set[str], where: str, known: Any) -> None:
    if unknown:
        names = ", ".join(repr(name) for name in sorted(unknown))
        known_names = f"; known keys: {', '.join(sorted(known))}" if known else ""
        raise LineError(f"unknown {'key' if len(unknown) == 1 else 'keys'} {names} in {where}{known_names}")


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    for name, served in _ONLY_OFF.items():
        if name in body and not any(type(body[name]) is type(off) and body[name] == off for off in served):
            fix = f"use {served[0]!r} or leave it out" if served else "leave it out"
            raise LineError(f"{name}={body[name]!r} is not served in a batch job; {fix}")


def _chat_names(given: dict[str, Any]) -> None:
    """Chat's names for two fields, turned into SamplingParams' in place."""
    if "max_completion_tokens" in given:
        limit = given.pop("max_completion_tokens")
        if given.get("max_tokens", limit) != limit:
            raise LineError(f"max_tokens={given['max_tokens']!r} and max_completion_tokens={limit!r} differ; give one")
        given["max_tokens"] = limit
    wanted = given.pop("logprobs", None)
    top = given.pop("top_logprobs", None)
    if wanted is not None and not isinstance(wanted, bool):
        raise LineError(f"logprobs={wanted!r} must be true or false for chat; set top_logprobs to a number")
    if top is not None and not wanted:
        raise LineError(f"top_logprobs={top!r} needs logprobs: true")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_LOGPROBS):
        raise LineError(f"top_logprobs={top!r} must be a whole number in [0, {MAX_LOGPROBS}]")
    if wanted is not None:
        given["logprobs"] = (top or 0) if wanted else None


def _sampling(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams of JSON values, whose types nobody has looked at yet."""
    for name in _BOOLEANS:
        if not isinstance(values.get(name, False), bool):
            raise LineError(f"{name}={values[name]!r} must be true or false")
    for name in _ID_LISTS:
        if not isinstance(values.get(name), list | tuple | None):
            raise LineError(f"{name}={values[name]!r} must be an array of token ids")
    stop = values.get("stop")
    if stop is not None and not isinstance(stop, str | list | tuple):
        raise LineError(f"stop={stop!r} must be text or an array of texts")
    for text in [stop] if isinstance(stop, str) else stop or ():
        if isinstance(text, str):
            _check_text("stop", text)
    if values.get("logit_bias") is not None:
        values["logit_bias"] = _logit_bias(values["logit_bias"])
    return SamplingParams(**values)


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise LineError(f"logit_bias={value!r} must be an object from token id to bias")
    for key in value:
        if not key.isascii() or not key.isdecimal():
            raise LineError(f"logit_bias key {key!r} is not a token id; use a whole number in quotes")
    return {int(key): bias for key, bias in value.items()}


def _prompt(value: Any, name: str = "prompt") -> str | tuple[int, ...]:
    if isinstance(value, str):
        if not value:
            raise LineError(f"{name} is empty; give at least one character or token id")
        _check_text(name, value)
        return value
    if isinstance(value, list):
        if not value:
            raise LineError(f"{name} is empty; give at least one character or token id")
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return tuple(value)
    raise LineError(f"{name} must be text or an array of token ids")


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A completion's prompt may be an array of prompts."""
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        return tuple(_prompt(item, f"prompt[{index}]") for index, item in enumerate(value))
    return (_prompt(value),)


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise LineError("messages must be an array of at least one message")
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(value))


def _message(name: str, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise LineError(f'{name} must be an object such as {{"role": "user", "content": "..."}}')
    _refuse_unknown(message.keys() - {"role", "content", "name"}, name, ("role", "content", "name"))
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise LineError(f"{name}.content has a part of type {kind!r}; only text parts are served")
            parts.append(part["text"])
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise LineError(f"{name}.content must be text or an array of text parts")
    _check_text(f"{name}.content", content)
    return {**message, "content": content}


def _template_arguments(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise LineError(f"chat_template_kwargs={value!r} must be an object")
    return value


def _check_text(name: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise LineError(f"{name} holds half of a surrogate pair at character {error.start}; remove it") from None
