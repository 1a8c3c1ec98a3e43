"""Engines of several layouts in one process of eight pretended devices: `python -m tests.e2e.layouts`, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

# What makes a small engine do all it can: chunks, rings, preemption, prefix hits, samples that share pages.
SIZES = {"max_model_len": 64, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_pages": 30}


def main(arguments: str) -> None:
    from jaxinfer.config import EngineConfig
    from jaxinfer.engine import Engine
    from tests.e2e.harness import GOLDENS, few_programs, finish, greedy, random_prompts
    from tests.e2e.harness import add as add_to

    golden, meshes = json.loads(arguments)
    answers: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch, (16,))
        for mesh in meshes:
            config = EngineConfig(str(GOLDENS / golden), mesh=mesh or None, compilation_cache_dir=False, **SIZES)
            engine = Engine(config)
            prompts = random_prompts(11, 30, 15, 7, 38, 12, 33)
            names = [add_to(engine, prompt, greedy(24)) for prompt in prompts]
            outputs = finish(engine)
            names += [add_to(engine, prompt, greedy(8)) for prompt in reversed(prompts)]
            outputs |= finish(engine)
            stats = engine.stats()
            answers.append(
                {
                    "tokens": [outputs[name].outputs[0].token_ids for name in names],
                    "devices": engine.plan.mesh.size,
                    "preemptions": stats.num_preemptions,
                    "hits": engine.scheduler.stats().prefix_hit_tokens,
                }
            )
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
