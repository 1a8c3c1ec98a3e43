"""From OpenAI's bodies, with vLLM's extensions, to what the Frontend is asked. Imports no jax."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.requests import Request

from jaxinfer.openai.bodies import SAMPLING_FIELDS, Kind, check_text, read_body, read_messages, refuse_unknown
from jaxinfer.openai.objects import parse_object
from serving.conversation import Conversation, check_variables
from serving.errors import RequestError
from serving.frontend import Ask

MAX_REQUEST_ID = 256
_MAX_SALT = 1024
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
# Fields that are served here and are not SamplingParams'.
_OWN = frozenset(
    {
        "add_special_tokens",
        "cache_salt",
        "priority",
        "queue_time_limit_ms",
        "request_id",
        "return_token_ids",
        "stream",
        "stream_options",
    }
)
_CHAT_OWN = frozenset({"add_generation_prompt", "continue_final_message"})
_COMPLETION_OWN = frozenset({"echo"})
FIELDS = (
    SAMPLING_FIELDS
    | _OWN
    | _CHAT_OWN
    | _COMPLETION_OWN
    | {"chat_template_kwargs", "messages", "model", "prompt", "tokens"}
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Query:
    """A request for completions, understood; one ask for each prompt. echo: the answer begins with the prompt."""

    kind: Kind
    request_id: str
    asks: tuple[Ask, ...]
    is_streamed: bool
    include_usage: bool
    continuous_usage: bool
    return_token_ids: bool
    return_prompt_logprobs: bool
    echo: bool

    @property
    def n(self) -> int:
        return self.asks[0].sampling_params.n

    @property
    def num_top(self) -> int:
        """Most probable tokens to show at each position."""
        return self.asks[0].sampling_params.logprobs or 0


def understood(read: Callable[[], _T]) -> _T:
    """What `read` gives; its ValueErrors, and OverflowErrors for absurd numbers, become INVALID_ARGUMENT."""
    try:
        return read()
    except (ValueError, OverflowError) as error:
        raise RequestError("INVALID_ARGUMENT", str(error)) from error


def read_request_id(request: Request) -> str:
    """The header's, or a new one. RequestError for one that is no decent name."""
    given = request.headers.get("x-request-id")
    return uuid.uuid4().hex if given is None else understood(lambda: _name("x-request-id", given))


def read_query(kind: Kind, body: bytes, request_id: str, max_prompts: int) -> Query:
    """RequestError, naming the field, for what is wrong in itself and for what would be ignored."""
    arrival_time = time.monotonic()
    return understood(lambda: _read_query(kind, parse_object(body), request_id, max_prompts, arrival_time))


def _read_query(kind: Kind, body: Mapping[str, Any], request_id: str, max_prompts: int, arrival_time: float) -> Query:
    read = read_body(kind, body, where="here", own=_OWN | (_CHAT_OWN if kind == "chat" else _COMPLETION_OWN))
    own = read.own
    is_streamed, options = _boolean(own, "stream"), _stream_options(own)
    params, echo = read.sampling_params, _boolean(own, "echo")
    return_prompt_logprobs = params.prompt_logprobs is not None
    if echo and not return_prompt_logprobs:
        params = replace(params, prompt_logprobs=params.logprobs)  # what is echoed is scored as what follows it
    prompts: tuple[str | tuple[int, ...] | Conversation, ...] = read.prompts
    if len(prompts) > max_prompts:
        raise ValueError(
            f"prompt holds {len(prompts)} prompts, and this server takes {max_prompts}; send fewer at a time"
        )
    if kind == "chat":
        if _boolean(own, "add_special_tokens"):
            raise ValueError("add_special_tokens=True is not served for chat; the template adds its own")
        prompts = (_conversation(read.messages, read.template_arguments, own),)
    limit = _whole(own, "queue_time_limit_ms", 0, 2**31 - 1, None)
    request_id = _name("request_id", own["request_id"]) if "request_id" in own else request_id
    return Query(
        kind=kind,
        request_id=request_id,
        asks=tuple(
            Ask(
                prompt=prompt,
                sampling_params=params,
                arrival_time=arrival_time,
                model=model_of(body),
                priority=_whole(own, "priority", -(2**31), 2**31 - 1, 0) or 0,
                queue_time_limit=None if limit is None else limit / 1000,
                cache_salt=_salt(own.get("cache_salt", "")),
                name=request_id if len(prompts) == 1 else f"{request_id}-{number}",
                add_special_tokens=_boolean(own, "add_special_tokens", True),
            )
            for number, prompt in enumerate(prompts)
        ),
        is_streamed=is_streamed,
        include_usage=options["include_usage"],
        continuous_usage=options["continuous_usage_stats"],
        return_token_ids=_boolean(own, "return_token_ids"),
        return_prompt_logprobs=return_prompt_logprobs,
        echo=echo,
    )


def model_of(body: Mapping[str, Any]) -> str | None:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"model={model!r} must be text")
    return model


def read_tokenize(body: bytes) -> tuple[str | None, str | Conversation, bool]:
    """The body of /tokenize: model, text or conversation, whether to add special tokens."""

    def read() -> tuple[str | None, str | Conversation, bool]:
        given = _given(body)
        chat = {"messages", "chat_template_kwargs", *_CHAT_OWN}
        own = {"model", "add_special_tokens"} | (chat if "messages" in given else {"prompt"})
        refuse_unknown(given.keys() - own, "the body of /tokenize", own)
        if "messages" in given:
            if _boolean(given, "add_special_tokens"):
                raise ValueError("add_special_tokens=True is not served for chat; the template adds its own")
            arguments = given.get("chat_template_kwargs", {})
            if not isinstance(arguments, dict):
                raise ValueError(f"chat_template_kwargs={arguments!r} must be an object")
            return model_of(given), _conversation(read_messages(given["messages"]), arguments, given), False
        if not isinstance(given.get("prompt"), str):
            raise ValueError("prompt must be text, or give messages")
        check_text("prompt", given["prompt"])
        return model_of(given), given["prompt"], _boolean(given, "add_special_tokens", True)

    return understood(read)


def read_detokenize(body: bytes) -> tuple[str | None, tuple[int, ...], bool]:
    """The body of /detokenize: model, token ids, whether to leave special tokens out."""

    def read() -> tuple[str | None, tuple[int, ...], bool]:
        given, own = _given(body), {"model", "tokens", "skip_special_tokens"}
        refuse_unknown(given.keys() - own, "the body of /detokenize", own)
        tokens = given.get("tokens")
        if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
            raise ValueError("tokens must be an array of token ids")
        return model_of(given), tuple(tokens), _boolean(given, "skip_special_tokens")

    return understood(read)


def _given(body: bytes) -> dict[str, Any]:
    """The fields that are set; null means "not set"."""
    return {key: item for key, item in parse_object(body).items() if item is not None}


def _conversation(messages: Any, arguments: Mapping[str, Any], own: Mapping[str, Any]) -> Conversation:
    check_variables("chat_template_kwargs", arguments)
    asked = {name: _boolean(own, name) for name in _CHAT_OWN if name in own}
    return Conversation(tuple(messages), {**arguments, **asked})


def _stream_options(own: Mapping[str, Any]) -> dict[str, bool]:
    options = own.get("stream_options", {})
    if not isinstance(options, dict):
        raise ValueError(f"stream_options={options!r} must be an object")
    refuse_unknown(options.keys() - set(_STREAM_OPTIONS), "stream_options", _STREAM_OPTIONS)
    if options and not _boolean(own, "stream"):
        raise ValueError("stream_options needs stream=true; set it, or leave stream_options out")
    if _boolean(options, "include_obfuscation"):
        raise ValueError("stream_options.include_obfuscation=True is not served; leave it out")
    return {name: _boolean(options, name) for name in _STREAM_OPTIONS}


def _boolean(values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false")
    return value


def _whole(values: Mapping[str, Any], name: str, low: int, high: int, default: int | None) -> int | None:
    value = values.get(name, default)
    if value is not None and (type(value) is not int or not low <= value <= high):
        raise ValueError(f"{name}={value!r} must be a whole number in [{low}, {high}]")
    return value


def _name(field: str, value: Any) -> str:
    is_plain = isinstance(value, str) and value.isascii() and value.isprintable()
    if not is_plain or not 0 < len(value) <= MAX_REQUEST_ID:
        raise ValueError(f"{field} must be 1 to {MAX_REQUEST_ID} plain printable characters")
    return value


def _salt(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_SALT:
        raise ValueError(f"cache_salt must be text of at most {_MAX_SALT} characters")
    check_text("cache_salt", value)
    return value
