"""Failures in OpenAI's shape. Imports no jax."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving.errors import Code, RequestError
from serving.http.encoding import encode
from serving.http.reading import FIELDS

# 499 is what is customary for a client that went away.
STATUSES: Mapping[Code, int] = {
    "INVALID_ARGUMENT": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "ABORTED": 499,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
# Why an HttpError was one, for the metrics, in the style of gRPC's statuses.
REASONS: Mapping[int, str] = {
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    408: "BODY_TOO_SLOW",
    413: "BODY_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    503: "TOO_MANY_CONNECTIONS",
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """A failure that only HTTP knows; `status` is one of REASONS. is_unread: the body was not read to its end."""

    def __init__(
        self, status: int, message: str, *, headers: Mapping[str, str] | None = None, is_unread: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.is_unread = is_unread
        self.headers = {**(headers or {}), **({"connection": "close"} if is_unread else {})}


class ReaderStalled(RequestError):
    """Nobody reads the answer, so that nobody can be told either."""

    def __init__(self, seconds: float) -> None:
        super().__init__("ABORTED", f"the reader took nothing for {seconds:g} s; read faster, or ask for less")


def error_object(error: Exception) -> dict[str, Any]:
    return {"error": _described(error)[1]}


def response_of(error: Exception) -> Response:
    """What is neither a RequestError, an HttpError nor the router's own is a defect of ours."""
    status, described = _described(error)
    headers = dict(getattr(error, "headers", None) or {})
    if isinstance(error, RequestError) and error.retry_after is not None:
        # Whole seconds are all that the standard has; OpenAI's clients read the other.
        headers["retry-after"] = str(math.ceil(error.retry_after))
        headers["retry-after-ms"] = str(round(error.retry_after * 1000))
    return Response(encode({"error": described}), status, headers, "application/json")


def _described(error: Exception) -> tuple[int, dict[str, Any]]:
    status, message, param, code = 500, "the server has a defect; its log says where", None, None
    if isinstance(error, RequestError):
        status, message, code = STATUSES[error.code], error.message, error.code.lower()
        # Messages begin with the name of the field that is wrong.
        first = re.match(r"\w+", message)
        field = first[0] if first and (first[0] in FIELDS or message[first.end() : first.end() + 1] == "=") else None
        param = getattr(error.__cause__, "param", None) or field
    elif isinstance(error, HttpError):
        status, message = error.status, error.message
    elif isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"message": message, "type": kind, "param": param, "code": code}
