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


class RequestError(Exception):
    """A request that is not answered, or not to its end.

    code: the name of a gRPC status. retry_after: seconds after which another try may succeed.
    """

    def __init__(self, code: Code, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message
        self.retry_after = retry_after
