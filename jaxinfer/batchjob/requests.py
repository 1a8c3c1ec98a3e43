"""From a line's JSON to what the engine is asked, and the refusal of everything that would be ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from jaxinfer.batchjob.lines import Line
from jaxinfer.openai.bodies import SAMPLING_FIELDS, URLS, read_body, read_prompt, read_sampling, refuse_unknown
from jaxinfer.openai.objects import BodyError, parse_object
from jaxinfer.types import SamplingParams

Kind = Literal["plain", "completion", "chat"]


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
        raise BodyError('the key "prompt" is missing; write for example {"prompt": "..."}')
    given = {key: item for key, item in value.items() if key not in ("prompt", "id")}
    refuse_unknown(given.keys() - SAMPLING_FIELDS, "a line with a prompt", SAMPLING_FIELDS | {"prompt", "id"})
    if isinstance(value.get("id"), dict | list):
        raise BodyError("id must be text, a number or null")
    return Work(
        line=line,
        kind="plain",
        sampling_params=read_sampling({**base, **given}),
        user_id=value.get("id"),
        has_id="id" in value,
        prompts=(read_prompt(value["prompt"]),),
    )


def _openai(line: Line, value: dict[str, Any], base: Mapping[str, Any]) -> Work:
    refuse_unknown(value.keys() - {"custom_id", "method", "url", "body"}, "a batch line", ())
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BodyError(f"custom_id={custom_id!r} must be text that is not empty")
    if value.get("method", "POST") != "POST":
        raise BodyError(f"method={value['method']!r} is not served; use POST")
    kind = URLS.get(value["url"]) if isinstance(value.get("url"), str) else None
    if kind is None:
        raise BodyError(f"url={value.get('url')!r} is not served; use one of {', '.join(URLS)}")
    if not isinstance(value.get("body"), dict):
        raise BodyError("body must be a JSON object")
    body = read_body(kind, value["body"], where="in a batch job", base=base)
    return Work(
        line=line,
        kind=kind,
        sampling_params=body.sampling_params,
        user_id=custom_id,
        has_id=True,
        prompts=body.prompts,
        messages=body.messages,
        template_arguments=body.template_arguments,
    )
