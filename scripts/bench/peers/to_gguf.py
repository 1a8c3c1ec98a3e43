"""HF Llama checkpoint (make_model.py layout) -> GGUF. Needs gguf, numpy, safetensors.

    python to_gguf.py --model DIR/135m-fp32 --out model.gguf --type f32|f16|bf16|q8_0

Reads the fp32 checkpoint; as its values are bf16-representable, bf16 is lossless.
"""

import argparse
import json
import os
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open


def permute(w, heads):
    """HF half-split rope layout -> llama.cpp interleaved layout."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def convert(model, out, kind):
    Q = gguf.GGMLQuantizationType
    qt, ft = {
        "f32": (Q.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (Q.F16, gguf.LlamaFileType.MOSTLY_F16),
        "bf16": (Q.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        "q8_0": (Q.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }[kind]
    c = json.loads(Path(os.path.join(model, "config.json")).read_text())
    w = gguf.GGUFWriter(out, "llama")
    w.add_name("peers-bench")
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_rope_dimension_count(c["head_dim"])
    w.add_rope_freq_base(c["rope_theta"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_vocab_size(c["vocab_size"])
    w.add_file_type(ft)

    t = json.loads(Path(os.path.join(model, "tokenizer.json")).read_text())
    vocab = sorted(t["model"]["vocab"], key=t["model"]["vocab"].get)
    special = {s["id"] for s in t["added_tokens"]}
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(vocab)
    w.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(vocab))])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in t["model"]["merges"]])
    w.add_bos_token_id(c["bos_token_id"])
    w.add_eos_token_id(c["eos_token_id"])
    w.add_pad_token_id(c["pad_token_id"])
    w.add_add_bos_token(False)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c["num_hidden_layers"])
    with safe_open(os.path.join(model, "model.safetensors"), "np") as f:
        for k in f.keys():  # noqa: SIM118 - not iterable itself
            x = f.get_tensor(k).astype(np.float32)
            if k.endswith("q_proj.weight"):
                x = permute(x, c["num_attention_heads"])
            elif k.endswith("k_proj.weight"):
                x = permute(x, c["num_key_value_heads"])
            name = names.get_name(k, try_suffixes=(".weight",))
            if x.ndim == 1 or qt == Q.F32:
                w.add_tensor(name, x)
            else:
                w.add_tensor(name, gguf.quants.quantize(x, qt), raw_dtype=qt)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--type", default="f16")
    a = ap.parse_args()
    convert(a.model, a.out, a.type)
