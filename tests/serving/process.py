"""The server in a process of its own, with few programs: `python -m tests.serving.process FLAGS`.

With HANG_AFTER=N in the environment, the engine's step after so many never returns.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class ServerProcess:
    """Started at once; `port` once it is ready. Used as a context manager, which kills what is left."""

    def __init__(self, *flags: str, hang_after: int | None = None) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAXINFER_"))}
        hang = {} if hang_after is None else {"HANG_AFTER": str(hang_after)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.process", "--port", "0", "--http-port", "0", *flags],
            cwd=ROOT,
            env={**inherited, **hang, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, words: str) -> re.Match[str]:
        """The first line on standard error that has these words from now on."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(words, line):
                return found
        raise AssertionError(f"{words!r} never came: {self.lines}")

    def end(self, seconds: float = 30) -> int:
        """Its exit status; the rest of its lines are in `lines`."""
        _, rest = self.process.communicate(timeout=seconds)
        self.lines += rest.splitlines()
        return self.process.returncode


if __name__ == "__main__":
    import itertools
    import threading
    from typing import Any

    import pytest

    from jaxinfer.engine import Engine
    from serving.__main__ import main
    from tests.e2e.harness import few_programs

    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        if "HANG_AFTER" in os.environ:
            step, numbers, limit = Engine.step, itertools.count(), int(os.environ["HANG_AFTER"])

            def hanging(self: Engine) -> Any:
                if next(numbers) >= limit:
                    threading.Event().wait()
                return step(self)

            patch.setattr(Engine, "step", hanging)
        sys.exit(main(sys.argv[1:]))
