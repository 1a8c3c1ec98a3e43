"""How a request can fail, in the words of every protocol that the server speaks. Imports no jax."""

from __future__ import annotations

from typing import Literal

Code = Literal[
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
    "INTERNAL",
]

MAX_MESSAGE = 1000  # statuses travel in metadata, of which clients take 8 KiB


class RequestError(Exception):
    """A request that is not answered, or not to its end.

    code: the name of a gRPC status. retry_after: seconds after which another try may succeed. The message may quote
    what a client sent: what is too long for a status is cut, and what is no text is replaced.
    """

    def __init__(self, code: Code, message: str, retry_after: float | None = None) -> None:
        if len(message) > MAX_MESSAGE:
            message = f"{message[: MAX_MESSAGE // 2]} ... {message[-MAX_MESSAGE // 2 :]}"
        message = message.encode("utf-8", "replace").decode()
        super().__init__(message)
        self.code: Code = code
        self.message = message
        self.retry_after = retry_after
