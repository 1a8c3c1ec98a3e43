"""From additions to OpenAI's answers, whole or as server-sent events. Imports no jax."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from jaxinfer.openai.answers import chat_logprobs, completion_logprobs, finite, token_text, usage
from jaxinfer.types import Logprob
from serving.deltas import Delta, Prompt, SequenceDelta
from serving.errors import RequestError
from serving.frontend import Frontend
from serving.http.encoding import encode, event
from serving.http.errors import ReaderStalled, error_object
from serving.http.reading import Query
from serving.request_stream import RequestStream

log = logging.getLogger(__name__)

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Echo:
    """A prompt as its answer repeats it: its text, and that of its first token, which has no logprobs to tell it."""

    text: str
    first_token: str


class Answer:
    """One query's answer on its way; the choices of prompt number i begin at i * n. echoes: by prompt, if asked for."""

    def __init__(self, query: Query, model: str, echoes: Sequence[Echo]) -> None:
        self._query = query
        self._echoes = echoes
        self._is_chat = query.kind == "chat"
        self._head = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{query.request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self._prompts: dict[int, Prompt] = {}
        self._num_completion_tokens: dict[int, int] = {}  # by choice
        self._num_cached_tokens = 0
        self._offsets: dict[int, int] = {}  # by choice: characters of the tokens so far

    def whole(self, deltas: Sequence[Delta]) -> bytes:
        """The JSON answer. deltas: all that was added, for each prompt."""
        choices = []
        for number, delta in enumerate(deltas):
            self._count(number, delta)
            for index in sorted(delta.sequences):
                choice = self._choice(number, delta.sequences[index])
                text = choice.pop("delta", None)
                if text is not None:
                    choice["message"] = {"refusal": None, **text}
                choices.append({**choice, **self._of_prompt(number)})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return encode({**self._head, "object": kind, "choices": choices, "usage": self._usage()})

    def events(self, number: int, delta: Delta) -> bytes:
        """The events for an addition to prompt `number`: one for each completion that it adds to."""
        self._count(number, delta)
        return b"".join(self._events(number, delta))

    def last_events(self) -> bytes:
        usage = self._chunk([], self._usage()) if self._query.include_usage else b""
        return usage + _DONE

    def _events(self, number: int, delta: Delta) -> Iterator[bytes]:
        for index in sorted(delta.sequences):
            choice = self._choice(number, delta.sequences[index])
            if delta.prompt is not None:
                choice |= self._of_prompt(number)
            yield self._chunk([choice], self._usage() if self._query.continuous_usage else None)

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        chunk = {**self._head, "object": kind, "choices": choices}
        if self._query.include_usage or self._query.continuous_usage:
            chunk["usage"] = usage
        return event(chunk)

    def _count(self, number: int, delta: Delta) -> None:
        if delta.prompt is not None:
            self._prompts[number] = delta.prompt
        for sequence in delta.sequences.values():
            self._num_completion_tokens[number * self._query.n + sequence.index] = sequence.num_tokens
        if delta.end is not None:
            self._num_cached_tokens += delta.end.num_cached_tokens

    def _usage(self) -> dict[str, Any]:
        return usage(
            num_prompt_tokens=sum(len(prompt.token_ids) for prompt in self._prompts.values()),
            num_completion_tokens=sum(self._num_completion_tokens.values()),
            num_cached_tokens=self._num_cached_tokens,
        )

    def _choice(self, number: int, sequence: SequenceDelta) -> dict[str, Any]:
        """One completion's part. Chat's text is under "delta", with the role in a completion's first part."""
        index = number * self._query.n + sequence.index
        first, choice = index not in self._offsets, dict[str, Any](index=index)
        offset = self._offsets.setdefault(index, 0)
        if self._is_chat:
            choice["delta"] = {**({"role": "assistant"} if first else {}), "content": sequence.text}
            choice["logprobs"] = chat_logprobs(sequence.token_ids, sequence.logprobs, self._query.num_top)
        else:
            text, token_ids, scores, unscored = sequence.text, sequence.token_ids, sequence.logprobs, ""
            if first and self._query.echo:
                prompt, echo = self._prompts[number], self._echoes[number]
                text, unscored = echo.text + text, echo.first_token
                if scores is not None and prompt.logprobs is not None:
                    scored = prompt.token_ids[: len(prompt.logprobs)]  # not all, where the request ended too soon
                    token_ids, scores = [*scored, *token_ids], [*prompt.logprobs, *scores]
            choice["text"] = text
            choice["logprobs"] = logprobs = completion_logprobs(token_ids, scores, offset, unscored)
            if logprobs is not None:
                self._offsets[index] += sum(map(len, logprobs["tokens"]))
        choice |= {"finish_reason": sequence.finish_reason, "stop_reason": sequence.stop_reason}
        if self._query.return_token_ids:
            choice["token_ids"] = sequence.token_ids
        return choice

    def _of_prompt(self, number: int) -> dict[str, Any]:
        """What is said of the prompt, beside each completion of a whole answer or of a stream's first part."""
        prompt, result = self._prompts[number], {}
        if prompt.logprobs is not None and self._query.return_prompt_logprobs:
            result["prompt_logprobs"] = [None if at is None else _scored(at) for at in prompt.logprobs]
        if self._query.return_token_ids:
            result["prompt_token_ids"] = list(prompt.token_ids)
        return result


async def whole(frontend: Frontend, query: Query) -> bytes:
    """The answer once it is complete; RequestError where it is refused or fails."""
    async with AsyncExitStack() as stack:
        streams = await _submit(frontend, query, stack)
        echoes, deltas = await _echoes(frontend, query, streams), []
        for stream in streams:
            delta = await stream.next()
            while delta.end is None:
                delta.add(await stream.next())
            if delta.end.error is not None:
                raise _logged(query, delta.end.error)
            deltas.append(delta)
    return Answer(query, frontend.name, echoes).whole(deltas)


async def stream(frontend: Frontend, query: Query, write: Callable[[bytes], Awaitable[None]]) -> None:
    """Write the answer's events as they come. RequestError before the first; a later failure is the last event."""
    async with AsyncExitStack() as stack:
        streams = await _submit(frontend, query, stack)
        answer, has_written = Answer(query, frontend.name, await _echoes(frontend, query, streams)), False
        additions = _merged(streams)
        await stack.enter_async_context(aclosing(additions))
        try:
            async for number, delta in additions:
                if events := answer.events(number, delta):
                    await write(events)
                    has_written = True
                if delta.end is not None and delta.end.error is not None:
                    raise _logged(query, delta.end.error)
        except ReaderStalled:
            raise
        except RequestError as error:
            if not has_written:
                raise
            await write(event(error_object(error)))
        else:
            await write(answer.last_events())


async def _submit(frontend: Frontend, query: Query, stack: AsyncExitStack) -> list[RequestStream]:
    return [
        await stack.enter_async_context(await frontend.submit(ask, is_streamed=query.is_streamed)) for ask in query.asks
    ]


async def _echoes(frontend: Frontend, query: Query, streams: Sequence[RequestStream]) -> list[Echo]:
    """RequestError where the model has no tokenizer."""
    echoes = []
    if query.echo:
        with frontend.counting_refusals():
            for stream, ask in zip(streams, query.asks, strict=True):
                prompt, token_ids = ask.prompt, tuple(stream.request.prompt_token_ids)
                if not isinstance(prompt, str):
                    prompt = await frontend.text_of(token_ids, ask.sampling_params.skip_special_tokens)
                echoes.append(Echo(prompt, await frontend.text_of(token_ids[:1], skip_special_tokens=True)))
    return echoes


async def _merged(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(number of the stream, addition) from all of them, as they come."""
    coming = {asyncio.create_task(stream.next()): number for number, stream in enumerate(streams)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = coming.pop(task)
                delta = task.result()
                yield number, delta
                if delta.end is None:
                    coming[asyncio.create_task(streams[number].next())] = number
    finally:
        for task in coming:
            task.cancel()
        if coming:
            await asyncio.wait(coming)


def _logged(query: Query, error: RequestError) -> RequestError:
    if error.code == "INTERNAL":
        log.error("request_id=%r: %s", query.request_id, error.message)
    return error


def _scored(at: Mapping[int, Logprob]) -> dict[str, Any]:
    """vLLM's form of a prompt position: by token id."""
    return {
        str(token_id): {"logprob": finite(entry), "rank": entry.rank, "decoded_token": token_text(token_id, entry)}
        for token_id, entry in at.items()
    }
