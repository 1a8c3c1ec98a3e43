"""JSON objects, strictly: what Python's reader lets through in silence is refused. Imports no jax."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any


class BodyError(ValueError):
    """A request that cannot be served. param: the field that is wrong, where the message does not begin with it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. BodyError naming what is wrong."""
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except UnicodeDecodeError as error:
        raise BodyError(f"not UTF-8 at byte {error.start}; write UTF-8") from None
    except json.JSONDecodeError as error:
        raise BodyError(f"not JSON: {error.msg} at character {error.pos + 1}; write one JSON object") from None
    except RecursionError:
        raise BodyError("JSON is nested too deeply; write a flatter JSON object") from None
    except ValueError as error:  # a duplicate key, or a number of more digits than int() takes
        raise BodyError(str(error)) from None
    if not isinstance(value, dict):
        raise BodyError(f"this must be a JSON object, not {_kind(value)}; begin it with {{")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise BodyError(f"the key {twice!r} is there twice; give each key once")
    return result


def _finite(text: str) -> float:
    """JSON has no NaN and no infinity; Python reads them all the same, and a record could not repeat them."""
    value = float(text)
    if not math.isfinite(value):
        raise BodyError(f"{text} is not a finite number; correct it")
    return value


def _kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
