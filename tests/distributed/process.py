"""One process of several: `python -m tests.distributed.process COMMAND ...`, a command of jaxinfer's with few programs."""

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

ROOT = Path(__file__).parents[2]
SIZES = [
    "--max-model-len",
    "96",
    "--page-size",
    "4",
    "--num-pages",
    "60",
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "16",
]


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """Processes of one group, process 0 first; what they say goes to files in `directory`."""

    def __init__(self, directory: Path, count: int, command: Sequence[str], cache: Path) -> None:
        directory.mkdir(exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX"))}
        environment = {
            **inherited,
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        port = free_port()
        self.logs = [directory / f"log.{number}" for number in range(count)]
        self.outputs = [directory / f"stdout.{number}" for number in range(count)]
        self.all = []
        for number, (log, output) in enumerate(zip(self.logs, self.outputs, strict=True)):
            place = ["--coordinator", f"localhost:{port}", "--num-processes", str(count), "--process-id", str(number)]
            with log.open("w") as stderr, output.open("w") as stdout:
                full = [sys.executable, "-m", "tests.distributed.process", *command, *place]
                self.all.append(subprocess.Popen(full, cwd=ROOT, env=environment, stdout=stdout, stderr=stderr))

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses; fails where one has not ended in time."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.01, deadline - time.monotonic())) for process in self.all]

    def wait_for(self, path: Path, text: str, seconds: float = 60) -> None:
        """Until a file holds the text."""
        deadline = time.monotonic() + seconds
        while not path.exists() or text not in path.read_text():
            assert time.monotonic() < deadline, self.said()
            assert all(process.poll() is None for process in self.all), self.said()
            time.sleep(0.01)

    def signal(self, number: int, kind: signal.Signals) -> None:
        self.all[number].send_signal(kind)

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]


@contextmanager
def processes(directory: Path, count: int, command: Sequence[str], cache: Path) -> Iterator[Processes]:
    started = Processes(directory, count, command, cache)
    try:
        yield started
    finally:
        for process in started.all:
            process.kill()
            process.wait()


def main(command: str, arguments: Sequence[str]) -> int:
    import pytest

    import jaxinfer.distributed.follower
    import jaxinfer.engine
    import jaxinfer.run
    import serving.__main__
    from tests.e2e.harness import few_programs

    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch, (16,))
        patch.setattr(jaxinfer.distributed.follower, "resolve", jaxinfer.engine.resolve)
        return {"run": jaxinfer.run.main, "serve": serving.__main__.main}[command](arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
