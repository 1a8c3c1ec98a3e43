"""Messages between two processes over TCP: a kind, plain values and numpy arrays. Imports no jax.

A frame is the length of its header (4 bytes, big-endian), the header (JSON), and the arrays' bytes one after another.
Nothing that is received is run: there is no pickle.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# A peer that has sent nothing for so long is lost: one that was stopped, or whose machine or network is gone. A process
# that has ended is noticed at once.
SILENCE_SECONDS = 30.0
_LENGTH = struct.Struct(">I")
_MAX_HEADER_BYTES = 1 << 24
_ARRAY = "\0array"  # {_ARRAY: i} in a header is the frame's i-th array; no field has such a name


class LinkError(Exception):
    """The other end is gone, silent, or no peer of ours; the message says which, as the end of a sentence."""


@dataclass(frozen=True)
class Message:
    """content: None, bools, numbers, text and numpy arrays, in tuples and dicts."""

    kind: str
    content: Any


class Link:
    """One end of a connection. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket, timeout: float = SILENCE_SECONDS) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(timeout)
        self._socket = connection
        self._stream = connection.makefile("rb")
        self._sending = threading.Lock()

    def allow_silence(self, seconds: float) -> None:
        self._socket.settimeout(seconds)

    def send(self, kind: str, content: Any = None) -> None:
        """LinkError where the other end does not take it."""
        arrays: list[np.ndarray] = []
        header = json.dumps([kind, _without_arrays(content, arrays), [(a.dtype.str, a.shape) for a in arrays]]).encode()
        frame = b"".join([_LENGTH.pack(len(header)), header, *(a.tobytes() for a in arrays)])
        try:
            with self._sending:
                self._socket.sendall(frame)
        except OSError as error:
            raise _lost(error) from error

    def receive(self, max_bytes: int = _MAX_HEADER_BYTES) -> Message:
        """Wait for the next message. max_bytes: of its header, from a peer that is not known yet."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > max_bytes:
            raise LinkError("does not speak as jaxinfer does")
        try:
            kind, content, shapes = json.loads(self._read(length))
            arrays = []
            for dtype, shape in shapes:
                data = self._read(math.prod(shape) * np.dtype(dtype).itemsize)
                arrays.append(np.frombuffer(data, dtype).reshape(shape))
            return Message(kind, _with_arrays(content, arrays))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise LinkError("does not speak as jaxinfer does") from error

    def finish(self) -> None:
        """Say that nothing more is sent; what was sent still arrives."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the other end has gone first

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def _read(self, count: int) -> bytes:
        try:
            data = self._stream.read(count)
        except (OSError, ValueError) as error:  # ValueError: closed by another thread
            raise _lost(error) from error
        if len(data) < count:
            raise LinkError("its connection is closed")
        return data


def _lost(error: Exception) -> LinkError:
    if isinstance(error, TimeoutError):
        return LinkError(f"nothing was heard of it for {SILENCE_SECONDS:g} s")
    return LinkError(f"its connection broke, {error.strerror if isinstance(error, OSError) else error}")


def _without_arrays(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {_ARRAY: len(arrays) - 1}
    if isinstance(value, Mapping):
        return {name: _without_arrays(part, arrays) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_without_arrays(part, arrays) for part in value]
    return value


def _with_arrays(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {name: _with_arrays(part, arrays) for name, part in value.items()}
    return tuple(_with_arrays(part, arrays) for part in value) if isinstance(value, list) else value
