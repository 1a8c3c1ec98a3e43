"""The other processes' side: load what process 0 loads, and send its steps to this process's devices."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group, current
from jaxinfer.distributed.lead import digest
from jaxinfer.distributed.link import Message
from jaxinfer.loading import LoadedModel, load_model
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.layout import check_layout
from jaxinfer.plan import resolve
from jaxinfer.runner.runner import Runner, SentStep
from jaxinfer.runner.step_plan import StepPlan

FAILED, DEFECT = 2, 3


def follow() -> None:
    """See jaxinfer.distributed.follow."""
    group = current()
    if group is None or not group.process_id:
        raise ValueError("only a process other than 0 of a group follows; call jaxinfer.distributed.join first")
    follower = Follower()
    with _signals_for(group):
        try:
            while (command := group.next_command()) is not None:
                follower.do(command)
        except (ValueError, OSError) as error:
            group.leave(FAILED, str(error))
        except Exception as error:
            traceback.print_exc()
            group.leave(DEFECT, f"{type(error).__name__}: {error}")


class Follower:
    """A runner that does what it is told, and nothing else: it reads no result."""

    def __init__(self) -> None:
        self._config: EngineConfig
        self._loaded: LoadedModel | None = None
        self._runner: Runner | None = None
        self._sent: SentStep | None = None

    def do(self, command: Message) -> None:
        if command.kind == "load":
            self._sent = self._runner = self._loaded = None  # first, so that no two are in memory
            self._config = EngineConfig(**command.content)
            self._loaded = load_model(self._config.model, mesh=self._config.mesh, dtype=self._config.dtype)
        elif command.kind == "plan":
            self._runner = self._make_runner(*command.content)
        else:
            assert self._runner is not None
            if command.kind == "step":
                self._step(self._runner, command.content)
            elif command.kind == "reset":
                self._sent = None
                self._runner.reset()
            else:
                assert command.kind == "warm-up", command.kind
                self._runner.warm_up()

    def _make_runner(self, num_pages: tuple[int, ...], made: str) -> Runner:
        loaded = self._loaded
        assert loaded is not None
        check_layout(loaded.config, loaded.mesh)
        plan = resolve(self._config, loaded.config, loaded.model.dtype, loaded.mesh)
        plan = replace(plan, num_pages=num_pages)
        if digest(repr(plan)) != made:
            raise ValueError(
                f"{self._config.model} is another model here than on process 0, or jaxinfer another version; "
                "give every host the same"
            )
        return Runner(*loaded.serving_form(), plan, EngineMetrics(plan.kv_cache_bytes))

    def _step(self, runner: Runner, content: Any) -> None:
        previous, self._sent = self._sent, runner.send(StepPlan.from_content(content))
        if previous is not None:
            previous.hidden.block_until_ready()  # or what fails on this process's devices alone would never be seen


@contextmanager
def _signals_for(group: Group) -> Iterator[None]:
    """SIGTERM and Ctrl-C are passed on to process 0, which ends all in good order; a second one ends this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        group.ask_to_stop(signal.Signals(number).name)

    previous = [(number, signal.signal(number, ask)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
