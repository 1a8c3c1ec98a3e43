"""HF transformers generate(): static batch, default (dynamic) KV cache, sdpa.

W3 sorts requests by output length and runs left-padded batches of HF_BATCH
(default 32 = one batch); a batch runs until its longest request is done and the
surplus is cut off. W4 uses a prefix cache by hand: prefill the prefix once, then
repeat its cache over the batch. HF_MODE=cb uses generate_batch (continuous
batching), HF_MODE=compile a static cache with torch.compile.
"""

import copy
import os

import common
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

transformers.logging.set_verbosity_error()
MODE = os.environ.get("HF_MODE", "")
BATCH = int(os.environ.get("HF_BATCH", "32"))
CB_PAGE = int(os.environ.get("HF_CB_PAGE", "32"))
PAD = 2


class Emit(BaseStreamer):
    def __init__(self, emit):
        self.emit, self.first = emit, True

    def put(self, value):
        if self.first:  # generate() first puts the prompt
            self.first = False
        else:
            self.emit(int(value.reshape(-1)[0]))

    def end(self):
        pass


class Peer:
    name = "hf-generate" + (f"-{MODE}" if MODE else "") + (f"-b{BATCH}" if BATCH != 32 else "")
    dtypes = ("fp32", "bf16")

    def __init__(self, model, dtype, threads, work):
        torch.set_num_threads(threads)
        self.m = AutoModelForCausalLM.from_pretrained(
            model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        ).eval()
        self.m.generation_config.eos_token_id = None
        self.m.generation_config.pad_token_id = PAD

    def version(self):
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def cfg(self, n):
        extra = {"cache_implementation": "static"} if MODE == "compile" else {}
        return GenerationConfig(
            do_sample=False, max_new_tokens=n, min_new_tokens=n, eos_token_id=None, pad_token_id=PAD, **extra
        )

    @torch.inference_mode()
    def batch(self, prompts, n):
        width = max(map(len, prompts))
        x = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        y = self.m.generate(x, attention_mask=mask, generation_config=self.cfg(n))
        return y[:, width:].tolist()

    def generate(self, prompts, max_new):
        if MODE == "cb":
            return self.continuous(prompts, max_new)
        order = sorted(range(len(prompts)), key=lambda i: max_new[i])
        outs = [None] * len(prompts)
        for k in range(0, len(order), BATCH):
            part = order[k : k + BATCH]
            ys = self.batch([prompts[i] for i in part], max(max_new[i] for i in part))
            for i, y in zip(part, ys, strict=False):
                outs[i] = y[: max_new[i]]
        return outs

    def continuous(self, prompts, max_new):
        # generate_batch has one max_new_tokens for all: use the manager underneath.
        # No inference_mode here: the manager runs in its own thread.
        if not hasattr(self, "man"):
            gc = GenerationConfig(do_sample=False, max_new_tokens=512, eos_token_id=-1, pad_token_id=PAD)
            cb = transformers.ContinuousBatchingConfig(
                page_size=CB_PAGE, num_blocks=16384 // CB_PAGE, max_batch_tokens=512
            )
            self.cm = self.m.continuous_batching_context_manager(generation_config=gc, continuous_batching_config=cb)
            self.man = self.cm.__enter__()
        man = self.man
        rid = {
            man.add_request(list(p), max_new_tokens=n): i
            for i, (p, n) in enumerate(zip(prompts, max_new, strict=False))
        }
        outs, left = [None] * len(prompts), len(prompts)
        while left:
            r = man.get_result(timeout=1)
            if r is None:
                if not man.is_running():
                    raise RuntimeError("continuous batching thread died")
            elif r.is_finished() or r.error:
                if r.error:
                    raise RuntimeError(r.error)
                outs[rid[r.request_id]] = list(r.generated_tokens)
                left -= 1
        return outs

    @torch.inference_mode()
    def stream(self, prompt, n, emit):
        self.m.generate(
            torch.tensor([prompt]),
            streamer=Emit(emit),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=self.cfg(n),
        )

    @torch.inference_mode()
    def _shared(self, prefix, suffixes, n):
        cache = DynamicCache(config=self.m.config)
        self.m(torch.tensor([prefix]), past_key_values=cache, logits_to_keep=1)
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(suffixes))
        x = torch.tensor([prefix + s for s in suffixes])
        y = self.m.generate(x, attention_mask=torch.ones_like(x), past_key_values=cache, generation_config=self.cfg(n))
        return y[:, x.shape[1] :].tolist()

    if not MODE:
        shared = _shared


if __name__ == "__main__":
    common.main(Peer)
