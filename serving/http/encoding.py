"""JSON and server-sent events as bytes. Imports no jax."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def encode(value: Mapping[str, Any]) -> bytes:
    """A tokenizer may give half of a surrogate pair, which no UTF-8 holds: it becomes a question mark, as in gRPC."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def event(value: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(value) + b"\n\n"
