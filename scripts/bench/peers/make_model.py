"""Write deterministic random-weight Llama checkpoints (HF layout) and a tokenizer.

    python make_model.py --out DIR [--size 135m|1b] [--dtypes fp32,bf16]

Writes DIR/<size>-<dtype>/ with config.json, generation_config.json,
model.safetensors, tokenizer.json, tokenizer_config.json.

Every weight is drawn in fp32 and rounded to bf16 before it is saved, so that the
fp32 and the bf16 checkpoint hold the *same* numbers. Linear layers get
std = 1/sqrt(fan_in), embeddings std = 1/sqrt(hidden): the residual stream is then
made by attention and MLP, not by the input embedding, and greedy output depends
on the whole context (a 0.02-everywhere init with tied embeddings just repeats the
last token, which would verify nothing).

Needs: torch, safetensors, tokenizers (no transformers).
"""

import argparse
import json
import os
import sysconfig
from pathlib import Path

SIZES = {
    # SmolLM2-135M shape
    "135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
    },
    # Llama-3.2-1B shape, plain rope (no llama3 rope scaling), vocab cut to 49152
    # so that the one tokenizer serves both; 1.07 B parameters
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 49152,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
    },
    # only to try engines that want head_dim 128
    "hd128": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
    },
}
BOS, EOS, PAD = 0, 1, 2
SPECIALS = ["<s>", "</s>", "<pad>"]


def config(size):
    c = dict(SIZES[size])
    theta = c["rope_theta"]
    c.update(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        initializer_range=0.02,
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        pretraining_tp=1,
        use_cache=True,
        rope_scaling=None,
        # transformers 5 spelling, kept beside the older top-level rope_theta
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return c


def tensors(cfg, seed=0):
    import torch

    g = torch.Generator().manual_seed(seed)
    h, i, v = cfg["hidden_size"], cfg["intermediate_size"], cfg["vocab_size"]
    hd = cfg["head_dim"]
    q, kv = cfg["num_attention_heads"] * hd, cfg["num_key_value_heads"] * hd

    def w(rows, cols, fan_in):
        t = torch.randn(rows, cols, generator=g) / fan_in**0.5
        return t.to(torch.bfloat16)

    def norm(n):
        return (1.0 + 0.1 * torch.randn(n, generator=g)).to(torch.bfloat16)

    yield "model.embed_tokens.weight", w(v, h, h)
    for n in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{n}."
        yield p + "input_layernorm.weight", norm(h)
        yield p + "self_attn.q_proj.weight", w(q, h, h)
        yield p + "self_attn.k_proj.weight", w(kv, h, h)
        yield p + "self_attn.v_proj.weight", w(kv, h, h)
        yield p + "self_attn.o_proj.weight", w(h, q, q)
        yield p + "post_attention_layernorm.weight", norm(h)
        yield p + "mlp.gate_proj.weight", w(i, h, h)
        yield p + "mlp.up_proj.weight", w(i, h, h)
        yield p + "mlp.down_proj.weight", w(h, i, i)
    yield "model.norm.weight", norm(h)


def tokenizer_json(vocab_size):
    """A byte-level BPE trained on the running Python's standard library, padded.

    Engines are fed token ids, so the merges never matter; only the vocabulary
    size and the special ids do.
    """
    import glob

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    files = sorted(glob.glob(os.path.join(sysconfig.get_paths()["stdlib"], "*.py")))
    tok.train(
        files,
        trainers.BpeTrainer(
            vocab_size=16384,
            special_tokens=SPECIALS,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    d = json.loads(tok.to_str())
    vocab = d["model"]["vocab"]
    for n in range(len(vocab), vocab_size):
        vocab[f"<|fill_{n}|>"] = n
    assert len(vocab) == vocab_size
    assert max(vocab.values()) == vocab_size - 1
    return d


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--out", required=True)
    ap.add_argument("--size", default="135m", choices=sorted(SIZES))
    ap.add_argument("--dtypes", default="fp32,bf16")
    a = ap.parse_args()
    import torch
    from safetensors.torch import save_file

    cfg = config(a.size)
    base = dict(tensors(cfg))
    print("parameters:", sum(t.numel() for t in base.values()))
    tok = tokenizer_json(cfg["vocab_size"])
    for dt in a.dtypes.split(","):
        d = os.path.join(a.out, f"{a.size}-{dt}")
        os.makedirs(d, exist_ok=True)
        td = {"fp32": torch.float32, "bf16": torch.bfloat16}[dt]
        save_file(
            {k: t.to(td).contiguous() for k, t in base.items()},
            os.path.join(d, "model.safetensors"),
            metadata={"format": "pt"},
        )
        name = {"fp32": "float32", "bf16": "bfloat16"}[dt]
        # "torch_dtype" for transformers 4, "dtype" for transformers 5
        files = {
            "config.json": dict(cfg, torch_dtype=name, dtype=name),
            "generation_config.json": {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
            "tokenizer.json": tok,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<pad>",
                "model_max_length": 8192,
                "clean_up_tokenization_spaces": False,
            },
        }
        for file, content in files.items():
            Path(d, file).write_text(json.dumps(content, indent=1))
        print("wrote", d)


if __name__ == "__main__":
    main()
