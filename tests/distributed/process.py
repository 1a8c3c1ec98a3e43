"""Processes of one group on this machine: `python -m tests.distributed.process COMMAND ...` is one of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """Started by the same command, process 0 first; what they say goes to files in `directory`.

    cache: where jax keeps what process 0 compiles, for all (`share_programs`). devices: of each process.
    """

    def __init__(self, directory: Path, count: int, command: Sequence[str], cache: Path, devices: int) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX"))}
        environment = {
            **inherited,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "FAKE_STEP_SECONDS": "0.005",
        }
        self.address = f"localhost:{free_port()}"
        self._logs = [directory / f"stderr.{number}" for number in range(count)]
        self._outputs = [directory / f"stdout.{number}" for number in range(count)]
        self._all = []
        for number, (log, output) in enumerate(zip(self._logs, self._outputs, strict=True)):
            place = ["--coordinator", self.address, "--num-processes", str(count), "--process-id", str(number)]
            with log.open("w") as stderr, output.open("w") as stdout:
                whole = [sys.executable, "-m", "tests.distributed.process", *command, *place]
                self._all.append(subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr))

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses; fails where one has not ended in time."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.01, deadline - time.monotonic())) for process in self._all]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not all have ended after {seconds} s: {self.said()}") from None

    def wait_for(self, path: Path, text: str) -> None:
        """Until a file holds the text."""
        deadline = time.monotonic() + 120
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self._all), self.said()
            time.sleep(0.01)

    def signal(self, number: int, kind: signal.Signals) -> None:
        self._all[number].send_signal(kind)

    def said(self) -> list[list[str]]:
        """Lines on standard error."""
        return [log.read_text().splitlines() for log in self._logs]

    def printed(self) -> list[str]:
        return [output.read_text() for output in self._outputs]

    def kill(self) -> None:
        for process in self._all:
            process.kill()
            process.wait()


@contextmanager
def processes(
    directory: Path, count: int, command: Sequence[str], cache: Path, devices: int = 1
) -> Iterator[Processes]:
    started = Processes(directory, count, command, cache, devices)
    try:
        yield started
    finally:
        started.kill()


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Process 0 compiles, and the others load; all compiling the same at once takes twice as long and more.

    jax does that where it is asked to, by a program's key, into which it puts CPU devices as each process sees them.
    """
    from jax._src import cache_key

    patch.setattr(cache_key, "_hash_accelerator_config", lambda hash_obj, devices: None)


def main(command: str, arguments: Sequence[str]) -> int:
    if command == "fake":
        from tests.run.fake_engine import main as run_fake

        return run_fake(arguments)

    import jaxinfer.distributed.follower
    import jaxinfer.engine
    from tests.e2e.harness import few_programs

    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch, (16,))
        share_programs(patch)
        patch.setattr(jaxinfer.distributed.follower, "resolve", jaxinfer.engine.resolve)
        if command == "serve":
            from serving.__main__ import main as serve

            return serve(arguments)
        from jaxinfer.run import main as run

        return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
