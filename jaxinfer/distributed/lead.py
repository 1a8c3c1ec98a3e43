"""Process 0's side of an engine that runs on all processes of a group. Imports no jax."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import SETTLE_SECONDS, Group, current

log = logging.getLogger(__name__)


class Lead:
    """Tells the other processes what this one's engine does. Opening another engine ends the one before."""

    _latest: Lead | None = None
    _numbers = itertools.count()  # of what all do, for all engines

    def __init__(self, group: Group, config: EngineConfig) -> None:
        """The others load the config's model while this process does."""
        self._group = group
        self._halved: str | None = None
        self._answers: dict[int, list[Any]] = {}
        Lead._latest = self
        group.tell("load", {**asdict(config), "compilation_cache_dir": False})

    def share_plan(self, num_pages: tuple[int, ...], made: str) -> None:
        """The others plan as this process did, with as many pages, once all have loaded. made: the plan as text, which
        theirs equals."""
        self.wait_for_all()
        self._group.tell("plan", [num_pages, digest(made)])
        log.info(
            "programs of several processes are not kept, every start compiles them; "
            "with JAX_COMPILATION_CACHE_DIR jax keeps them"
        )

    def wait_for_all(self) -> None:
        """Until the others have done what they were told: a first collective does not wait long for a slow disk."""
        self._group.wait_for_all()

    @contextlib.contextmanager
    def all_do(self, what: str, content: Callable[[], Any] | None = None) -> Iterator[int]:
        """Around what this process does: all do it, in the same order. Gives it a number, by which others answer.

        content: makes what they need for it.

        RuntimeError where that can not be: after something that this process did by halves, and from an engine that is
        not the latest.
        """
        if what == "reset":
            time.sleep(SETTLE_SECONDS)  # where a lost process made a step fail, its link ends this one here
            self._answers.clear()
        number = next(self._numbers)
        if self._halved is not None:
            if what == "reset":  # after which nothing can be done
                yield number
                return
            raise RuntimeError(f"{self._halved} was broken off on process 0 alone; start all processes again")
        if Lead._latest is not self:
            raise RuntimeError("another engine was opened on these processes since; use that")
        self._group.tell(what, [number, None if content is None else content()])
        try:
            yield number
        except BaseException:
            self._halved = f"a {what}"
            raise

    def answers(self, number: int, count: int = 1) -> list[Any]:
        """What `count` of the others answer to what all did under this number; waits for them."""
        while len(self._answers.get(number, ())) < count:
            answered, content = self._group.next_answer()
            self._answers.setdefault(answered, []).append(content)
        return self._answers.pop(number, [])


def lead(config: EngineConfig) -> Lead:
    """For an engine over the devices of all processes. ValueError where they are no group, or this is not process 0."""
    group = current()
    if group is None:
        raise ValueError("jax has devices of other processes; let jaxinfer.distributed.join start it")
    if group.process_id:
        raise ValueError(
            f"this is process {group.process_id}; make engines on process 0, and call jaxinfer.distributed.follow here"
        )
    return Lead(group, config)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
