"""From a step's numbers to what a request's owner sees: text, log-probabilities, reasons and times. Imports no jax."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from jaxinfer.metrics import EngineMetrics
from jaxinfer.types import CompletionOutput, FinishReason, Logprob, Request, RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from jaxinfer.scheduler.sequence import Sequence
    from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True)
class ScoredTokens:
    """Log-probabilities at several positions: of the token that stands there, and of the most probable ones.

    logprob float32 [R], rank int32 [R] (1 is the most probable), top_token_ids int32 [R, K], top_logprobs
    float32 [R, K], best first.
    """

    logprob: np.ndarray
    rank: np.ndarray
    top_token_ids: np.ndarray
    top_logprobs: np.ndarray

    def entry(self, row: int, token_id: int, num_top: int, decode: Callable[[int], str | None]) -> dict[int, Logprob]:
        """One position as a dict: the token itself first, then the `num_top` best by rank."""
        entry = {token_id: Logprob(float(self.logprob[row]), int(self.rank[row]), decode(token_id))}
        for place in range(num_top):
            other = int(self.top_token_ids[row, place])
            if other not in entry:
                entry[other] = Logprob(float(self.top_logprobs[row, place]), place + 1, decode(other))
        return entry


@dataclass
class RequestState:
    """One request in the engine: its samples and its output so far."""

    request: Request
    sequences: list[Sequence]
    detokenizers: list[IncrementalDetokenizer | None]
    decode_token: Callable[[int], str | None]
    output: RequestOutput = field(init=False)
    num_open: int = field(init=False)
    _last_token_time: list[float] = field(init=False)

    def __post_init__(self) -> None:
        request, count = self.request, len(self.sequences)
        wants_logprobs = request.sampling_params.logprobs is not None
        self.num_open = count
        self._last_token_time = [0.0] * count
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[
                CompletionOutput(
                    index,
                    logprobs=[] if wants_logprobs else None,
                    cumulative_logprob=0.0 if wants_logprobs else None,
                )
                for index in range(count)
            ],
            prompt_logprobs=[None] if request.sampling_params.prompt_logprobs is not None else None,
            metrics=RequestMetrics(arrival_time=request.arrival_time),
        )

    def add_token(
        self,
        sample: int,
        token_id: int,
        logprobs: ScoredTokens | None,
        row: int,
        now: float,
        metrics: EngineMetrics,
        reason: FinishReason | None,
    ) -> str | None:
        """Append one token, which ends the sample where `reason` says so. A stop token is no part of the text.

        Returns the stop string that the token's text completes, if any.
        """
        completion = self.output.outputs[sample]
        completion.token_ids.append(token_id)
        times = self.output.metrics
        if times.first_token_time is None:
            times.first_token_time = now
            metrics.first_token(now - times.arrival_time)
        latency = () if len(completion.token_ids) == 1 else (now - self._last_token_time[sample],)
        metrics.tokens_given(1, latency)
        self._last_token_time[sample] = now
        if sample == 0:
            times.token_times.append(now)
        if logprobs is not None and completion.logprobs is not None and completion.cumulative_logprob is not None:
            num_top = self.request.sampling_params.logprobs or 0
            completion.logprobs.append(logprobs.entry(row, token_id, num_top, self.decode_token))
            completion.cumulative_logprob += float(logprobs.logprob[row])
        detokenizer = self.detokenizers[sample]
        if detokenizer is None or (reason == "stop" and not self.request.sampling_params.include_stop_str_in_output):
            return None
        completion.text += detokenizer.add(token_id)
        return detokenizer.stop_string

    def add_prompt_logprobs(self, first: int, token_ids: Several[int], logprobs: ScoredTokens) -> None:
        """Append those of prompt positions `first`, `first` + 1, ...; a preempted prompt's come a second time."""
        prompt_logprobs, num_top = self.output.prompt_logprobs, self.request.sampling_params.prompt_logprobs
        assert prompt_logprobs is not None
        assert num_top is not None
        assert first <= len(prompt_logprobs)
        for row, token_id in enumerate(token_ids):
            if first + row < len(prompt_logprobs):
                continue
            prompt_logprobs.append(logprobs.entry(row, token_id, num_top, self.decode_token))

    def finish_sample(self, sample: int, reason: FinishReason, stop_reason: int | str | None) -> None:
        completion = self.output.outputs[sample]
        if completion.finish_reason is not None:
            return
        detokenizer = self.detokenizers[sample]
        if detokenizer is not None:
            completion.text += detokenizer.finish()
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        self.num_open -= 1

    def finish(self, now: float, metrics: EngineMetrics, error: str | None = None) -> None:
        """Close the request once every sample has ended, or at once with an error."""
        for sample in range(len(self.sequences)):
            self.finish_sample(sample, "error" if error else "abort", None)
        times = self.output.metrics
        times.finished_time = now
        times.num_cached_tokens = self.sequences[0].num_cached_tokens
        times.num_preemptions = sum(sequence.num_preemptions for sequence in self.sequences)
        self.output.finished, self.output.error = True, error
        reason = self.output.outputs[0].finish_reason or "abort"
        prefill = decode = None
        if times.first_token_time is not None and times.first_scheduled_time is not None:
            prefill = times.first_token_time - times.first_scheduled_time
            decode = now - times.first_token_time
        metrics.request_finished(
            reason,
            now - times.arrival_time,
            prefill_time=prefill,
            decode_time=decode,
            num_output_tokens=sum(len(completion.token_ids) for completion in self.output.outputs),
        )
