"""What an engine counts while it runs, and the frozen picture it gives of it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from jaxinfer.metrics.distribution import Distribution, DistributionStats

_NOTHING_SEEN = DistributionStats()


@dataclass(frozen=True)
class EngineStats:
    """An engine's counts since it started. Times in seconds, memory in bytes, usage as a fraction of 1.

    num_requests               accepted by the engine; `num_finished` by finish reason, one per request
    num_prompt_tokens          in accepted requests; output tokens are those given to users, overshoot left out
    num_queried_prompt_tokens  prompt tokens looked up in the prefix cache, of which num_cached_prompt_tokens were in it
    num_programs_compiled      by XLA, in compile_seconds; num_programs_loaded were ready in the compilation cache
    kv_usage                   part of the KV cache's pages in use now; kv_usage_peak the most at any step
    prefill_time               of a request, from its first step to its first token; decode_time from there to its end
    inter_token_latency        between two tokens of one completion; step_prefill_tokens and step_decode_tokens count
                               the tokens of one step, where it had any
    step_host_time             the part of a step in which the device had nothing to do but wait for the host
    expert_tokens              for every layer with experts, how many tokens each of them was chosen for; brought up to
                               date when the engine has nothing to do, and every some hundred steps
    """

    num_requests: int = 0
    num_finished: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_queried_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_preemptions: int = 0
    num_programs_compiled: int = 0
    num_programs_loaded: int = 0
    compile_seconds: float = 0.0
    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    kv_usage_peak: float = 0.0
    kv_cache_bytes: int = 0
    queue_time: DistributionStats = _NOTHING_SEEN
    time_to_first_token: DistributionStats = _NOTHING_SEEN
    inter_token_latency: DistributionStats = _NOTHING_SEEN
    prefill_time: DistributionStats = _NOTHING_SEEN
    decode_time: DistributionStats = _NOTHING_SEEN
    end_to_end_time: DistributionStats = _NOTHING_SEEN
    request_prompt_tokens: DistributionStats = _NOTHING_SEEN
    request_output_tokens: DistributionStats = _NOTHING_SEEN
    step_time: DistributionStats = _NOTHING_SEEN
    step_host_time: DistributionStats = _NOTHING_SEEN
    step_prefill_tokens: DistributionStats = _NOTHING_SEEN
    step_decode_tokens: DistributionStats = _NOTHING_SEEN
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Part of the prompt tokens looked up that were found; 0 where none was looked up."""
        return self.num_cached_prompt_tokens / max(self.num_queried_prompt_tokens, 1)


class EngineMetrics:
    """Counters, gauges and distributions of one engine. Written by the engine's thread, read by any."""

    def __init__(self, kv_cache_bytes: int = 0) -> None:
        self.kv_cache_bytes = kv_cache_bytes
        self._lock = threading.Lock()
        self._finished: dict[str, int] = {}
        self._requests = self._prompt_tokens = self._output_tokens = 0
        self._queried = self._cached = self._preemptions = 0
        self._compiled = self._loaded = self._steps = self._running = self._waiting = 0
        self._compile_seconds = self._kv_usage = self._kv_usage_peak = 0.0
        self._queue_time = Distribution()
        self._first_token = Distribution()
        self._inter_token = Distribution()
        self._prefill_time = Distribution()
        self._decode_time = Distribution()
        self._end_to_end = Distribution()
        self._request_prompt_tokens = Distribution()
        self._request_output_tokens = Distribution()
        self._step_time = Distribution()
        self._host_time = Distribution()
        self._prefill_tokens = Distribution()
        self._decode_tokens = Distribution()
        self._expert_tokens: dict[int, tuple[int, ...]] = {}

    def request_added(self, num_prompt_tokens: int) -> None:
        with self._lock:
            self._requests += 1
            self._prompt_tokens += num_prompt_tokens
            self._request_prompt_tokens.add(num_prompt_tokens)

    def request_scheduled(self, queue_time: float, num_queried_tokens: int = 0, num_cached_tokens: int = 0) -> None:
        """A request left the queue for the first time, with this much of its prompt found in the prefix cache."""
        with self._lock:
            self._queue_time.add(queue_time)
            self._queried += num_queried_tokens
            self._cached += num_cached_tokens

    def first_token(self, time_to_first_token: float) -> None:
        with self._lock:
            self._first_token.add(time_to_first_token)

    def tokens_given(self, num_tokens: int, latencies: Iterable[float] = ()) -> None:
        """Tokens went to users; `latencies` are those since the token before, for tokens that had one."""
        with self._lock:
            self._output_tokens += num_tokens
            self._inter_token.extend(latencies)

    def request_finished(
        self,
        reason: str,
        end_to_end_time: float | None = None,
        *,
        prefill_time: float | None = None,
        decode_time: float | None = None,
        num_output_tokens: int = 0,
    ) -> None:
        """A request is over; times that it has none of, because it was never that far, are None."""
        with self._lock:
            self._finished[reason] = self._finished.get(reason, 0) + 1
            self._request_output_tokens.add(num_output_tokens)
            for distribution, seconds in (
                (self._prefill_time, prefill_time),
                (self._decode_time, decode_time),
                (self._end_to_end, end_to_end_time),
            ):
                if seconds is not None:
                    distribution.add(seconds)

    def preempted(self, num_requests: int = 1) -> None:
        with self._lock:
            self._preemptions += num_requests

    def programs_compiled(self, num_programs: int = 1, seconds: float = 0.0) -> None:
        with self._lock:
            self._compiled += num_programs
            self._compile_seconds += seconds

    def programs_loaded(self, num_programs: int = 1) -> None:
        with self._lock:
            self._loaded += num_programs

    def step_finished(
        self,
        *,
        seconds: float,
        host_seconds: float,
        num_prefill_tokens: int,
        num_decode_tokens: int,
        num_running: int,
        num_waiting: int,
        kv_usage: float,
    ) -> None:
        with self._lock:
            self._steps += 1
            self._step_time.add(seconds)
            self._host_time.add(host_seconds)
            if num_prefill_tokens:
                self._prefill_tokens.add(num_prefill_tokens)
            if num_decode_tokens:
                self._decode_tokens.add(num_decode_tokens)
        self.set_gauges(num_running=num_running, num_waiting=num_waiting, kv_usage=kv_usage)

    def set_gauges(self, *, num_running: int, num_waiting: int, kv_usage: float) -> None:
        """What holds now, for moments between steps such as an abort."""
        with self._lock:
            self._running, self._waiting, self._kv_usage = num_running, num_waiting, kv_usage
            self._kv_usage_peak = max(self._kv_usage_peak, kv_usage)

    def experts_chosen(self, layer: int, num_tokens: Iterable[int]) -> None:
        """How many more tokens each expert of a layer was chosen for."""
        with self._lock:
            more = tuple(num_tokens)
            before = self._expert_tokens.get(layer, (0,) * len(more))
            self._expert_tokens[layer] = tuple(map(sum, zip(before, more, strict=True)))

    def snapshot(self, *, exact: bool = True) -> EngineStats:
        """exact=False: percentiles from histograms, so that asking does not hold the engine up."""
        with self._lock:
            return EngineStats(
                num_requests=self._requests,
                num_finished=MappingProxyType(dict(self._finished)),
                num_prompt_tokens=self._prompt_tokens,
                num_output_tokens=self._output_tokens,
                num_queried_prompt_tokens=self._queried,
                num_cached_prompt_tokens=self._cached,
                num_preemptions=self._preemptions,
                num_programs_compiled=self._compiled,
                num_programs_loaded=self._loaded,
                compile_seconds=self._compile_seconds,
                num_steps=self._steps,
                num_running=self._running,
                num_waiting=self._waiting,
                kv_usage=self._kv_usage,
                kv_usage_peak=self._kv_usage_peak,
                kv_cache_bytes=self.kv_cache_bytes,
                queue_time=self._queue_time.stats(exact=exact),
                time_to_first_token=self._first_token.stats(exact=exact),
                inter_token_latency=self._inter_token.stats(exact=exact),
                prefill_time=self._prefill_time.stats(exact=exact),
                decode_time=self._decode_time.stats(exact=exact),
                end_to_end_time=self._end_to_end.stats(exact=exact),
                request_prompt_tokens=self._request_prompt_tokens.stats(exact=exact),
                request_output_tokens=self._request_output_tokens.stats(exact=exact),
                step_time=self._step_time.stats(exact=exact),
                step_host_time=self._host_time.stats(exact=exact),
                step_prefill_tokens=self._prefill_tokens.stats(exact=exact),
                step_decode_tokens=self._decode_tokens.stats(exact=exact),
                expert_tokens=MappingProxyType(dict(self._expert_tokens)),
            )
