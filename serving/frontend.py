"""What every protocol stands on: one model, its tokenizer, admission, and the way to the engine. Imports no jax."""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from jaxinfer.metrics import EngineMetrics
from jaxinfer.tokenizer import Tokenizer
from jaxinfer.types import Request, SamplingParams
from serving import tracing
from serving.admission import Admission
from serving.conversation import Conversation
from serving.deltas import End
from serving.engine_loop import EngineLoop
from serving.errors import RequestError
from serving.logs import log_request
from serving.refusals import Refusals
from serving.request_stream import RequestStream
from serving.settings import (
    MAX_PROMPT_BYTES_PER_TOKEN,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    SPARE_CONNECTIONS,
    Limits,
    ModelFacts,
)

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_ABORT_SECONDS = 5.0
_LARGE_BYTES = 65536


@dataclass(frozen=True)
class Ask:
    """A request as a protocol understood it. queue_time_limit in seconds; arrival_time on time.monotonic().

    name: what its client calls it, which others may do too; "" where it gave none.
    """

    prompt: str | tuple[int, ...] | Conversation
    sampling_params: SamplingParams
    arrival_time: float
    model: str | None = None
    priority: int = 0
    queue_time_limit: float | None = None
    cache_salt: str = ""
    name: str = ""
    add_special_tokens: bool = True  # to a prompt that is text


class Frontend:
    """Takes requests to the engine. Belongs to one event loop.

    on_health is called whenever `healthy` changes. on_end is called once a request that was taken in is over: with what
    was asked, what its caller said of a trace (tracing.py), and how it ended, or the error where the engine did not
    take it. `dead` is set when the engine's thread has ended of itself.
    """

    def __init__(self, open_engine: Callable[[], Engine], name: str, limits: Limits) -> None:
        self.name = name
        self.limits = limits
        self.admission = Admission()
        self.engine = EngineLoop(open_engine, self._set_health, self._died, limits)
        self.facts: ModelFacts
        self.tokenizer: Tokenizer | None = None
        self.on_health: list[Callable[[bool], None]] = []
        self.on_end: list[Callable[[Ask, Request, Mapping[str, str], End | RequestError], None]] = []
        self.healthy = False
        self.engine_metrics: EngineMetrics | None = None  # once the model is loaded
        self.refusals = Refusals()
        self.draining = asyncio.Event()
        self.dead: asyncio.Event = asyncio.Event()
        self.cause_of_death: BaseException | None = None
        self._num_calls = 0
        self._has_ended = False  # what was taken in is aborted
        self._numbers = itertools.count()
        # One thread: tokenizers are not made for several at once, and two cores have better things to do.
        self._executor = ThreadPoolExecutor(1, "tokenizer")
        self._reader = ThreadPoolExecutor(1, "reader")

    async def start(self) -> None:
        """Load the model and compile; afterwards requests are taken. Raises what loading raised."""
        engine = await self.engine.start()
        self.engine_metrics = engine.metrics
        plan, loaded = engine.plan, engine.loaded
        self.facts = ModelFacts(
            name=self.name,
            max_model_len=plan.max_model_len,
            num_slots=plan.num_slots,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            vocab_size=loaded.config.vocab_size,
            dtype=plan.dtype.name,
            page_size=plan.tokens_per_page,
            num_pages=max(plan.num_pages),
            eos_token_ids=tuple(loaded.generation.eos_token_ids),
        )
        if Tokenizer.exists(loaded.directory):
            # Another than the engine's, which its thread uses at any time.
            self.tokenizer = await self._in_executor(lambda: Tokenizer(loaded.directory))
        limits, facts = self.limits, self.facts
        queued = 4 * facts.num_slots if limits.max_queued_requests is None else limits.max_queued_requests
        tokens = limits.max_queued_tokens or plan.num_shards * max(
            64 * facts.max_num_batched_tokens, 8 * facts.max_model_len
        )
        self.admission.open(facts.num_slots + queued, tokens)
        self._set_health(True)

    async def drain(self, grace: float) -> bool:
        """Take nothing more, and wait for what was taken. Returns whether all of it ended by itself in time."""
        self.admission.close("the server is shutting down")
        self._set_health(False)
        self.draining.set()
        try:
            async with asyncio.timeout(grace):
                await self.admission.wait_until_empty()
        except TimeoutError:
            log.warning("%d requests have not ended in %.0f s and are aborted", self.admission.num_requests, grace)
            self._has_ended = True
            self.engine.cancel_all(_shut_down())
            try:
                async with asyncio.timeout(_ABORT_SECONDS):
                    await self.admission.wait_until_empty()
            except TimeoutError:
                log.warning("%d requests could not be aborted: the engine does not answer", self.admission.num_requests)
            return False
        return True

    async def stop(self) -> None:
        await self.engine.stop()
        for executor in (self._executor, self._reader):
            executor.shutdown(wait=False, cancel_futures=True)

    def check_model(self, model: str | None) -> None:
        """RequestError for another model than this server's."""
        if self.admission.closed:
            self.admission.enter(0)  # raises, and says why
        if model and model != self.name:
            raise RequestError("NOT_FOUND", f"model={model!r} is not served here; use {self.name!r} or leave it unset")

    async def understand(self, num_bytes: int, read: Callable[[], _T]) -> _T:
        """What `read` makes of a client's message of so many bytes, or raises.

        It may take seconds for a large one, millions of small items say: in a thread, so that all others are served
        meanwhile, and one at a time.
        """
        if num_bytes <= _LARGE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._reader, read)

    async def submit(self, ask: Ask, *, is_streamed: bool) -> RequestStream:
        """Send a request to the engine, or RequestError. is_streamed: its reader may be slow.

        Only the vocabulary and the length of the prompt are checked later, by the engine.
        """
        with self.counting_refusals():
            self.check_model(ask.model)
            self._check_limits(ask)
            ticket = self.admission.enter(_estimate_tokens(ask.prompt))
            try:
                if isinstance(ask.prompt, tuple):
                    token_ids = ask.prompt
                else:
                    token_ids = await self.token_ids(ask.prompt, ask.add_special_tokens)
                ticket.recount(len(token_ids))
                if self._has_ended:  # while the prompt was made token ids
                    raise _shut_down()
            except BaseException:
                ticket.leave()
                raise
        request = Request(
            request_id=f"request-{next(self._numbers)}",
            prompt_token_ids=token_ids,
            sampling_params=ask.sampling_params,
            prompt=ask.prompt if isinstance(ask.prompt, str) else None,
            priority=ask.priority,
            arrival_time=ask.arrival_time,
            cache_salt=ask.cache_salt,
        )
        max_unread = self.limits.max_unread_tokens if is_streamed else None
        ended = functools.partial(self._ended, ask, request, tracing.caller())
        stream = RequestStream(request, ticket, max_unread, self.engine, ask.name or request.request_id, ended)
        self.engine.submit(stream, ask.queue_time_limit)
        return stream

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """A RequestError raised inside is counted and logged; `submit` does so with its own."""
        try:
            yield
        except RequestError as error:
            self.refusals.note(error.code, error.message)
            raise

    @property
    def max_connections(self) -> int:
        """How many HTTP connections, or gRPC calls, may be open at a time."""
        if self.limits.max_connections is not None:
            return self.limits.max_connections
        return self.admission.max_requests + SPARE_CONNECTIONS

    @contextmanager
    def open_call(self) -> Iterator[None]:
        """A gRPC call is open for as long as this is; RequestError where too many are."""
        most = self.max_connections
        with self.counting_refusals():
            if self._num_calls >= most:
                message = f"{self._num_calls} calls are open, and the server takes {most}; end some, or try again later"
                raise RequestError("RESOURCE_EXHAUSTED", message, 1.0)
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    def _ended(self, ask: Ask, request: Request, caller: Mapping[str, str], how: End | RequestError) -> None:
        error = how if isinstance(how, RequestError) else how.error
        if error is not None:
            self.refusals.count(error.code)
        log_request(ask.name or request.request_id, self.name, len(request.prompt_token_ids), how)
        for tell in self.on_end:
            tell(ask, request, caller, how)

    async def token_ids(self, prompt: str | Conversation, add_special_tokens: bool = True) -> tuple[int, ...]:
        """The token ids of a text or conversation. RequestError for one that the tokenizer or the template rejects."""
        tokenizer = self._tokenizer()
        self._check_length(prompt)

        def encode() -> tuple[int, ...]:
            if isinstance(prompt, str):
                return tuple(tokenizer.encode(prompt, add_special_tokens))
            return tuple(tokenizer.apply_chat_template(prompt.messages, **prompt.template_arguments))

        try:
            return await self._in_executor(encode)
        except ValueError as error:
            raise RequestError("INVALID_ARGUMENT", str(error)) from error

    async def text_of(self, token_ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        tokenizer, vocab_size = self._tokenizer(), self.facts.vocab_size
        if max(token_ids, default=0) >= vocab_size:
            raise RequestError(
                "INVALID_ARGUMENT",
                f"token_ids holds {max(token_ids)}, outside the vocabulary; use 0 to {vocab_size - 1}",
            )
        return await self._in_executor(lambda: tokenizer.decode(token_ids, skip_special_tokens))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("INVALID_ARGUMENT", f"{self.name} has no tokenizer; give token ids instead of text")
        return self.tokenizer

    def _check_limits(self, ask: Ask) -> None:
        params = ask.sampling_params
        max_n = self.limits.max_n or self.facts.max_num_seqs
        if params.n > max_n:
            raise RequestError("INVALID_ARGUMENT", f"n={params.n} is more than this server's {max_n}; use less")
        if len(params.stop_strings) > MAX_STOP_STRINGS:
            raise RequestError(
                "INVALID_ARGUMENT", f"stop has {len(params.stop_strings)} strings; use at most {MAX_STOP_STRINGS}"
            )
        longest = max(map(len, params.stop_strings), default=0)
        if longest > MAX_STOP_CHARACTERS:
            raise RequestError(
                "INVALID_ARGUMENT", f"stop has a string of {longest} characters; use at most {MAX_STOP_CHARACTERS}"
            )
        if isinstance(ask.prompt, tuple) and len(ask.prompt) >= self.facts.max_model_len:
            limit = self.facts.max_model_len
            message = (
                f"the prompt has {len(ask.prompt)} tokens, but max_model_len={limit} leaves room for {limit - 1} and"
            )
            raise RequestError("INVALID_ARGUMENT", f"{message} one output; shorten it")

    def _check_length(self, prompt: str | Conversation) -> None:
        size = _num_bytes(prompt)
        if size > MAX_PROMPT_BYTES_PER_TOKEN * self.facts.max_model_len:
            message = f"the prompt has {size} bytes, more than max_model_len={self.facts.max_model_len} tokens can be"
            raise RequestError("INVALID_ARGUMENT", f"{message}; shorten it")

    async def _in_executor(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def _set_health(self, healthy: bool) -> None:
        healthy = healthy and not self.admission.closed
        if healthy != self.healthy:
            self.healthy = healthy
            for tell in self.on_health:
                tell(healthy)

    def _died(self, error: BaseException) -> None:
        self.cause_of_death = error
        self.admission.close("the engine has failed")
        self._set_health(False)
        self.dead.set()


def _shut_down() -> RequestError:
    return RequestError("UNAVAILABLE", "the server has shut down", 1.0)


def _num_bytes(prompt: str | Conversation) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "surrogatepass"))
    return sum(_num_bytes(text) for message in prompt.messages for text in message.values())


def _estimate_tokens(prompt: str | tuple[int, ...] | Conversation) -> int:
    """Exact for token ids; for text the usual four bytes a token, until the tokenizer says better."""
    return len(prompt) if isinstance(prompt, tuple) else _num_bytes(prompt) // 4 + 1
