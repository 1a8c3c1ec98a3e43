"""One engine in a process of its own: `python -m tests.e2e.process`, its choices and numbers as JSON on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def in_own_process(
    model: Path, prompts: list[list[int]], environment: dict[str, str], **settings: Any
) -> dict[str, Any]:
    """Generate greedily in a fresh process. {"tokens": ..., "compiled": ..., "loaded": ...}; settings of the engine."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "XLA_", "PYTHONH"))
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.e2e.process", json.dumps([str(model), prompts, settings])],
        cwd=ROOT,
        env={**inherited, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def main(arguments: str) -> None:
    import pytest

    from jaxinfer.llm import LLM
    from tests.e2e.harness import few_programs, greedy

    model, prompts, settings = json.loads(arguments)
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch)
        llm = LLM(model, **settings)
    outputs = llm.generate(prompts, greedy(8))
    stats = llm.engine.stats()
    tokens = [output.outputs[0].token_ids for output in outputs]
    numbers = {"compiled": stats.num_programs_compiled, "loaded": stats.num_programs_loaded}
    print(json.dumps({"tokens": tokens, "devices": llm.engine.loaded.mesh.size, **numbers}))


if __name__ == "__main__":
    main(sys.argv[1])
