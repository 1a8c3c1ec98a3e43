"""Plain host data that crosses rooms: what a user asks for and what comes back. Imports no jax."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
# More than any vocabulary has; what is longer would hold up everyone else while it is looked at.
MAX_TOKEN_IDS = 2**18
_DIGITS = re.compile("0|[1-9][0-9]{0,9}")  # "05" would be a second name of 5


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Names and defaults follow vLLM's.

    temperature 0 is greedy. `top_k` 0 (or -1), `top_p` 1, `min_p` 0 and `typical_p` 1 switch a filter off.
    `max_tokens` None means "until the model's context is full". `seed` None draws one from the engine's seed and the
    request's number. `logprobs` / `prompt_logprobs` n give the chosen token's log-probability and the n best, of the
    model's own distribution before temperature and filters.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Refuse wrong types and values out of range or in contradiction: ValueError naming the value, limit and fix.

        numpy's numbers are taken and stored as Python's; sequences are stored as tuples; `logit_bias` keys may be
        digits in a string, as JSON has them.
        """
        self._store("n", _whole("n", self.n, 1, 1024))
        self._store("temperature", _number("temperature", self.temperature, 0.0, 100.0))
        self._store("top_k", max(0, _whole("top_k", self.top_k, -1)))
        for name in ("top_p", "typical_p"):
            self._store(name, _number(name, getattr(self, name), 0.0, 1.0, low_open=True))
        self._store("min_p", _number("min_p", self.min_p, 0.0, 1.0))
        repetition_penalty = _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        self._store("repetition_penalty", repetition_penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            self._store(name, _number(name, getattr(self, name), -100.0, 100.0))
        self._store("min_tokens", _whole("min_tokens", self.min_tokens, 0))
        for name, low, high in (
            ("max_tokens", 1, None),
            ("seed", 0, 2**32 - 1),
            ("logprobs", 0, MAX_LOGPROBS),
            ("prompt_logprobs", 0, MAX_LOGPROBS),
        ):
            if getattr(self, name) is not None:
                self._store(name, _whole(name, getattr(self, name), low, high))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if type(value).__name__ not in ("bool", "bool_"):
                raise ValueError(f"{name}={value!r} must be True or False")
            self._store(name, bool(value))
        if self.stop is not None:
            self._store("stop", (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop))
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={text!r} must be a non-empty string; remove it")
        for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            if getattr(self, name) is not None:
                self._store(name, _token_ids(name, getattr(self, name)))
        if self.logit_bias is not None:
            self._store("logit_bias", _logit_bias(self.logit_bias))
        self._refuse_contradictions()

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}; lower min_tokens"
            )
        if self.allowed_token_ids is None:
            return
        if not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty, so no token could be chosen; list one at least")
        if set(self.allowed_token_ids) <= set(self.banned_token_ids or ()):
            raise ValueError("every one of allowed_token_ids is in banned_token_ids; allow a token that is not banned")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def check_against_vocabulary(params: SamplingParams, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> None:
    """Refuse what only the model's vocabulary shows to be wrong: ids beyond it, and settings that leave no token.

    eos_token_ids: the model's own end tokens, which min_tokens suppresses together with `stop_token_ids`.
    """
    for name in ("logit_bias", "allowed_token_ids", "banned_token_ids", "stop_token_ids"):
        largest = max(getattr(params, name) or (-1,))
        if largest >= vocab_size:
            raise ValueError(
                f"{name} holds token id {largest}, but the model's vocabulary has {vocab_size} tokens; "
                f"use ids below {vocab_size}"
            )
    excluded = set(params.banned_token_ids or ())
    if params.min_tokens:
        excluded |= set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(eos_token_ids))
    allowed = range(vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
    if len(excluded) >= len(set(allowed)) and excluded.issuperset(allowed):
        raise ValueError(
            f"banned_token_ids, and the stop tokens that min_tokens={params.min_tokens} suppresses, leave none of the "
            f"{len(set(allowed))} tokens that could be chosen; ban fewer, allow more or lower min_tokens"
        )


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> float:
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r} must be a finite number")
    if not (low < number if low_open else low <= number) or number > high:
        raise ValueError(f"{name}={value} is out of range; use a value in {'(' if low_open else '['}{low:g}, {high:g}]")
    return number


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    if type(value) is int:  # nearly always, and found out sooner than by asking numbers
        number = value
    elif isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    else:
        raise ValueError(f"{name}={value!r} must be a whole number")
    if number < low or (high is not None and number > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}={number} is out of range; use a value {limit}")
    return number


def _items(name: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{name}={value!r} must be a list")
    return tuple(value)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    ids, entry = _items(name, value), f"{name} entry"
    _check_count(name, len(ids))
    return tuple(_whole(entry, token_id, 0) for token_id in ids)


def _check_count(name: str, count: int) -> None:
    if count > MAX_TOKEN_IDS:
        raise ValueError(f"{name} has {count} entries; use at most {MAX_TOKEN_IDS}")


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias={value!r} must map token ids to numbers")
    _check_count("logit_bias", len(value))
    biases = {}
    for key, bias in value.items():
        token_id = int(key) if isinstance(key, str) and _DIGITS.fullmatch(key) else key
        biases[_whole("logit_bias key", token_id, 0)] = _number("logit_bias value", bias, -100.0, 100.0)
    return biases


@dataclass(frozen=True)
class Request:
    """One prompt to complete. `priority`: lower runs earlier. `arrival_time`: seconds on time.monotonic()."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    prompt: str | None = None
    priority: int = 0
    arrival_time: float = 0.0
    cache_salt: str = ""


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of one token, its rank (1 is the most probable), and its text when decoded."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of a request's `n` completions. `logprobs[i]` maps token id to Logprob at output position i."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Seconds on time.monotonic(); None until it happened. `token_times` are those of the first completion."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    token_times: list[float] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def queue_time(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def inter_token_latencies(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    @property
    def end_to_end_time(self) -> float | None:
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclass
class RequestOutput:
    """A request's state so far (or its end, when `finished`). `prompt_logprobs[0]` is None: nothing precedes it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    error: str | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
