"""The server's log: plain lines, or one JSON object a line; and one line for each request. Imports no jax."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

from serving.deltas import End
from serving.errors import RequestError

log = logging.getLogger(__name__)

Format = Literal["plain", "json"]


def set_up_logging(format: Format) -> None:
    """Standard error gets what the server and the engine say, and others' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else PlainFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("jaxinfer", "serving"):
        logging.getLogger(name).setLevel(logging.INFO)


def says_more_than_that_a_client_left(record: logging.LogRecord) -> bool:
    """A filter for gRPC's logger, which calls it an error, with a traceback, that a call was gone when it answered."""
    return not record.getMessage().startswith("ExecuteBatchError raised in core by servicer method")


class PlainFormatter(logging.Formatter):
    """Time, level, message, and what `fields` of the record holds as key=value, texts in quotes.

    The quotes matter: a client chooses its request's id, and must not write lines of its own into the log.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        return " ".join([super().formatMessage(record), *(f"{key}={json.dumps(fields[key])}" for key in fields)])


class JsonFormatter(logging.Formatter):
    """time (UTC), level, logger and message, what `fields` of the record holds, and the traceback if there is one."""

    converter = time.gmtime
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_request(name: str, model: str, num_prompt_tokens: int, how: End | RequestError) -> None:
    """The line of a request that was taken in, once it is over. Times in seconds; what never came is left out."""
    fields: dict[str, Any] = {"request_id": name, "model": model, "prompt_tokens": num_prompt_tokens}
    if isinstance(how, End):
        fields |= {
            "cached_tokens": how.num_cached_tokens,
            "completion_tokens": how.num_completion_tokens,
            "finish": ",".join(reason or "none" for reason in how.finish_reasons),
            "preemptions": how.num_preemptions,
            "queue": how.queue_time,
            "ttft": how.time_to_first_token,
            "total": how.total_time,
        }
    error = how if isinstance(how, RequestError) else how.error
    if error is not None:
        fields |= {"status": error.code, "error": error.message}
    known = {key: value for key, value in fields.items() if value is not None}
    rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in known.items()}
    log.info("request", extra={"fields": rounded})
