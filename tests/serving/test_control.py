"""The control service and reflection: for whoever runs the server, off unless asked for."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import jax
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from safetensors.numpy import load_file, save_file

from jaxinfer.engine import Engine
from jaxinfer.llm import LLM
from jaxinfer.loading import load_model
from jaxinfer.types import SamplingParams
from serving.__main__ import main
from serving.client import AsyncClient
from serving.control import ControlConfig, check_room
from serving.generated import control_pb2 as pb
from serving.generated import control_pb2_grpc
from serving.security import Tokens
from serving.server import Server
from tests.serving.harness import GREEDY, Brake, address, collect, refused, run, serving, until

PROMPT = "one small prompt"


@asynccontextmanager
async def controlled(
    engine: Engine, control: ControlConfig | None = None, **config: Any
) -> AsyncIterator[tuple[Server, AsyncClient, Any]]:
    """A server, a client that tries once, and a stub of its control service."""
    async with (
        serving(engine, control=control or ControlConfig(port=0), **config) as server,
        AsyncClient(address(server), max_tries=1) as client,
        grpc.aio.insecure_channel(f"localhost:{server.control_port}") as channel,
    ):
        yield server, client, control_pb2_grpc.ControlStub(channel)


def test_info_requests_and_abort(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        brake = Brake(engine, monkeypatch)
        async with controlled(engine) as (server, client, control):
            brake.let(100)
            info = await control.GetServerInfo(pb.GetServerInfoRequest())
            assert (info.model, info.healthy, info.num_running, info.num_waiting) == ("small", True, 0, 0)
            assert (info.max_model_len, info.max_num_seqs) == (96, 4)
            assert info.plan == engine.plan.describe()
            assert info.devices
            assert info.jax_version
            assert info.checkpoint == str(engine.loaded.directory)
            accepted = info.num_requests
            while brake._may_step.acquire(blocking=False):
                pass
            calls = [
                asyncio.create_task(collect(client.stream(PROMPT, request_id=name, max_tokens=70, ignore_eos=True)))
                for name in ("twice", "twice", "once")
            ]
            await until(lambda: len(server.frontend.engine.streams) == 3)
            brake.let(6)
            await brake.held_after(6)
            listed = asyncio.create_task(_list(control))
            await until(lambda: not server.frontend.engine._commands.empty())
            brake.let(1)
            requests = await listed
            assert sorted(request.request_id for request in requests) == ["once", "twice", "twice"]
            assert all(request.running and request.prompt_tokens == len(PROMPT) for request in requests)
            assert all(0 < request.completion_tokens < 7 and request.age_seconds > 0 for request in requests)
            await refused(control.Abort(pb.AbortRequest(request_id="nobody")), "NOT_FOUND", "'nobody'")
            assert (await control.Abort(pb.AbortRequest(request_id="twice"))).num_aborted == 2
            brake.release()
            for call in calls[:2]:
                await refused(call, "ABORTED", "whoever runs the server")
            whole, _ = await calls[2]
            assert len(whole.completions[0].token_ids) == 70
            assert (await control.GetServerInfo(pb.GetServerInfoRequest())).num_requests == accepted + 3

    run(scenario())


async def _list(control: Any) -> Any:
    return (await control.ListRequests(pb.ListRequestsRequest())).requests


def test_drain_asks_the_process_to_stop(engine: Engine) -> None:
    async def scenario() -> None:
        async with controlled(engine) as (server, _, control):
            asked = asyncio.create_task(server.wait_until_asked_to_stop())
            await asyncio.sleep(0)
            assert not asked.done()
            assert (await control.Drain(pb.DrainRequest())).num_unfinished == 0
            await asked
            assert await server.drain()
            assert not (await control.GetServerInfo(pb.GetServerInfoRequest())).healthy

    run(scenario())


def other_weights(directory: Path, target: Path) -> Path:
    shutil.copytree(directory, target)
    weights = load_file(target / "model.safetensors")
    rng = np.random.default_rng(0)
    save_file(
        {name: (own * rng.uniform(0.5, 1.5, own.shape)).astype(own.dtype) for name, own in weights.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


def test_load(llm: LLM, model_directory: Path, tmp_path: Path) -> None:
    """The answers afterwards are the new weights' own, cached prompts included."""
    engine, params = llm.engine, llm.engine.loaded.params
    long = "the same long prompt, cached"
    greedy = SamplingParams(max_tokens=12, **GREEDY)
    (before,) = llm.generate(long, greedy)
    target = other_weights(model_directory, tmp_path / "allowed" / "other")
    llm.update_params(load_model(target).params)
    (expected,) = llm.generate(long, greedy)
    llm.update_params(params)
    assert before.outputs[0].token_ids != expected.outputs[0].token_ids
    different = tmp_path / "allowed" / "different"
    shutil.copytree(model_directory, different)
    config = (different / "config.json").read_text()
    (different / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert (different / "config.json").read_text() != config
    (tmp_path / "allowed" / "link").symlink_to(model_directory)

    async def scenario() -> None:
        control_config = ControlConfig(port=0, load_root=tmp_path / "allowed")
        async with controlled(engine, control_config) as (_, client, control):
            for _ in range(2):
                answer = await client.generate(long, max_tokens=12, **GREEDY)
                assert answer.completions[0].token_ids == before.outputs[0].token_ids
            assert answer.usage is not None
            assert answer.usage.cached_prompt_tokens > 0
            running = asyncio.create_task(client.generate("b", max_tokens=90, ignore_eos=True))
            await control.Load(pb.LoadRequest(path="other"))
            answer = await client.generate(long, max_tokens=12, **GREEDY)
            assert answer.completions[0].token_ids == expected.outputs[0].token_ids
            assert answer.usage is not None
            assert answer.usage.cached_prompt_tokens == 0
            assert len((await running).completions[0].token_ids) == 90
            assert (await control.GetServerInfo(pb.GetServerInfoRequest())).checkpoint == str(target)
            for path, words in (
                ("", "no directory below --load-root"),
                ("..", "no directory below --load-root"),
                ("../allowed/../..", "no directory below --load-root"),
                (str(model_directory), "no directory below --load-root"),
                ("link", "no directory below --load-root"),
                ("none", "no directory below --load-root"),
                ("x\0y", "no directory below --load-root"),
                ("x" * 5000, "no directory below --load-root"),
                (".", "config.json"),
                ("different", "start another server"),
            ):
                await refused(control.Load(pb.LoadRequest(path=path)), "INVALID_ARGUMENT", words)
            answer = await client.generate(long, max_tokens=12, **GREEDY)
            assert answer.completions[0].token_ids == expected.outputs[0].token_ids

    try:
        run(scenario())
    finally:
        llm.update_params(params)


def test_load_needs_room_for_both(engine: Engine) -> None:
    needed = sum(array.nbytes for array in jax.tree.leaves(engine.loaded.params))
    memory = {"bytes_limit": needed + 5, "bytes_in_use": 5}
    check_room(engine.loaded, lambda _: memory)
    check_room(engine.loaded, lambda _: {})
    memory["bytes_in_use"] += 1
    with pytest.raises(ValueError, match=rf"{needed} bytes of .* and {needed - 1} are free"):
        check_room(engine.loaded, lambda _: memory)


def test_profile(engine: Engine, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with controlled(engine, ControlConfig(0, profile_directory=tmp_path)) as (_, client, control):
            profile = control.Profile(pb.ProfileRequest(seconds=0.3))
            await asyncio.sleep(0.05)
            await refused(control.Profile(pb.ProfileRequest(seconds=0.1)), "RESOURCE_EXHAUSTED", "under way")
            await client.generate(PROMPT, max_tokens=8)
            assert (await profile).directory == str(tmp_path)
            assert list(tmp_path.rglob("*.xplane.pb"))
            for seconds in (0, -1, 61, float("nan")):
                await refused(control.Profile(pb.ProfileRequest(seconds=seconds)), "INVALID_ARGUMENT", "(0, 60]")

    run(scenario())


def test_off_unless_asked_for(engine: Engine) -> None:
    async def scenario() -> None:
        async with controlled(engine) as (server, client, control):
            await refused(control.Profile(pb.ProfileRequest()), "INVALID_ARGUMENT", "--profile-dir")
            await refused(control.Load(pb.LoadRequest(path="x")), "INVALID_ARGUMENT", "--load-root")
            on_main_port = control_pb2_grpc.ControlStub(client._channel)
            await refused(on_main_port.GetServerInfo(pb.GetServerInfoRequest()), "UNIMPLEMENTED")
        async with serving(engine) as server:
            assert server.control_port == 0

    run(scenario())


def test_control_needs_the_servers_tokens(engine: Engine) -> None:
    async def scenario() -> None:
        async with controlled(engine, tokens=Tokens(["a-token-of-some-length"])) as (_, _, control):
            for call in (
                control.GetServerInfo(pb.GetServerInfoRequest()),
                control.ListRequests(pb.ListRequestsRequest()),
                control.Abort(pb.AbortRequest()),
                control.Drain(pb.DrainRequest()),
                control.Profile(pb.ProfileRequest()),
                control.Load(pb.LoadRequest()),
            ):
                await refused(call, "UNAUTHENTICATED")
            good = (("authorization", "Bearer a-token-of-some-length"),)
            assert (await control.GetServerInfo(pb.GetServerInfoRequest(), metadata=good)).healthy

    run(scenario())


def test_before_the_model_is_loaded(engine: Engine) -> None:
    async def scenario() -> None:
        from serving.server import ServerConfig

        server = Server(ServerConfig("small", port=0, control=ControlConfig(0)), lambda: engine)
        await server.listen()
        async with grpc.aio.insecure_channel(f"localhost:{server.control_port}") as channel:
            control: Any = control_pb2_grpc.ControlStub(channel)
            await refused(control.GetServerInfo(pb.GetServerInfoRequest()), "UNAVAILABLE", "starting")
            await refused(_list(control), "UNAVAILABLE", "starting")
        await server.stop()

    run(scenario())


def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXINFER_TOKENS", raising=False)
    for flags, words in (
        (["--control-port", "-1"], "[0, 65535]"),
        (["--profile-dir", str(tmp_path)], "--control-port"),
        (["--load-root", str(tmp_path)], "--control-port"),
        (["--control-port", "0", "--load-root", str(tmp_path / "none")], "no directory"),
        (["--control-port", "0", "--host", "0.0.0.0", "--allow-anyone"], "--tokens-file"),
        (["--step-timeout", "0"], "step_timeout=0"),
    ):
        assert main(flags) == 2, flags
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), line
        assert words in line, line


def test_reflection(engine: Engine) -> None:
    """Every service can be described, the foreign one too; without the flag nothing answers."""

    async def ask(server: Server, **question: Any) -> Any:
        async with grpc.aio.insecure_channel(address(server)) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)]))
            return await call.read()

    async def scenario() -> None:
        async with serving(engine, reflection=True) as server:
            listed = {own.name for own in (await ask(server, list_services="")).list_services_response.service}
            assert listed == {
                "jaxinfer.v1.Inference",
                "jaxinfer.v1.Models",
                "inference.GRPCInferenceService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            for name in listed:
                answer = await ask(server, file_containing_symbol=name)
                (blob, *_) = answer.file_descriptor_response.file_descriptor_proto
                services = [own.name for own in descriptor_pb2.FileDescriptorProto.FromString(blob).service]
                assert name.rpartition(".")[2] in services
        async with serving(engine) as server, grpc.aio.insecure_channel(address(server)) as channel:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            assert await stub.ServerReflectionInfo().code() == grpc.StatusCode.UNIMPLEMENTED

    run(scenario())
