"""Greedy reference ids and margins, from HF transformers in fp32, no KV cache.

    python reference.py --model DIR/135m-fp32 --out reference-135m.json

Recomputes the whole sequence for every token, so it shares no cache code with the
engines under test. Needs torch and transformers.
"""

import argparse
import json
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    m = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    ids, margins = [], []
    for prompt in common.VERIFY:
        seq, ms = list(prompt), []
        for _ in range(common.VERIFY_NEW):
            logits = m(torch.tensor([seq]), use_cache=False).logits[0, -1]
            top = logits.topk(2)
            ms.append(float(top.values[0] - top.values[1]))
            seq.append(int(top.indices[0]))
        ids.append(seq[len(prompt) :])
        margins.append(ms)
    Path(a.out).write_text(json.dumps({"ids": ids, "margins": margins}))
    print("smallest margin", min(map(min, margins)))
    for i in ids:
        print(i)


main()
