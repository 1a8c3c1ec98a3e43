"""The bodies of /v1/completions and /v1/chat/completions: what is asked, and the refusal of all that would be ignored.

Imports no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jaxinfer.openai.objects import BodyError
from jaxinfer.types import MAX_LOGPROBS, SamplingParams

Kind = Literal["completion", "chat"]

URLS: dict[str, Kind] = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}

MAX_MESSAGES = 2**14
SAMPLING_FIELDS = frozenset(f.name for f in fields(SamplingParams))
_BOOLEANS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens")
_ID_LISTS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids")

# Fields that change nothing here, whatever they are.
_HARMLESS = frozenset({"model", "user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"})
# Fields whose only served values are those that switch the feature off.
_ONLY_OFF: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
}


@dataclass(frozen=True)
class Body:
    """A body, understood. `prompts` are texts or token ids; chat has `messages` instead.

    own: the fields that whoever read it serves itself, as they were given.
    """

    sampling_params: SamplingParams
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)


def read_body(
    kind: Kind,
    body: Mapping[str, Any],
    *,
    where: str,
    base: Mapping[str, Any] | None = None,
    own: AbstractSet[str] = frozenset(),
) -> Body:
    """Understand a body; ValueError (OverflowError for absurd numbers) for what is wrong, with the field named.

    where: "here", say: where it is served, for messages. base: SamplingParams fields for a body that does not set
    them. own: fields that the caller serves, and checks, itself.
    """
    body = {key: item for key, item in body.items() if item is not None}  # null means "not set" in this API
    _refuse_unserved({key: item for key, item in body.items() if key not in own}, where)
    prompt_fields = ("messages", "chat_template_kwargs") if kind == "chat" else ("prompt", "best_of")
    elsewhere = {*_HARMLESS, *_ONLY_OFF, *prompt_fields, *own}
    given = {key: item for key, item in body.items() if key not in elsewhere}
    best_of = body.get("best_of") if kind == "completion" else None
    if best_of is not None and best_of != body.get("n", 1):
        raise BodyError(f"best_of={best_of!r} is not served unless it equals n; use n")
    base = base or {}
    if kind == "chat":
        base = {"max_tokens": None, **base}
        _chat_names(given)
    known = (
        SAMPLING_FIELDS
        | {*prompt_fields, *own}
        | ({"max_completion_tokens", "top_logprobs"} if kind == "chat" else set())
    )
    refuse_unknown(given.keys() - SAMPLING_FIELDS, f"a {kind} body", known)
    return Body(
        sampling_params=read_sampling({**base, **given}),
        prompts=_prompts(body.get("prompt")) if kind == "completion" else (),
        messages=read_messages(body.get("messages")) if kind == "chat" else (),
        template_arguments=_template_arguments(body.get("chat_template_kwargs", {})) if kind == "chat" else {},
        own={key: item for key, item in body.items() if key in own},
    )


def refuse_unknown(unknown: set[str], where: str, known: Any) -> None:
    if unknown:
        names = ", ".join(repr(name) for name in sorted(unknown))
        known_names = f"; known keys: {', '.join(sorted(known))}" if known else ""
        raise BodyError(
            f"unknown {'key' if len(unknown) == 1 else 'keys'} {names} in {where}{known_names}", min(unknown)
        )


def _refuse_unserved(body: Mapping[str, Any], where: str) -> None:
    for name, served in _ONLY_OFF.items():
        if name in body and not any(type(body[name]) is type(off) and body[name] == off for off in served):
            fix = f"use {served[0]!r} or leave it out" if served else "leave it out"
            raise BodyError(f"{name}={body[name]!r} is not served {where}; {fix}")


def _chat_names(given: dict[str, Any]) -> None:
    """Chat's names for two fields, turned into SamplingParams' in place."""
    if "max_completion_tokens" in given:
        limit = given.pop("max_completion_tokens")
        if given.get("max_tokens", limit) != limit:
            raise BodyError(f"max_tokens={given['max_tokens']!r} and max_completion_tokens={limit!r} differ; give one")
        given["max_tokens"] = limit
    wanted = given.pop("logprobs", None)
    top = given.pop("top_logprobs", None)
    if wanted is not None and not isinstance(wanted, bool):
        raise BodyError(f"logprobs={wanted!r} must be true or false for chat; set top_logprobs to a number")
    if top is not None and not wanted:
        raise BodyError(f"top_logprobs={top!r} needs logprobs: true")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or not 0 <= top <= MAX_LOGPROBS):
        raise BodyError(f"top_logprobs={top!r} must be a whole number in [0, {MAX_LOGPROBS}]")
    if wanted is not None:
        given["logprobs"] = (top or 0) if wanted else None


def read_sampling(values: dict[str, Any]) -> SamplingParams:
    """SamplingParams of JSON values, whose types nobody has looked at yet."""
    for name in _BOOLEANS:
        if not isinstance(values.get(name, False), bool):
            raise BodyError(f"{name}={values[name]!r} must be true or false")
    for name in _ID_LISTS:
        if not isinstance(values.get(name), list | tuple | None):
            raise BodyError(f"{name}={values[name]!r} must be an array of token ids")
    stop = values.get("stop")
    if stop is not None and not isinstance(stop, str | list | tuple):
        raise BodyError(f"stop={stop!r} must be text or an array of texts")
    for text in [stop] if isinstance(stop, str) else stop or ():
        if isinstance(text, str):
            check_text("stop", text)
    bias = values.get("logit_bias")
    if bias is not None and not isinstance(bias, dict):
        raise BodyError(f"logit_bias={bias!r} must be an object from token id to bias")
    return SamplingParams(**values)


def read_prompt(value: Any, name: str = "prompt") -> str | tuple[int, ...]:
    if isinstance(value, str):
        if not value:
            raise BodyError(f"{name} is empty; give at least one character or token id")
        check_text(name, value)
        return value
    if isinstance(value, list):
        if not value:
            raise BodyError(f"{name} is empty; give at least one character or token id")
        if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return tuple(value)
    raise BodyError(f"{name} must be text or an array of token ids")


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """A completion's prompt may be an array of prompts."""
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        return tuple(read_prompt(item, f"prompt[{index}]") for index, item in enumerate(value))
    return (read_prompt(value),)


def read_messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise BodyError("messages must be an array of at least one message")
    if len(value) > MAX_MESSAGES:
        raise BodyError(f"messages has {len(value)} entries; use at most {MAX_MESSAGES}")
    return tuple(_message(f"messages[{index}]", message) for index, message in enumerate(value))


def _message(name: str, message: Any) -> Mapping[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BodyError(f'{name} must be an object such as {{"role": "user", "content": "..."}}')
    refuse_unknown(message.keys() - {"role", "content", "name"}, name, ("role", "content", "name"))
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
                kind = part.get("type") if isinstance(part, dict) else part
                raise BodyError(f"{name}.content has a part of type {kind!r}; only text parts are served")
            parts.append(part["text"])
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        raise BodyError(f"{name}.content must be text or an array of text parts")
    check_text(f"{name}.content", content)
    return {**message, "content": content}


def _template_arguments(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BodyError(f"chat_template_kwargs={value!r} must be an object")
    return value


def check_text(name: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BodyError(f"{name} holds half of a surrogate pair at character {error.start}; remove it") from None
