"""Engines of several layouts in one process of eight pretended devices: `python -m tests.e2e.layouts`, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

# What makes a small engine do all it can: chunks, rings, preemption, prefix hits, samples that share pages.
SIZES = {"max_model_len": 64, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "num_pages": 20}


def mixed() -> list[Any]:
    """Sampling parameters of every sort, so that shards differ in what they need of a step."""
    from jaxinfer.types import SamplingParams
    from tests.e2e.harness import greedy

    return [
        SamplingParams(temperature=0.8, top_k=7, top_p=0.9, max_tokens=8, seed=5, logprobs=3, ignore_eos=True),
        greedy(8, prompt_logprobs=2, logprobs=1),
        SamplingParams(temperature=1.0, n=3, max_tokens=8, seed=9, ignore_eos=True, repetition_penalty=1.3),
        greedy(8, logit_bias={7: 50.0}, min_tokens=3),
        greedy(8, allowed_token_ids=[5, 6, 7, 50, 80]),
        SamplingParams(temperature=1.2, typical_p=0.8, min_p=0.02, max_tokens=8, seed=2, ignore_eos=True),
    ]


def main(arguments: str) -> None:
    from jaxinfer.config import EngineConfig
    from jaxinfer.engine import Engine
    from jaxinfer.sharding.mesh import parse_mesh
    from tests.e2e.harness import GOLDENS, few_programs, finish, greedy, random_prompts
    from tests.e2e.harness import add as add_to

    golden, meshes, kv_cache_dtype = json.loads(arguments)
    answers: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        few_programs(patch, (16,))
        for mesh in meshes:
            # A page has as many tokens in every layout, so that the same requests are preempted.
            sizes = SIZES | {"page_size": SIZES["page_size"] // parse_mesh(mesh).get("context", 1)}
            config = EngineConfig(
                str(GOLDENS / golden),
                mesh=mesh or None,
                compilation_cache_dir=False,
                kv_cache_dtype=kv_cache_dtype,
                **sizes,
            )
            engine = Engine(config)
            prompts = random_prompts(11, 30, 15, 7, 38, 12, 33)
            names = [add_to(engine, prompt, greedy(24)) for prompt in prompts]
            outputs = finish(engine)
            # Pages of the last ones are there still, and now every request wants something else of the sampler.
            names += [add_to(engine, prompt, own) for prompt, own in zip(reversed(prompts), mixed(), strict=True)]
            outputs |= finish(engine)
            stats = engine.stats()
            answers.append(
                {
                    "tokens": [[sample.token_ids for sample in outputs[name].outputs] for name in names],
                    "devices": engine.plan.mesh.size,
                    "preemptions": stats.num_preemptions,
                    "hits": engine.scheduler.stats().prefix_hit_tokens,
                    "experts": list(stats.expert_tokens.items()),
                }
            )
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
