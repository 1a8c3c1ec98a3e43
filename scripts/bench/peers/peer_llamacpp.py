"""llama.cpp through llama-cpp-python's low-level bindings.

One context with a unified KV cache; the scheduler below does what llama-server's
slots do: all running sequences decode together, waiting prompts fill the rest of
the batch. W4 prefills the prefix once and copies it with llama_memory_seq_cp.
KV cache: f32 for fp32, else llama.cpp's default f16.
"""

import ctypes
import os

import common
import llama_cpp as L
import numpy as np
from to_gguf import convert

KIND = {"fp32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
SEQS, CTX, BATCH = 32, 8192, 2048


class Peer:
    name = "llama.cpp"
    dtypes = tuple(KIND)

    @staticmethod
    def path(model, dtype, work):
        base = os.path.basename(model.rstrip("/")).split("-")[0]
        return os.path.join(work, f"{base}-{KIND[dtype]}.gguf")

    @classmethod
    def convert(cls, model, dtype, work):
        convert(model, cls.path(model, dtype, work), KIND[dtype])

    def __init__(self, model, dtype, threads, work):
        L.llama_backend_init()
        if not os.environ.get("LLAMA_VERBOSE"):
            self._quiet = L.llama_log_callback(lambda *a: None)
            L.llama_log_set(self._quiet, ctypes.c_void_p(0))
        mp = L.llama_model_default_params()
        mp.n_gpu_layers = 0
        self.model = L.llama_model_load_from_file(self.path(model, dtype, work).encode(), mp)
        cp = L.llama_context_default_params()
        cp.n_ctx, cp.n_batch, cp.n_seq_max = CTX, BATCH, SEQS
        cp.n_threads = cp.n_threads_batch = threads
        cp.kv_unified = True
        if dtype == "fp32":
            cp.type_k = cp.type_v = L.GGML_TYPE_F32
        self.ctx = L.llama_init_from_model(self.model, cp)
        self.mem = L.llama_get_memory(self.ctx)
        self.vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))
        self.batch = L.llama_batch_init(BATCH, 0, 1)

    def version(self):
        return {"llama-cpp-python": L.__version__, "system": L.llama_print_system_info().decode()}

    def add(self, tok, pos, seq, want):
        b, i = self.batch, self.batch.n_tokens
        b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = tok, pos, 1, want
        b.seq_id[i][0] = seq
        b.n_tokens = i + 1
        return i

    def decode(self):
        rc = L.llama_decode(self.ctx, self.batch)
        if rc:
            raise RuntimeError(f"llama_decode returned {rc}")

    def argmax(self, i):
        p = L.llama_get_logits_ith(self.ctx, i)
        return int(np.ctypeslib.as_array(p, shape=(self.vocab,)).argmax())

    def generate(self, prompts, max_new, start=0, emit=None):
        """start: that many leading ids of every prompt are in the cache already."""
        outs = [[] for _ in prompts]
        waiting, free = list(range(len(prompts)))[::-1], list(range(SEQS))[::-1]
        running, feeding = {}, {}  # request -> [seq, pos]
        while waiting or running or feeding:
            self.batch.n_tokens, ask = 0, {}
            for r, st in running.items():
                ask[r] = self.add(outs[r][-1], st[1], st[0], 1)
                st[1] += 1
            while True:
                for r in list(feeding):
                    st = feeding[r]
                    while st[1] < len(prompts[r]) and self.batch.n_tokens < BATCH:
                        last = st[1] == len(prompts[r]) - 1
                        i = self.add(prompts[r][st[1]], st[1], st[0], last)
                        st[1] += 1
                        if last:
                            ask[r] = i
                            running[r] = feeding.pop(r)
                if not (waiting and free) or self.batch.n_tokens == BATCH:
                    break
                feeding[waiting.pop()] = [free.pop(), start]
            self.decode()
            for r, i in ask.items():
                outs[r].append(self.argmax(i))
                if emit:
                    emit(outs[r][-1])
                if len(outs[r]) == max_new[r]:
                    seq = running.pop(r)[0]
                    L.llama_memory_seq_rm(self.mem, seq, -1, -1)
                    free.append(seq)
        return outs

    def stream(self, prompt, n, emit):
        self.generate([prompt], [n], emit=emit)

    def shared(self, prefix, suffixes, n):
        self.batch.n_tokens = 0
        for i, t in enumerate(prefix):
            self.add(t, i, 0, 0)
        self.batch.logits[len(prefix) - 1] = 1
        self.decode()
        for s in range(1, len(suffixes)):
            L.llama_memory_seq_cp(self.mem, 0, s, 0, len(prefix))
        return self.generate([prefix + s for s in suffixes], [n] * len(suffixes), start=len(prefix))


if __name__ == "__main__":
    common.main(Peer)
