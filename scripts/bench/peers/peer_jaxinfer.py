"""jaxinfer's engine, driven by token ids in this process."""

import time

import common

from jaxinfer.config import EngineConfig
from jaxinfer.types import Request, SamplingParams

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
CONTEXT = 8192  # tokens in the cache, all sequences together, as peer_llamacpp.py has


class Peer:
    name = "jaxinfer"
    dtypes = tuple(DTYPES)

    def __init__(self, model, dtype, threads, work):
        from jaxinfer.engine import Engine

        self.engine = Engine(
            EngineConfig(
                model=model,
                dtype=DTYPES[dtype],
                max_model_len=2048,
                max_num_seqs=32,
                page_size=16,
                num_pages=CONTEXT // 16,
                compilation_cache_dir=f"{work}/compile-cache/jaxinfer",
            )
        )
        self.number = 0

    def version(self):
        import jax

        return {"jax": jax.__version__}

    def add(self, prompt, max_new):
        self.number += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_new, ignore_eos=True)
        self.engine.add_request(Request(str(self.number), tuple(prompt), params, arrival_time=time.monotonic()))
        return str(self.number)

    def drive(self, prompts, max_new, emit=None):
        order = [self.add(prompt, new) for prompt, new in zip(prompts, max_new, strict=True)]
        done, seen = {}, 0
        while self.engine.has_unfinished():
            for output in self.engine.step():
                ids = output.outputs[0].token_ids
                if emit:
                    for token in ids[seen:]:
                        emit(token)
                    seen = len(ids)
                if output.finished:
                    done[output.request_id] = list(ids)
        return [done[request_id] for request_id in order]

    def generate(self, prompts, max_new):
        return self.drive(prompts, max_new)

    def stream(self, prompt, n, emit):
        self.drive([prompt], [n], emit)


if __name__ == "__main__":
    common.main(Peer)
