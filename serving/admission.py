"""Who may come in: limits on requests and on waiting prompt tokens, counted at the check. Imports no jax.

Used by one thread (the event loop's), so that a check and its count cannot be separated.
"""

from __future__ import annotations

import asyncio
import math
import time

from serving.errors import RequestError

_MIN_RETRY, _MAX_RETRY = 0.1, 30.0
_SMOOTHING = 0.1


class Ticket:
    """One admitted request's place. `leave` is called once it is over, whatever became of it."""

    def __init__(self, admission: Admission, num_tokens: int) -> None:
        self._admission = admission
        self._waiting_tokens = num_tokens
        self._inside = True

    def recount(self, num_tokens: int) -> None:
        """The prompt's tokens, now that they are known; RequestError where they are too many after all."""
        admission = self._admission
        admission.num_waiting_tokens += num_tokens - self._waiting_tokens
        self._waiting_tokens = num_tokens
        if self._inside and admission.num_waiting_tokens > max(admission.max_waiting_tokens, num_tokens):
            raise admission.refusal(f"{admission.num_waiting_tokens - num_tokens} prompt tokens are waiting")

    def started(self) -> None:
        """Its prompt waits no more."""
        self._admission.num_waiting_tokens -= self._waiting_tokens
        self._waiting_tokens = 0

    def leave(self) -> None:
        if self._inside:
            self._inside = False
            self.started()
            self._admission.left()


class Admission:
    """Refuses with RESOURCE_EXHAUSTED and retry advice past the limits, with UNAVAILABLE while closed."""

    def __init__(self) -> None:
        self.max_requests = 0
        self.max_waiting_tokens = 0
        self.num_requests = 0
        self.num_waiting_tokens = 0
        self._closed: str | None = "the server is starting"
        self._empty = asyncio.Event()
        self._empty.set()
        self._last_left: float | None = None
        self._seconds_per_request = _MIN_RETRY

    def open(self, max_requests: int, max_waiting_tokens: int) -> None:
        self.max_requests, self.max_waiting_tokens = max_requests, max_waiting_tokens
        self._closed = None

    def close(self, reason: str) -> None:
        """Refuse everything from now on; those inside stay."""
        self._closed = reason

    @property
    def closed(self) -> bool:
        return self._closed is not None

    def enter(self, num_tokens: int) -> Ticket:
        """A place for a request of about so many prompt tokens, or RequestError."""
        if self._closed is not None:
            raise RequestError("UNAVAILABLE", f"{self._closed}; try another server, or this one later", 1.0)
        if self.num_requests >= self.max_requests:
            raise self.refusal(f"{self.num_requests} requests are running or waiting")
        # A prompt that finds nobody waiting is let in whatever its length; the engine has a limit of its own.
        if self.num_waiting_tokens and self.num_waiting_tokens + num_tokens > self.max_waiting_tokens:
            raise self.refusal(f"{self.num_waiting_tokens} prompt tokens are waiting")
        self.num_requests += 1
        self.num_waiting_tokens += num_tokens
        self._empty.clear()
        return Ticket(self, num_tokens)

    def refusal(self, why: str) -> RequestError:
        """Advice: about as long as it takes for a tenth of those inside to leave."""
        seconds = self._seconds_per_request * math.ceil(self.num_requests / 10)
        retry_after = min(max(seconds, _MIN_RETRY), _MAX_RETRY)
        limits = f"{self.max_requests} requests and {self.max_waiting_tokens} waiting prompt tokens"
        return RequestError(
            "RESOURCE_EXHAUSTED",
            f"{why}, and the server takes {limits}; try again in {retry_after:.1f} s",
            retry_after,
        )

    def left(self) -> None:
        self.num_requests -= 1
        now = time.monotonic()
        if self._last_left is not None:
            self._seconds_per_request += _SMOOTHING * (now - self._last_left - self._seconds_per_request)
        self._last_left = now
        if not self.num_requests:
            self._last_left = None  # what follows is idleness, not slowness
            self._empty.set()

    async def wait_until_empty(self) -> None:
        await self._empty.wait()
