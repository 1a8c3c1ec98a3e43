"""What whoever runs the server asks of it: protos/jaxinfer/v1/control.proto. Imports no jax before it is asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from serving.calls import Context, Service, answered
from serving.errors import RequestError
from serving.frontend import Frontend
from serving.generated import control_pb2 as pb
from serving.generated import control_pb2_grpc
from serving.messages import refuse_unknown
from serving.settings import package_version

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.loading import LoadedModel
    from jaxinfer.models.model import Params

log = logging.getLogger(__name__)

_T = TypeVar("_T")

SERVICE = "jaxinfer.v1.Control"
MAX_PROFILE_SECONDS = 60.0
_DEFAULT_PROFILE_SECONDS = 3.0


@dataclass(frozen=True)
class ControlConfig:
    """port 0 is a free one. profile_directory: where traces go; load_root: below which weights may be loaded.

    None: refused.
    """

    port: int
    profile_directory: Path | None = None
    load_root: Path | None = None


class Control(Service, control_pb2_grpc.ControlServicer):
    """Server info, requests, abort, drain, profile, load. ask_to_stop: called when the server is to drain."""

    def __init__(self, frontend: Frontend, config: ControlConfig, ask_to_stop: Callable[[], None]) -> None:
        super().__init__(frontend)
        self._config = config
        self._ask_to_stop = ask_to_stop
        self._since = time.monotonic()
        self._checkpoint: Path | None = None  # the one that was loaded last
        self._work: asyncio.Task[Any] | None = None

    async def close(self) -> None:
        """End what is still being done."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.wait((self._work,))

    @answered
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        refuse_unknown(request)

        def read(engine: Engine) -> pb.ServerInfo:
            plan, stats = engine.plan, engine.stats()
            return pb.ServerInfo(
                devices=[f"{device.device_kind} ({device})" for device in plan.mesh.devices.flat],
                plan=plan.describe(),
                max_model_len=plan.max_model_len,
                max_num_seqs=plan.max_num_seqs,
                max_num_batched_tokens=plan.max_num_batched_tokens,
                kv_cache_bytes=plan.kv_cache_bytes,
                kv_cache_usage=stats.kv_usage,
                num_requests=stats.num_requests,
                num_compilations=stats.num_programs_compiled,
                checkpoint=str(self._checkpoint or engine.loaded.directory),
            )

        info = await self.frontend.engine.call(read)
        info.version, info.jax_version = package_version(), version("jax")
        info.model, info.healthy = self.frontend.name, self.frontend.healthy
        info.uptime_seconds = time.monotonic() - self._since
        streams = self.frontend.engine.streams
        info.num_running = sum(stream.is_running for stream in streams)
        info.num_waiting = len(streams) - info.num_running
        return info

    @answered
    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        refuse_unknown(request)
        now, num_tokens = time.monotonic(), await self.frontend.engine.num_tokens()
        return pb.ListRequestsResponse(
            requests=[
                pb.RequestInfo(
                    request_id=stream.name,
                    running=stream.is_running,
                    age_seconds=now - stream.request.arrival_time,
                    prompt_tokens=len(stream.request.prompt_token_ids),
                    completion_tokens=num_tokens.get(stream.request.request_id, 0),
                    n=stream.request.sampling_params.n,
                    priority=stream.request.priority,
                )
                for stream in self.frontend.engine.streams
            ]
        )

    @answered
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        refuse_unknown(request)
        found = [stream for stream in self.frontend.engine.streams if stream.name == request.request_id]
        if not found:
            raise RequestError("NOT_FOUND", f"no request is called {request.request_id!r}; see ListRequests")
        for stream in found:
            stream.cancel(RequestError("ABORTED", "whoever runs the server has ended this request"))
        return pb.AbortResponse(num_aborted=len(found))

    @answered
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        refuse_unknown(request)
        log.info("asked to drain")
        self._ask_to_stop()
        return pb.DrainResponse(num_unfinished=self.frontend.admission.num_requests)

    @answered
    async def Profile(self, request: pb.ProfileRequest, context: Context) -> pb.ProfileResponse:
        refuse_unknown(request)
        directory = self._config.profile_directory
        if directory is None:
            raise _invalid("profiling is off; start the server with --profile-dir")
        seconds = request.seconds if request.HasField("seconds") else _DEFAULT_PROFILE_SECONDS
        if not 0 < seconds <= MAX_PROFILE_SECONDS:
            raise _invalid(f"seconds={seconds} is out of range; use a value in (0, {MAX_PROFILE_SECONDS:g}]")
        await self._alone(_profile(directory, seconds))
        return pb.ProfileResponse(directory=str(directory))

    @answered
    async def Load(self, request: pb.LoadRequest, context: Context) -> pb.LoadResponse:
        refuse_unknown(request)
        directory = self._directory_of(request.path)
        started = time.monotonic()
        await self._alone(self._load(directory))
        return pb.LoadResponse(seconds=time.monotonic() - started)

    async def _load(self, directory: Path) -> None:
        """Read the weights beside the running engine, and swap them between two of its steps.

        The old ones are not dropped first: requests run on them, and the new ones may turn out to be unreadable.
        """
        engine = self.frontend.engine
        served, dtype = await engine.call(lambda owner: (owner.loaded, owner.plan.dtype))
        try:
            params = await asyncio.to_thread(_read_weights, directory, served, dtype)
            await engine.call(lambda owner: owner.update_params(params))
        except (ValueError, OSError) as error:
            raise _invalid(str(error)) from error
        self._checkpoint = directory
        log.info("serving the weights of %s", directory)

    def _directory_of(self, path: str) -> Path:
        """RequestError for what is not a directory below the root, wherever links may lead."""
        root = self._config.load_root
        if root is None:
            raise _invalid("loading is off; start the server with --load-root")
        try:
            directory = (root / path).resolve()
            is_below = directory.is_relative_to(root.resolve()) and directory.is_dir()
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
            is_below = False
        if not path or not is_below:
            raise _invalid(f"path={path!r} is no directory below --load-root; give one relative to it")
        return directory

    async def _alone(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of what only one at a time may do, and which a caller who leaves does not stop half-way."""
        if self._work is not None and not self._work.done():
            work.close()
            raise RequestError("RESOURCE_EXHAUSTED", "another load or profile is under way; try again later", 1.0)
        self._work = asyncio.create_task(work)
        return await asyncio.shield(self._work)


async def _profile(directory: Path, seconds: float) -> None:
    import jax

    await asyncio.to_thread(jax.profiler.start_trace, directory)
    try:
        await asyncio.sleep(seconds)
    finally:
        await asyncio.to_thread(jax.profiler.stop_trace)


def _read_weights(directory: Path, served: LoadedModel, dtype: Any) -> Params:
    """ValueError, naming what differs, for a checkpoint of another architecture or with other end tokens."""
    from jaxinfer.loading import load_model, read_settings
    from jaxinfer.models.registry import resolve
    from jaxinfer.quantization import choose as choose_quantization

    config_json, generation = read_settings(directory)
    _, config = resolve(config_json)
    quantization = None if served.config.quantization is None else served.config.quantization.name
    config = replace(config, quantization=choose_quantization(quantization, config.quantization))
    for field in fields(config):
        own, other = getattr(served.config, field.name), getattr(config, field.name)
        if own != other:
            raise ValueError(
                f"{directory} has {field.name}={other!r}, and the served model {own!r}; start another server"
            )
    if generation.eos_token_ids != served.generation.eos_token_ids:
        raise ValueError(
            f"{directory} ends with tokens {generation.eos_token_ids}, and the served model with "
            f"{served.generation.eos_token_ids}; start another server"
        )
    check_room(served, lambda device: device.memory_stats() or {})
    return load_model(directory, mesh=served.mesh, dtype=dtype, quantization=quantization).params


def check_room(served: LoadedModel, memory_of: Callable[[Any], Mapping[str, int]]) -> None:
    """ValueError where a device has not the memory for a second set of weights beside what it holds.

    memory_of: a device's memory_stats(); one that does not tell is taken to have enough.
    """
    import jax

    from jaxinfer.quantization import num_bytes

    needed: Counter[Any] = Counter()
    for array in jax.tree.leaves(served.params):
        for shard in array.addressable_shards:
            needed[shard.device] += num_bytes([shard.data])
    for device, size in needed.items():
        memory = memory_of(device)
        if "bytes_limit" not in memory:
            continue
        free = memory["bytes_limit"] - memory["bytes_in_use"]
        if size > free:
            raise ValueError(
                f"the new weights take {size} bytes of {device} beside the old ones, and {free} are free; "
                f"start the server with a smaller KV cache, or another server"
            )


def _invalid(message: str) -> RequestError:
    return RequestError("INVALID_ARGUMENT", message)
