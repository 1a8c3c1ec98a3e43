"""The other processes' side: load what process 0 loads, and send its steps to this process's devices."""

from __future__ import annotations

import queue
import threading
import traceback
from dataclasses import replace

from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.distributed.lead import digest
from jaxinfer.distributed.link import Message
from jaxinfer.loading import LoadedModel, load_model
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.layout import check_layout
from jaxinfer.plan import resolve
from jaxinfer.runner.runner import Runner
from jaxinfer.runner.sent import SentStep
from jaxinfer.runner.step_plan import StepPlan

FAILED, DEFECT = 2, 3


def follow(group: Group) -> None:
    """See jaxinfer.distributed.follow."""
    follower = Follower(group)
    try:
        while (command := group.next_command()) is not None:
            follower.do(command)
    except (ValueError, OSError) as error:
        group.leave(FAILED, str(error))
    except Exception as error:
        _leave(group, error)


def _leave(group: Group, error: Exception) -> None:
    traceback.print_exc()
    group.leave(DEFECT, f"{type(error).__name__}: {error}")


class Follower:
    """A runner that does what it is told, and reads for process 0 what that can not."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._config: EngineConfig
        self._loaded: LoadedModel | None = None
        self._runner: Runner | None = None
        self._sent: queue.SimpleQueue[tuple[int, bool, SentStep]] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="watches steps", daemon=True).start()

    def do(self, command: Message) -> None:
        if command.kind == "load":
            self._runner = self._loaded = None  # first, so that no two are in memory
            self._config = EngineConfig(**command.content)
            own = self._config
            self._loaded = load_model(own.model, mesh=own.mesh, dtype=own.dtype, quantization=own.quantization)
        elif command.kind == "plan":
            self._runner = self._make_runner(*command.content)
        else:
            assert self._runner is not None
            number, content = command.content
            if command.kind == "step":
                sent = self._runner.send_own(StepPlan.from_content(content))
                self._sent.put((number, self._runner.answers_steps, sent))
            elif command.kind == "reset":
                self._runner.reset()
            elif command.kind == "expert-tokens":
                if counts := self._runner.expert_tokens():
                    self._group.answer([number, list(counts.items())])
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

    def _watch(self) -> None:
        """Wait for what is sent, or what fails on this process's devices alone would never be seen; and answer."""
        try:
            while True:
                number, is_answered, sent = self._sent.get()
                sent.hidden.block_until_ready()
                if is_answered:
                    self._group.answer([number, sent.arrays()])
        except Exception as error:
            _leave(self._group, error)
