"""What a step adds to a request's answer, and how two such additions become one. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxinfer.types import Logprob, RequestOutput
from serving.errors import RequestError

Reason = Literal["stop", "length", "abort", "error", "time_limit"]


@dataclass
class SequenceDelta:
    """What was added to one of a request's completions. `finish_reason` is None while it goes on."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: Reason | None = None
    stop_reason: int | str | None = None
    num_tokens: int = 0  # of the whole completion so far
    cumulative_logprob: float | None = None
    last_token_id: int | None = None


@dataclass(frozen=True)
class Prompt:
    """What is said of the prompt, once."""

    token_ids: tuple[int, ...]
    logprobs: list[dict[int, Logprob] | None] | None


@dataclass
class End:
    """A request's last word. Times in seconds, None where the moment never came. `error`: why it is not complete."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    queue_time: float | None
    time_to_first_token: float | None
    decode_time: float | None
    total_time: float | None
    num_preemptions: int
    finish_reasons: tuple[Reason | None, ...]  # of each completion
    error: RequestError | None = None


@dataclass
class Delta:
    """An addition to one request's answer; `sequences` by index."""

    sequences: dict[int, SequenceDelta] = field(default_factory=dict)
    prompt: Prompt | None = None
    end: End | None = None

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences.values())

    def add(self, later: Delta) -> None:
        """Take in the addition that follows this one."""
        self.prompt = self.prompt or later.prompt
        self.end = later.end
        for index, more in later.sequences.items():
            known = self.sequences.get(index)
            if known is None:
                self.sequences[index] = more
                continue
            known.text += more.text
            known.token_ids += more.token_ids
            if known.logprobs is not None and more.logprobs is not None:
                known.logprobs += more.logprobs
            known.finish_reason, known.stop_reason = more.finish_reason, more.stop_reason
            known.num_tokens, known.cumulative_logprob = more.num_tokens, more.cumulative_logprob
            known.last_token_id = more.last_token_id


class DeltaMaker:
    """Cuts an engine's growing RequestOutput into additions. Runs in the engine's thread and hands out copies only."""

    def __init__(self, output: RequestOutput) -> None:
        count = len(output.outputs)
        self._output = output
        self._texts, self._tokens, self._ended = [0] * count, [0] * count, [False] * count
        self._prompt_given = False

    @property
    def has_given(self) -> bool:
        return self._prompt_given

    def take(self, reason: Reason | None = None, error: RequestError | None = None) -> Delta:
        """What was added since the last time. reason, error: why the request ended, where the engine cannot know."""
        output, delta = self._output, Delta()
        if not self._prompt_given:
            self._prompt_given = True
            logprobs = None if output.prompt_logprobs is None else list(output.prompt_logprobs)
            delta.prompt = Prompt(tuple(output.prompt_token_ids), logprobs)
        for i, completion in enumerate(output.outputs):
            first = self._tokens[i]
            finish_reason = completion.finish_reason
            if self._ended[i] or (len(completion.token_ids) == first and finish_reason is None):
                continue
            text, token_ids = completion.text[self._texts[i] :], completion.token_ids[first:]
            self._texts[i] += len(text)
            self._tokens[i] += len(token_ids)
            self._ended[i] = finish_reason is not None
            delta.sequences[i] = SequenceDelta(
                index=i,
                text=text,
                token_ids=token_ids,
                logprobs=None if completion.logprobs is None else completion.logprobs[first:],
                finish_reason=_better(finish_reason, reason),
                stop_reason=completion.stop_reason,
                num_tokens=self._tokens[i],
                cumulative_logprob=completion.cumulative_logprob,
                last_token_id=completion.token_ids[-1] if completion.token_ids else None,
            )
        if output.finished:
            delta.end = self._end(reason, error)
        return delta

    def _end(self, reason: Reason | None, error: RequestError | None) -> End:
        output, times = self._output, self._output.metrics
        decode = None
        if times.first_token_time is not None and times.finished_time is not None:
            decode = times.finished_time - times.first_token_time
        if error is None and output.error is not None:
            error = RequestError("INTERNAL", output.error)
        return End(
            num_prompt_tokens=len(output.prompt_token_ids),
            num_completion_tokens=sum(self._tokens),
            num_cached_tokens=times.num_cached_tokens,
            queue_time=times.queue_time,
            time_to_first_token=times.time_to_first_token,
            decode_time=decode,
            total_time=times.end_to_end_time,
            num_preemptions=times.num_preemptions,
            finish_reasons=tuple(_better(completion.finish_reason, reason) for completion in output.outputs),
            error=error,
        )


def _better(engines: Reason | None, reason: Reason | None) -> Reason | None:
    """Why a completion ended: the engine's word, unless all it knows is that somebody ended it."""
    return reason if reason is not None and engines in ("abort", "error") else engines
