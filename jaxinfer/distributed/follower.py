"""The other processes' side: load what process 0 loads, and send its steps to this process's devices."""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import Any

from jaxinfer.config import EngineConfig
from jaxinfer.distributed.group import Group
from jaxinfer.distributed.lead import digest
from jaxinfer.distributed.link import Message
from jaxinfer.loading import LoadedModel, load_model
from jaxinfer.metrics import EngineMetrics
from jaxinfer.models.layout import check_layout
from jaxinfer.plan import resolve
from jaxinfer.runner.runner import Runner, SentStep
from jaxinfer.runner.step_plan import StepPlan

FAILED, DEFECT = 2, 3


def follow(group: Group) -> None:
    """See jaxinfer.distributed.follow."""
    follower = Follower()
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
            own = self._config
            self._loaded = load_model(own.model, mesh=own.mesh, dtype=own.dtype, quantization=own.quantization)
        elif command.kind == "plan":
            self._runner = self._make_runner(*command.content)
        else:
            assert self._runner is not None
            if command.kind == "step":
                self._step(self._runner, command.content)
            elif command.kind == "reset":
                self._sent = None
                self._runner.reset()
            elif command.kind == "expert-tokens":
                self._runner.expert_tokens()
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
