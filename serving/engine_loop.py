"""The engine's own thread, which sends its answers to the event loop. Imports no jax.

One thread opens, warms up, steps and drops the engine; nobody else touches it. The event loop sends it commands through
a queue, which it reads between two steps, and it sends what each step gave back in one piece. Pieces that the event
loop has not fetched yet are kept in one list with one wake-up, and additions that a reader has not fetched yet are
merged, so that neither a slow loop nor a slow reader costs more than the text itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from jaxinfer.types import Request, RequestOutput, SamplingParams
from serving.deltas import DeltaMaker
from serving.errors import RequestError
from serving.request_stream import RequestStream
from serving.settings import Limits

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# A device that fails so many steps in a row is gone; the process ends, and whoever started it can start another.
MAX_FAILURES = 3
# A message costs about as much as a small model's token does, so what comes within a pause goes out as one. The pause
# grows with the number of requests up to Limits.stream_pause; a first token never waits, nor does one that is alone.
# All streams are sent to at the same moment: messages that follow each other cost a quarter less than scattered ones.
PAUSE_PER_REQUEST = 0.005
# How long the engine's thread, having sent a first token, leaves Python to the event loop, until the token is on its
# way. The device has its next step already. Otherwise the token would wait while that thread plans the step after.
_HAND_OVER_SECONDS = 0.002
_NICENESS = 5
_PROBE = "probe"


def give_way() -> None:
    """Where the device is the CPU, let this thread and those that it starts, XLA's, come after the process's others.

    Such a device computes on all cores. The threads through which a token passes on its way to its client would each
    wait there for one. An accelerator itself waits for this thread, which then comes after nobody. To be called before
    jax looks for devices, which starts the threads. Only on Linux do threads have priorities of their own.
    """
    import jax

    if sys.platform == "linux" and has_cpu_only(jax.config.jax_platforms):
        os.nice(_NICENESS)


def has_cpu_only(platforms: str | None) -> bool:
    """Whether jax, given its option jax_platforms, is told to use the CPU, or has no plugin for anything else."""
    if platforms:
        return platforms == "cpu"
    return find_spec("libtpu") is None and not entry_points(group="jax_plugins")


class StepTimeout(Exception):
    """The device hangs, and with it the thread that waits for it."""


@dataclass
class _Job:
    """The engine thread's side of a request."""

    request: Request
    stream: RequestStream
    expires: float | None
    output: RequestOutput | None = None
    deltas: DeltaMaker | None = None
    is_waiting: bool = True
    was_retried: bool = False
    has_more: bool = False  # than was sent


class EngineLoop:
    """Starts the engine's thread and speaks with it. Every public method belongs to the event loop.

    open_engine: called in the thread. on_health: False when a step failed, True when one has succeeded after that.
    on_death: the thread has ended of itself, or hangs, and every stream with it.
    """

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        on_health: Callable[[bool], None],
        on_death: Callable[[BaseException], None],
        limits: Limits,
    ) -> None:
        self._open_engine = open_engine
        self._on_health = on_health
        self._on_death = on_death
        self._limits = limits
        self._streams: dict[str, RequestStream] = {}
        self._commands: queue.SimpleQueue[Callable[[Engine], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dead: BaseException | None = None
        self._calls: set[asyncio.Future[Any]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self._outbox_lock = threading.Lock()
        self._outbox: list[tuple[Callable[[Any], None], Any]] = []
        self._taken = threading.Event()
        # The thread's own; others read the first two:
        self._num_begun = 0  # steps and commands
        self._is_busy = False
        self._jobs: dict[str, _Job] = {}
        self._last_sent = 0.0  # when all streams were sent what there was
        self._num_failures = 0
        self._is_unproven = False
        self._stopping = False

    async def start(self) -> Engine:
        """Open the engine and warm it up. Returns it for its facts alone; raises what opening it raised."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[Engine] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="engine", daemon=True)
        self._thread.start()
        engine = await opened
        self._watch = asyncio.create_task(self._watch_steps())
        return engine

    async def stop(self) -> None:
        """End the thread; what is still open is ended with UNAVAILABLE. A thread that hangs is left to itself."""
        if self._thread is None:
            return
        if not isinstance(self._dead, StepTimeout):
            self._commands.put(self._stop)
            await self._ended.wait()
            self._thread.join()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait((self._watch,))
        self._end_all(RequestError("UNAVAILABLE", "the server has shut down", 1.0))

    @property
    def streams(self) -> list[RequestStream]:
        """Those that are open, oldest first."""
        return list(self._streams.values())

    async def num_tokens(self) -> dict[str, int]:
        """How many each request has got so far in all its completions, by the engine's request id."""
        return await self.call(
            lambda _: {
                request_id: sum(len(completion.token_ids) for completion in job.output.outputs)
                for request_id, job in self._jobs.items()
                if job.output is not None
            }
        )

    async def call(self, function: Callable[[Engine], _T]) -> _T:
        """What the function gives or raises, run in the engine's thread between two steps."""
        if self._dead is not None or self._ended.is_set():
            raise _gone()
        if self._watch is None:
            raise RequestError("UNAVAILABLE", "the server is starting; try again when it is ready", 1.0)
        answer: asyncio.Future[_T] = self._loop.create_future()

        def give(value: _T) -> None:
            if not answer.done():
                answer.set_result(value)

        def fail(error: Exception) -> None:
            if not answer.done():
                answer.set_exception(error)

        def run(engine: Engine) -> None:
            try:
                value = function(engine)
            except Exception as error:
                self._send(fail, error)
            else:
                self._send(give, value)

        self._calls.add(answer)
        answer.add_done_callback(self._calls.discard)
        self._commands.put(run)
        return await answer

    def submit(self, stream: RequestStream, queue_time_limit: float | None) -> None:
        """Queue the stream's request. queue_time_limit: seconds from its arrival by which it must run."""
        if self._dead is not None:
            stream.refuse(_gone())
            return
        request = stream.request
        self._streams[request.request_id] = stream
        expires = None if queue_time_limit is None else request.arrival_time + queue_time_limit
        self._commands.put(lambda engine: self._add(engine, _Job(request, stream, expires)))

    def abort(self, request_id: str) -> None:
        self._commands.put(lambda engine: self._abort(engine, request_id))

    def cancel_all(self, reason: RequestError) -> None:
        for stream in list(self._streams.values()):
            stream.cancel(reason)

    def forget(self, stream: RequestStream) -> None:
        self._streams.pop(stream.request.request_id, None)

    def _end_all(self, error: RequestError) -> None:
        for stream in self.streams:
            stream.refuse(error)
        for answer in list(self._calls):
            if not answer.done():
                answer.set_exception(error)

    def _fetch(self) -> None:
        """Deliver what the thread has sent."""
        with self._outbox_lock:
            outbox, self._outbox = self._outbox, []
        for deliver, what in outbox:
            deliver(what)
        self._loop.call_soon(self._taken.set)  # after the readers that this has woken

    def _died(self, error: BaseException) -> None:
        self._dead = error
        self._end_all(_gone())
        self._on_death(error)

    async def _watch_steps(self) -> None:
        """Notice a step that does not return. Counted in looks, so that a process that was stopped may go on."""
        timeout = self._limits.step_timeout
        interval = min(timeout / 8, 1.0)
        num_looks, seen = 0, -1
        while self._dead is None:
            await asyncio.sleep(interval)
            if not self._is_busy or self._num_begun != seen:
                num_looks, seen = 0, self._num_begun
            num_looks += 1
            if (num_looks - 1) * interval >= timeout:
                self._died(StepTimeout(f"no step has returned for {timeout:g} s (--step-timeout)"))

    # From here on, the engine's thread.

    def _run(self, opened: asyncio.Future[Engine]) -> None:
        give_way()
        try:
            self._serve(opened)
        finally:
            self._send(lambda _: self._ended.set(), None)

    def _serve(self, opened: asyncio.Future[Engine]) -> None:
        def settle(outcome: Engine | BaseException) -> None:
            if opened.cancelled():
                return
            if isinstance(outcome, BaseException):
                opened.set_exception(outcome)
            else:
                opened.set_result(outcome)

        try:
            engine = self._open_engine()
            engine.warm_up()
        except BaseException as error:
            self._send(settle, error)
            return
        self._send(settle, engine)
        try:
            while self._obey(engine):
                self._step(engine)
            self._leave_nothing(engine)
        except BaseException as error:
            log.exception("the engine's thread has ended")
            self._send(self._died, error)

    def _send(self, deliver: Callable[[Any], None], what: Any) -> None:
        self._send_all([(deliver, what)])

    def _send_all(self, messages: list[tuple[Callable[[Any], None], Any]]) -> None:
        if not messages:
            return
        with self._outbox_lock:
            is_first = not self._outbox
            self._outbox += messages
            self._taken.clear()
        if is_first:
            self._loop.call_soon_threadsafe(self._fetch)

    def _obey(self, engine: Engine) -> bool:
        """Do what was asked for since the last step; with nothing to step, wait for something. False: stop."""
        wait = not engine.has_unfinished()
        while True:
            self._is_busy = not wait
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return not self._stopping
            self._begin()
            command(engine)
            wait = not self._stopping and not engine.has_unfinished() and self._commands.empty()

    def _begin(self) -> None:
        self._num_begun += 1
        self._is_busy = True

    def _stop(self, engine: Engine) -> None:
        self._stopping = True

    def _leave_nothing(self, engine: Engine) -> None:
        for request_id in (*self._jobs, _PROBE):
            engine.abort(request_id)
        self._jobs.clear()

    def _add(self, engine: Engine, job: _Job) -> None:
        request = job.request
        if self._expire(engine, job, time.monotonic()):
            return
        try:
            job.output = engine.add_request(request)
        except ValueError as error:
            self._send(job.stream.refuse, RequestError("INVALID_ARGUMENT", str(error)))
            return
        except Exception:
            log.exception("request %s could not be added", request.request_id)
            self._send(job.stream.refuse, RequestError("INTERNAL", "the request could not be added; see the log"))
            return
        job.deltas = DeltaMaker(job.output)
        self._jobs[request.request_id] = job

    def _abort(self, engine: Engine, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is not None:
            engine.abort(request_id)
            assert job.deltas is not None
            self._send(job.stream.give, job.deltas.take())

    def _expire(self, engine: Engine, job: _Job, now: float) -> bool:
        """End a request that has waited too long."""
        if job.expires is None or now < job.expires:
            return False
        milliseconds = round((job.expires - job.request.arrival_time) * 1000)
        error = RequestError(
            "DEADLINE_EXCEEDED", f"queue_time_limit_ms={milliseconds} passed before the request could run; allow more"
        )
        if job.deltas is None:
            self._send(job.stream.refuse, error)
        else:
            del self._jobs[job.request.request_id]
            engine.abort(job.request.request_id)
            self._send(job.stream.give, job.deltas.take("time_limit", error))
        return True

    def _step(self, engine: Engine) -> None:
        if not engine.has_unfinished():
            return
        self._begin()
        try:
            outputs = engine.step()
        except Exception as error:
            self._start_over(engine, error)
            return
        messages: list[tuple[Callable[[Any], None], Any]] = []
        if outputs:
            self._num_failures = 0
            if self._is_unproven:
                self._is_unproven = False
                messages.append((self._on_health, True))
        for output in outputs:
            job = self._jobs.get(output.request_id)
            if job is None:
                continue
            assert job.deltas is not None
            if output.finished:
                del self._jobs[output.request_id]
                messages.append((job.stream.give, job.deltas.take()))
            else:
                job.has_more = job.stream.is_streamed
        now = time.monotonic()
        is_due = now - self._last_sent >= min(PAUSE_PER_REQUEST * (len(self._jobs) - 1), self._limits.stream_pause)
        if is_due:
            self._last_sent = now
        has_first = False
        for job in self._jobs.values():
            assert job.deltas is not None
            is_first = not job.deltas.has_given
            if job.has_more and (is_due or is_first):
                has_first |= is_first
                messages.append((job.stream.give, job.deltas.take()))
                job.has_more = False
        for job in [job for job in self._jobs.values() if job.is_waiting]:
            assert job.output is not None
            if job.output.metrics.first_scheduled_time is not None:
                job.is_waiting = False
                messages.append((job.stream.started, None))
            else:
                self._expire(engine, job, now)
        self._send_all(messages)
        if has_first:
            self._taken.wait(_HAND_OVER_SECONDS)

    def _start_over(self, engine: Engine, error: Exception) -> None:
        """The engine has ended every request and is empty. Run again, once, those whose readers have seen nothing."""
        self._num_failures += 1
        log.error("a step failed (%d in a row)", self._num_failures, exc_info=error)
        if self._num_failures >= MAX_FAILURES:
            raise RuntimeError(f"{MAX_FAILURES} steps in a row failed, the last with {error!r}") from error
        self._is_unproven = True
        self._send(self._on_health, False)
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            assert job.deltas is not None
            if job.was_retried or job.deltas.has_given:
                self._send(job.stream.give, job.deltas.take())
            else:
                job.was_retried, job.is_waiting, job.has_more, job.deltas = True, True, False, None
                self._add(engine, job)
        # Nobody sends requests to a server that says it is not well, so it has to find out by itself.
        if not engine.has_unfinished():
            engine.add_request(Request(_PROBE, (0,), SamplingParams(max_tokens=1), arrival_time=time.monotonic()))


def _gone() -> RequestError:
    return RequestError("UNAVAILABLE", "the engine has failed and the server is going down; try another server", 1.0)
