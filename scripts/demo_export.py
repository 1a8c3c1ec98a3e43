"""Writes the bundled demo models in Hugging Face layout, measures them and writes their model card."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import demo_data
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from train_demo_model import Params, Preset

STRIDE = demo_data.WINDOW // 2
SAMPLE_TOKENS = 96
SAMPLE_LENGTH = 256  # of prompt and completion, padding included: one compiled program
SAMPLE_PROMPTS = (
    'def read_lines(path):\n    """Return the lines of a text file without their newlines."""\n',
    "class Stack:\n    def __init__(self):\n        self._items = []\n\n    def push(self, item):\n",
    "import os\nimport sys\n\n",
)


def load_params(directory: Path) -> Params:
    """The exported weights of a checkpoint as float32 arrays."""
    weights = load_file(directory / "model.safetensors")
    return {name: jnp.asarray(array.astype(np.float32)) for name, array in weights.items()}


def model_config(preset: Preset) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": demo_data.VOCAB_SIZE,
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.ffn_size,
        "num_hidden_layers": preset.num_layers,
        "num_attention_heads": preset.num_heads,
        "num_key_value_heads": preset.num_kv_heads,
        "head_dim": preset.head_dim,
        "max_position_embeddings": demo_data.WINDOW,
        "hidden_act": "silu",
        "rms_norm_eps": preset.norm_eps,
        "rope_theta": preset.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "use_cache": True,
    }


def write_checkpoint(directory: Path, params: Params, preset: Preset, tokenizer: Tokenizer) -> None:
    """config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json and tokenizer_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in params.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": demo_data.END_OF_TEXT,
        "eos_token": demo_data.END_OF_TEXT,
        "pad_token": demo_data.PAD,
        "model_max_length": demo_data.WINDOW,
        "clean_up_tokenization_spaces": False,
        "chat_template": demo_data.CHAT_TEMPLATE,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    for name, value in (
        ("config.json", model_config(preset)),
        ("generation_config.json", generation_config),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def inference(params: Params, preset: Preset) -> Callable[[jax.Array], jax.Array]:
    """tokens int32 [T] -> logits float32 [V, T], computed in float32."""
    from train_demo_model import forward, fuse, transpose_matrices

    fused = fuse(params, preset)
    float32 = jnp.dtype("float32")
    compiled = jax.jit(partial(forward, preset=preset, dtype=float32))
    return partial(compiled, fused, transpose_matrices(fused, float32))


def bits_per_byte(logits_of: Callable[[jax.Array], jax.Array], tokenizer: Tokenizer, texts: list[str]) -> float:
    """Total cost of the texts, each alone after END_OF_TEXT, over their UTF-8 bytes.

    A text longer than the context is scored in windows of WINDOW tokens that advance by half of it.
    """

    @jax.jit
    def cost(logits, targets, first, last):
        nats = jax.nn.logsumexp(logits, axis=0) - jnp.take_along_axis(logits, targets[None], axis=0)[0]
        index = jnp.arange(nats.shape[0])
        return jnp.where((index >= first) & (index < last), nats, 0).sum()

    total = 0.0
    for text in texts:
        ids = np.asarray(tokenizer.encode(text).ids, np.int32)
        scored = 0  # targets counted so far; target i is the token at i + 1
        start = 0
        while scored < len(ids) - 1:
            window = ids[start : start + demo_data.WINDOW + 1]
            padded = np.full(demo_data.WINDOW + 1, 1, np.int32)
            padded[: len(window)] = window
            logits = logits_of(jnp.asarray(padded[:-1]))
            total += float(cost(logits, jnp.asarray(padded[1:]), scored - start, len(window) - 1))
            scored = start + len(window) - 1
            start += STRIDE
    return total / math.log(2) / sum(len(text.encode()) for text in texts)


def complete(logits_of: Callable[[jax.Array], jax.Array], tokenizer: Tokenizer, prompt: str, temperature: float) -> str:
    """The continuation of a prompt by at most SAMPLE_TOKENS tokens; temperature 0 is greedy."""
    ids = tokenizer.encode(prompt).ids
    begin = end = len(ids)
    padded = np.full(SAMPLE_LENGTH, 1, np.int32)
    padded[:begin] = ids
    while end < begin + SAMPLE_TOKENS:
        logits = logits_of(jnp.asarray(padded))[:, end - 1]
        if temperature > 0:
            logits = logits / temperature + jax.random.gumbel(jax.random.fold_in(jax.random.key(0), end), logits.shape)
        token = int(jnp.argmax(logits))
        if token == 0:
            break
        padded[end] = token
        end += 1
    return tokenizer.decode(padded[begin:end].tolist())


def export(
    directory: Path,
    params: Params,
    preset: Preset,
    tokenizer: Tokenizer,
    run: dict,
    training: dict[str, str],
    held_out: dict[str, str],
) -> None:
    """Writes the checkpoint, then `training.json` with what was measured on the bfloat16 weights, then the card."""
    write_checkpoint(directory, params, preset, tokenizer)
    rounded = load_params(directory)
    logits_of = inference(rounded, preset)
    digest = hashlib.sha256("".join(name + text for name, text in training.items()).encode()).hexdigest()
    record = {
        "parameters": int(sum(array.size for array in rounded.values())),
        "layers": preset.num_layers,
        "hidden_size": preset.hidden_size,
        "query_heads": preset.num_heads,
        "kv_heads": preset.num_kv_heads,
        "ffn_size": preset.ffn_size,
        **run,
        "python": platform.python_version(),
        "training_modules": len(training),
        "training_bytes": sum(len(text.encode()) for text in training.values()),
        "training_tokens": sum(len(tokenizer.encode(text).ids) for text in training.values()),
        "training_sha256": digest,
        "held_out": sorted(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
        "bits_per_byte": round(bits_per_byte(logits_of, tokenizer, list(held_out.values())), 4),
        "samples": [
            {"prompt": prompt, "temperature": t, "completion": complete(logits_of, tokenizer, prompt, t)}
            for prompt, t in zip(SAMPLE_PROMPTS, (0.0, 0.0, 0.7), strict=True)
        ],
    }
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{directory}: {record['bits_per_byte']} bits per byte on the held-out modules", flush=True)
    write_card(directory.parent)


def write_card(assets: Path) -> None:
    """README.md of the assets directory, from the training.json of each model in it."""
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(assets.glob("*/training.json"))}
    any_record = next(iter(records.values()))
    rows = "\n".join(
        f"| `{name}` | {r['parameters'] / 1e6:.2f} M | {r['layers']} | {r['hidden_size']} | {r['query_heads']} / "
        f"{r['kv_heads']} | {r['ffn_size']} | {r['tokens_seen'] / 1e6:.1f} M | "
        f"{r['tokens_seen'] / r['training_tokens']:.1f} | {r['bits_per_byte']:.3f} |"
        for name, r in records.items()
    )
    samples = "\n\n".join(
        f"`{name}`, {'greedy' if s['temperature'] == 0 else 'temperature ' + str(s['temperature'])}, "
        f"prompt then completion:\n\n```python\n{s['prompt']}# --- completion ---\n{s['completion'].rstrip()}\n```"
        for name, r in records.items()
        for s in r["samples"]
    )
    commands = "\n".join("python " + r["command"] for r in records.values())
    r = any_record
    vocabulary, window, digest = demo_data.VOCAB_SIZE, demo_data.WINDOW, r["training_sha256"][:16]
    megabytes, tokens = f"{r['training_bytes'] / 1e6:.2f} MB", f"{r['training_tokens'] / 1e6:.2f} M tokens"
    distilled = [name for name, record in records.items() if "--teacher" in record["command"]]
    teaching = "".join(f"\nHalf of the target of `{name}` is what the main model predicts." for name in distilled)
    card = f"""# The bundled demo models

Small language models of Python code, so that jaxinfer can be run and tested with no network: `demo`, and `demo-draft`
with the same tokenizer for speculative decoding. They are Llama-architecture checkpoints in Hugging Face layout, in
bfloat16, with a context of {window} tokens and a byte-level BPE vocabulary of {vocabulary}.
`scripts/train_demo_model.py` trained them and wrote this page.

| model | parameters | layers | width | query / KV heads | FFN | tokens seen | epochs | held-out bits per byte |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

## Data

The source of the Python {r["python"]} standard library (licence: PSF-2.0), without its tests, generated tables and
data: {r["training_modules"]} files, {megabytes}, {tokens} (SHA-256 of names and texts: `{digest}...`).
These were kept out of the training of tokenizer and models, whole:

{", ".join(f"`{name}`" for name in r["held_out"])}.

**Bits per byte** are measured on those files ({r["held_out_bytes"] / 1e3:.0f} kB) with the bfloat16 weights computed in
float32: each file alone after the separator, in windows of {window} tokens that advance by {STRIDE}. Lower is better.

## Training

Muon for the matrices, Adam for embedding and norms; constant rate, then a linear decay to zero over the last steps,
which also double the sequence length from 512 to {window}; {r["tokens_per_step"]} tokens a step.{teaching}
The exact numbers are in each model's `training.json`. To repeat the runs on the same Python, up to rounding:

```
{commands}
```

## Limits

The models know the shape of Python code and the habits of the standard library, and little else. What they write often
parses but rarely does what its name says; names are invented, and facts in docstrings are not facts. They repeat the
standard library's text where they remember it. They are not chat models: the chat template (`# user: ...`,
`# assistant:`) is there so that chat requests work mechanically, and the answers are Python-like text. Prompts in other
languages, natural or programming, give noise. Use them to try and to test jaxinfer, for nothing else.

## Samples

{samples}
"""
    (assets / "README.md").write_text(card, encoding="utf-8")
