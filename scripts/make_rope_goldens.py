"""Make tests/models/rope_frequencies.json: rotary frequencies as transformers computes them from whole configs.

    python scripts/make_rope_goldens.py --out tests/models/rope_frequencies.json

Needs torch and transformers, which nothing else in this project does. Made with transformers 5.23.0, torch 2.13.0.
Each case: the config.json given to both sides, the kind of layer (null where all are alike), the longest sequence
served, and transformers' `inv_freq` and factor on cos and sin after a forward over a sequence of that length.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

SIZES = {"vocab_size": 64, "num_hidden_layers": 6, "intermediate_size": 64}
KINDS = {
    "llama": ("LlamaForCausalLM", LlamaRotaryEmbedding, {"hidden_size": 256, "num_attention_heads": 2}),
    "qwen2": (
        "Qwen2ForCausalLM",
        Qwen2RotaryEmbedding,
        {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    ),
    "phi3": ("Phi3ForCausalLM", Phi3RotaryEmbedding, {"hidden_size": 128, "num_attention_heads": 4}),
    "smollm3": ("SmolLM3ForCausalLM", SmolLM3RotaryEmbedding, {"hidden_size": 128, "num_attention_heads": 4}),
    "gemma3_text": ("Gemma3ForCausalLM", Gemma3RotaryEmbedding, {"hidden_size": 128, "num_attention_heads": 4}),
    "gemma4_text": ("Gemma4ForCausalLM", Gemma4TextRotaryEmbedding, {"hidden_size": 128, "num_attention_heads": 4}),
}

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
QWEN = {"rope_theta": 1e6, "max_position_embeddings": 131072}
SHORT = [1.0 + 0.01 * i for i in range(16)]
LONG = [1.1 * 1.17**i for i in range(16)]

# name, model type, config, kind of layer, context length
CASES: list[tuple[str, str, dict[str, Any], str | None, int]] = [
    ("llama default theta", "llama", {}, None, 100),
    ("llama 3", "llama", {"rope_theta": 500000.0, "max_position_embeddings": 8192}, None, 100),
    ("llama 3.2", "llama", {"rope_parameters": LLAMA31 | {"rope_theta": 500000.0, "factor": 32.0}}, None, 100),
    ("yarn", "qwen2", QWEN | {"rope_scaling": YARN}, None, 100),
    ("yarn, factor by lengths", "qwen2", QWEN | {"rope_scaling": YARN | {"factor": None}}, None, 100),
    *(
        (name, "llama", {"rope_theta": 50000.0, "max_position_embeddings": 64, "rope_scaling": scaling}, None, length)
        for name, scaling, length in (
            ("llama 3.1", LLAMA31, 100),
            ("linear", {"type": "linear", "factor": 4.0}, 100),
            ("dynamic, short", {"type": "dynamic", "factor": 2.0}, 64),
            ("dynamic, long", {"type": "dynamic", "factor": 2.0}, 200),
            ("yarn, mscale", YARN | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0}, 100),
            ("yarn, attention factor", YARN | {"attention_factor": 1.5}, 100),
            ("yarn, betas, not truncated", YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}, 100),
            ("yarn, no original length", {"rope_type": "yarn", "factor": 2.0}, 100),
        )
    ),
    (
        "llama 3.1, original length outside",
        "llama",
        {"rope_scaling": LLAMA31, "original_max_position_embeddings": 512},
        None,
        100,
    ),
    ("phi default", "phi3", {}, None, 100),
    ("phi partial", "phi3", {"partial_rotary_factor": 0.5, "rope_theta": 250000.0}, None, 100),
    *(
        (f"{name}, {length}", "phi3", config | {"original_max_position_embeddings": 128}, None, length)
        for length in (128, 129)
        for name, config in {
            "longrope": {
                "max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG},
            },
            "longrope, new": {
                "max_position_embeddings": 4096,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 5e4,
                    "short_factor": SHORT[:12],
                    "long_factor": LONG[:12],
                    "partial_rotary_factor": 0.75,
                    "factor": 16.0,
                },
            },
            "su": {
                "max_position_embeddings": 4096,
                "rope_scaling": {
                    "type": "su",
                    "original_max_position_embeddings": 128,
                    "short_factor": SHORT,
                    "long_factor": LONG,
                    "attention_factor": 1.25,
                },
            },
        }.items()
    ),
    ("smollm3", "smollm3", {}, None, 100),
    *(
        (f"{name}, {kind}", model_type, config, kind, 100)
        for kind in ("full_attention", "sliding_attention")
        for name, model_type, config in (
            ("gemma 3", "gemma3_text", {}),
            ("gemma 3, old", "gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
            ("gemma 3, old thetas", "gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "head_dim": 64}),
            (
                "gemma 3, new",
                "gemma3_text",
                {
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
                    }
                },
            ),
            ("gemma 4", "gemma4_text", {"head_dim": 64, "global_head_dim": 128}),
            (
                "gemma 4, other shares",
                "gemma4_text",
                {
                    "head_dim": 64,
                    "global_head_dim": 96,
                    "rope_parameters": {
                        "full_attention": {
                            "rope_type": "proportional",
                            "rope_theta": 2e6,
                            "partial_rotary_factor": 0.3,
                            "factor": 2.0,
                        },
                        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
                    },
                },
            ),
        )
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    made = []
    for name, model_type, changes, kind, context_len in CASES:
        architecture, rotary, sizes = KINDS[model_type]
        given = SIZES | sizes | changes
        config = AutoConfig.for_model(model_type, **copy.deepcopy(given))
        embedding = rotary(config)
        arguments = (torch.zeros(1), torch.arange(context_len)[None])
        embedding(*arguments) if kind is None else embedding(*arguments, kind)
        prefix = "" if kind is None else f"{kind}_"
        made.append(
            {
                "name": name,
                "config": {"architectures": [architecture], **given},
                "layer_type": kind,
                "context_len": context_len,
                "inv_freq": [float(f"{x:.9g}") for x in getattr(embedding, f"{prefix}inv_freq").tolist()],
                "attention_factor": getattr(embedding, f"{prefix}attention_scaling"),
            }
        )
    out.write_text("[\n" + ",\n".join(json.dumps(case) for case in made) + "\n]\n")


if __name__ == "__main__":
    main()
