"""The command itself: signals, exit statuses, one line for what is wrong."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import grpc
import httpx
import pytest

from serving.__main__ import allow_files
from serving.client import Client, Generation
from serving.generated import control_pb2, control_pb2_grpc
from tests.serving.process import ServerProcess


@pytest.fixture
def flags(model_directory: Path, compiled_programs: Path) -> list[str]:
    return [
        *("--model", str(model_directory), "--compilation-cache-dir", str(compiled_programs)),
        *("--max-model-len", "4096", "--max-num-seqs", "4", "--max-num-batched-tokens", "16"),
    ]


def test_sigterm_drains_and_a_second_ends_at_once(flags: list[str]) -> None:
    with ServerProcess(*flags) as server:
        port = server.wait_for(r"is ready on port (\d+)")[1]
        with Client(f"localhost:{port}", max_tries=1, timeout=60) as client:
            assert client.is_serving()
            whole = Generation()
            stream = client.stream("a" * 20, max_tokens=400, ignore_eos=True)
            whole.add(next(stream))
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            with pytest.raises(grpc.RpcError, match="shutting down"):
                client.generate("b")
            for message in stream:
                whole.add(message)
            assert len(whole.completions[0].token_ids) == 400
            assert whole.completions[0].finish_reason == "length"
        assert server.end() == 0, server.lines
        assert server.lines[-1].rstrip().endswith("stopped")

    with ServerProcess(*flags, "--grace", "600") as server:
        port = server.wait_for(r"is ready on port (\d+)")[1]
        with Client(f"localhost:{port}", max_tries=1, timeout=60) as client:
            stream = client.stream("a" * 20, max_tokens=4000, ignore_eos=True)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("draining")
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.end(20) == 128 + signal.SIGTERM
            assert time.monotonic() - started < 15
            with pytest.raises(grpc.RpcError):
                list(stream)


def test_sigterm_drains_http_too(flags: list[str]) -> None:
    with ServerProcess(*flags, "--log-format", "json") as server:
        port = server.wait_for(r"is ready on port \d+, HTTP on port (\d+)")[1]
        body = {"prompt": "a" * 20, "max_tokens": 400, "ignore_eos": True, "stream": True, "request_id": "mine"}
        with httpx.Client(base_url=f"http://localhost:{port}", timeout=60) as client:
            assert client.get("/health").status_code == 200
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                server.wait_for("draining")
                assert client.get("/health").status_code == 503
                assert client.post("/v1/completions", json={"prompt": "b"}).status_code == 503
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0, server.lines
        (line,) = [found for found in map(json.loads, server.lines) if found["message"] == "request"]
        assert (line["request_id"], line["completion_tokens"], line["finish"]) == ("mine", 400, "length")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_many_connections_may_be_open() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if before[1] == resource.RLIM_INFINITY else min(8192, before[1])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    with ServerProcess("--model", str(tmp_path)) as server:
        assert server.end() == 2
        error = server.lines[-1]
        assert error.startswith("error: ")
        assert "config.json" in error
        assert not any("Traceback" in line for line in server.lines)


def test_a_step_that_hangs_ends_the_process(flags: list[str]) -> None:
    with ServerProcess(*flags, "--step-timeout", "2", hang_after=5) as server:
        port = server.wait_for(r"is ready on port (\d+)")[1]
        with Client(f"localhost:{port}", max_tries=1, timeout=60) as client:
            stream = client.stream("a" * 20, max_tokens=400, ignore_eos=True)
            next(stream)
            started = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert 1 < time.monotonic() - started < 12
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert server.end(10) == 1
        assert server.lines[-1].startswith("error: no step has returned for 2 s (--step-timeout)")
        assert not any("Traceback" in line for line in server.lines)


def test_kill_is_heard_at_once(flags: list[str]) -> None:
    with ServerProcess(*flags) as server:
        port = server.wait_for(r"is ready on port (\d+)")[1]
        with Client(f"localhost:{port}", max_tries=1, timeout=60) as client:
            stream = client.stream("a" * 20, max_tokens=4000, ignore_eos=True)
            next(stream)
            server.process.kill()
            started = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            with pytest.raises(grpc.RpcError) as caught:
                client.generate("b")
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - started < 10


def test_drain_over_the_control_port(flags: list[str]) -> None:
    with ServerProcess(*flags, "--control-port", "0") as server:
        port = server.wait_for(r"is ready on port (\d+)")[1]
        control_port = server.wait_for(r"control on port (\d+)")[1]
        with (
            Client(f"localhost:{port}", max_tries=1, timeout=60) as client,
            grpc.insecure_channel(f"localhost:{control_port}") as channel,
        ):
            stream = client.stream("a" * 20, max_tokens=100, ignore_eos=True)
            whole = Generation().add(next(stream))
            answer = control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest())
            assert answer.num_unfinished == 1
            for message in stream:
                whole.add(message)
            assert len(whole.completions[0].token_ids) == 100
        assert server.end() == 0, server.lines
