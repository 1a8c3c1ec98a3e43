"""Plain host data that crosses rooms: what a user asks for and what comes back. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20


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
        """Refuse values outside their range: ValueError naming the value, the limit and the fix."""
        _whole("n", self.n, 1, 1024)
        _number("temperature", self.temperature, 0.0, 100.0)
        _whole("top_k", self.top_k, -1)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("typical_p", self.typical_p, 0.0, 1.0, low_open=True)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _number("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}; lower min_tokens"
                )
        if self.seed is not None:
            _whole("seed", self.seed, 0, 2**32 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 0, MAX_LOGPROBS)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for text in self.stop or ():
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={text!r} must be a non-empty string; remove it")
        for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids"):
            ids = getattr(self, name)
            if ids is not None:
                for token_id in ids:
                    _whole(f"{name} entry", token_id, 0)
                object.__setattr__(self, name, tuple(ids))
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty, so no token could be chosen; list at least one or leave it out")
        if self.logit_bias is not None:
            for token_id, bias in self.logit_bias.items():
                _whole("logit_bias key", token_id, 0)
                _number("logit_bias value", bias, -100.0, 100.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} must be a finite number")
    if not (low < value if low_open else low <= value) or value > high:
        raise ValueError(f"{name}={value} is out of range; use a value in {'(' if low_open else '['}{low:g}, {high:g}]")


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} must be a whole number")
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name}={value} is out of range; use a value {limit}")


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
