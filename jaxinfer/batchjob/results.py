"""The results file: one whole line for every input line, whatever kills the job."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
from collections.abc import Mapping
from typing import Any, Literal

from jaxinfer.batchjob.lines import InputFile, JobError
from jaxinfer.batchjob.records import encode, identity

logger = logging.getLogger(__name__)

Mode = Literal["new", "resume", "overwrite"]


class ResultsError(JobError):
    """The results cannot be kept; what was written before stays."""


class ResultsFile:
    """Results on disk. Each is one write() of one whole line, so a kill can tear the last line only.

    A torn last line is cut off when the file is opened to resume. `digests` maps the numbers of the lines that are
    answered to their digests; `num_failed` of them are error records.
    """

    def __init__(self, path: str, mode: Mode) -> None:
        """Open, lock and (to resume) read the file. Nothing is written or cut before `begin`, except a torn line."""
        self.path = path
        self.digests: dict[int, str] = {}
        self.num_failed = 0
        self._mode = mode
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ResultsError(f"cannot write {path}: {error.strerror}; choose another --output") from error
        try:
            self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._size = os.fstat(self._fd).st_size if self._is_regular else 0
            self._lock()
            self._prepare()
        except BaseException:
            os.close(self._fd)
            raise

    def begin(self) -> None:
        """Drop what is to be overwritten. Called once all else that can fail at start-up has not."""
        if self._mode == "overwrite" and self._is_regular:
            os.ftruncate(self._fd, 0)
            self._size = 0

    def check_against(self, source: InputFile) -> int:
        """Number of input lines without a result. ResultsError where a result is of another line than the input's."""
        left, seen = 0, 0
        for line in source.lines():
            digest = self.digests.get(line.number)
            if digest is None:
                left += 1
                continue
            seen += 1
            if digest != line.digest:
                raise ResultsError(
                    f"{self.path} was begun with another line {line.number} of {source.name}, or another model, seed "
                    "or sampling flags; undo the change, or start anew with --overwrite"
                )
        if seen != len(self.digests):
            raise ResultsError(
                f"{self.path} has results of {len(self.digests) - seen} lines that {source.name} does not have; "
                "give the input it was begun with, or start anew with --overwrite"
            )
        return left

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record. ResultsError where it does not fit; the file then ends with the record before."""
        data = encode(record)
        rest = memoryview(data)
        try:
            while rest:  # a second turn only where the disk took a part, to learn why
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            try:
                if self._is_regular:
                    os.ftruncate(self._fd, self._size)
            finally:  # a line that cannot even be cut off is torn, which a resumed job knows how to deal with
                raise ResultsError(f"cannot write {self.path}: {error.strerror}") from error
        self._size += len(data)

    def close(self) -> None:
        """Make sure that the results are on the disk, and let go of the file."""
        try:
            if self._is_regular:
                os.fsync(self._fd)
        except OSError as error:
            raise ResultsError(f"cannot write {self.path}: {error.strerror}") from error
        finally:
            os.close(self._fd)

    def _lock(self) -> None:
        if not self._is_regular:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ResultsError(
                    f"another job is writing {self.path}; wait for it or choose another --output"
                ) from None
            logger.warning("%s cannot be locked (%s); do not run two jobs on it", self.path, error.strerror)

    def _prepare(self) -> None:
        if self._mode == "resume":
            if not self._is_regular:
                raise ResultsError(f"{self.path} is not a file, so it cannot be resumed; leave out --resume")
            self._read()
        elif self._mode == "new" and self._size:
            raise ResultsError(f"{self.path} is there already; add --resume to finish it or --overwrite to replace it")

    def _read(self) -> None:
        end = 0
        with open(self.path, "rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.endswith(b"\n"):
                    logger.info("the last line of %s was torn; its input line runs again", self.path)
                    break
                self._remember(number, data)
                end += len(data)
        if end != self._size:
            os.ftruncate(self._fd, end)
            self._size = end

    def _remember(self, number: int, data: bytes) -> None:
        try:
            known = identity(json.loads(data))
        except ValueError:
            known = None
        if known is None:
            raise ResultsError(f"line {number} of {self.path} is not a result of this job; is it the right --output?")
        line, digest, failed = known
        if line in self.digests:
            raise ResultsError(f"{self.path} has two results of input line {line}; remove one, or use --overwrite")
        self.digests[line] = digest
        self.num_failed += failed
