"""The input: one JSON object a line, streamed, each line known by its number and a digest of its bytes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO

DIGEST_BYTES = 8


class JobError(ValueError):
    """The job cannot go on, for a reason outside the program; the message is one line for the user."""


@dataclass(frozen=True)
class Line:
    """An input line that is not blank. `number` counts from 1, as editors do."""

    number: int
    data: bytes
    digest: str


@dataclass(frozen=True)
class InputFile:
    """Where lines come from: a path, or "-" for standard input, which can be read once.

    settings: everything outside the line that its result depends on; part of the digest, so that a job resumed with
    other settings is seen to be another job.
    """

    path: str
    settings: str = ""

    @property
    def name(self) -> str:
        return "standard input" if self.path == "-" else self.path

    @property
    def can_be_read_again(self) -> bool:
        return self.path != "-" and os.path.isfile(self.path)

    def check(self) -> None:
        """JobError where the input cannot be opened."""
        with self._open():
            pass

    def lines(self) -> Iterator[Line]:
        """Every line that is not blank, in order, one in memory at a time. JobError where reading fails."""
        with self._open() as file:
            try:
                for number, data in enumerate(file, start=1):
                    line = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
                    line = line.strip()
                    if line:
                        yield Line(number, line, self._digest(line))
            except OSError as error:
                raise JobError(f"cannot read {self.name}: {error.strerror or error}") from error

    def count(self) -> int:
        return sum(1 for _ in self.lines())

    def _digest(self, line: bytes) -> str:
        key = blake2b(self.settings.encode(), digest_size=16).digest()
        return blake2b(line, digest_size=DIGEST_BYTES, key=key).hexdigest()

    def _open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        if self.path == "-":
            return contextlib.nullcontext(sys.stdin.buffer)
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise JobError(f"cannot read the input {self.path}: {error.strerror}; check the path") from error
