"""The model variants that make_goldens.py turns into golden checkpoints: configurations, and how they are saved.

Sizes are small and awkward on purpose: odd head counts, head dims that are not width / heads, windows of 8 tokens,
rope switch-over lengths between the two prompts' lengths (7 and 40 tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

VOCAB = 96
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class Variant:
    """One golden checkpoint.

    config: for AutoConfig.for_model. ablations: what the variant is about -> the configuration changes that switch it
    off. no_gradient: suffixes of weights that cannot matter (a key bias without rope cancels in the softmax).
    rewrite_config: turns the saved config.json into an older or sparser form of the same. rename and ignored_tensors:
    for checkpoints whose names have another prefix, with tensors (name -> shape) that loaders are to ignore.
    """

    name: str
    config: dict
    dtype: str = "bfloat16"
    prompt_lengths: tuple[int, ...] = (7, 40)
    ablations: dict[str, dict] = field(default_factory=dict)
    no_gradient: tuple[str, ...] = ()
    shard_size: str = "1GB"
    rewrite_config: Callable[[dict], dict] | None = None
    rename: Callable[[str], str] | None = None
    ignored_tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)


def small(model_type: str, **changes) -> dict:
    """A small configuration of a llama-like family."""
    base = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return base | changes


def legacy(config: dict, **changes) -> dict:
    """config.json as transformers 4 wrote it: rope_theta and rope_scaling at the top, torch_dtype, no layer_types."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    return config | changes


def legacy_type_key(config: dict) -> dict:
    """As `legacy`, with the kind of scaling under its oldest name, `type`."""
    config = legacy(config)
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    return config


def only(*keys: str) -> Callable[[dict], dict]:
    """Keep these keys, whose values differ from transformers' defaults, and the two that name the model."""
    return lambda config: {key: config[key] for key in ("architectures", "model_type", *keys)}


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def rope(kind: str, theta: float = 10000.0, **parameters) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


LLAMA3_ROPE = rope(
    "llama3", 500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24
)

LLAMA = [
    Variant(
        "llama2_mha",
        small("llama", hidden_size=36, num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-5),
        dtype="float16",
        rewrite_config=legacy,
    ),
    Variant(
        "llama3_gqa",
        small(
            "llama",
            hidden_size=30,
            num_attention_heads=6,
            head_dim=16,
            rope_parameters=LLAMA3_ROPE,
            tie_word_embeddings=True,
        ),
        ablations={"rope scaling": {"rope_parameters": rope("default", 500.0)}},
        rewrite_config=legacy,
    ),
    Variant(
        "llama_linear_mqa",
        small("llama", num_key_value_heads=1, rope_parameters=rope("linear", factor=4.0)),
        ablations={"rope scaling": {"rope_parameters": PLAIN_ROPE}},
        rewrite_config=legacy_type_key,
    ),
    Variant(
        "llama_dynamic",
        small("llama", max_position_embeddings=24, rope_parameters=rope("dynamic", factor=3.0)),
        ablations={"rope scaling": {"rope_parameters": PLAIN_ROPE}},
    ),
    Variant(
        "llama_yarn",
        small(
            "llama",
            head_dim=16,
            rope_parameters=rope(
                "yarn", 20.0, factor=8.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.3
            ),
        ),
        ablations={"rope scaling": {"rope_parameters": rope("default", 20.0)}},
    ),
    Variant(
        "llama_yarn_mscale",
        small(
            "llama",
            head_dim=16,
            rope_parameters=rope(
                "yarn",
                50.0,
                factor=4.0,
                original_max_position_embeddings=32,
                beta_fast=3.0,
                beta_slow=0.5,
                mscale=1.5,
                mscale_all_dim=0.5,
                truncate=False,
            ),
        ),
        ablations={
            "mscale": {
                "rope_parameters": rope(
                    "yarn",
                    50.0,
                    factor=4.0,
                    original_max_position_embeddings=32,
                    beta_fast=3.0,
                    beta_slow=0.5,
                    truncate=False,
                )
            },
            "untruncated range": {
                "rope_parameters": rope(
                    "yarn",
                    50.0,
                    factor=4.0,
                    original_max_position_embeddings=32,
                    beta_fast=3.0,
                    beta_slow=0.5,
                    mscale=1.5,
                    mscale_all_dim=0.5,
                )
            },
        },
    ),
    Variant(
        "llama_bias",
        small(
            "llama", num_attention_heads=2, num_key_value_heads=1, head_dim=10, attention_bias=True, mlp_bias=True
        ),
        dtype="float32",
    ),
    Variant("llama_sharded", small("llama", num_hidden_layers=3, tie_word_embeddings=False), shard_size="36KB"),
    Variant("llama_minimal", small("llama", num_key_value_heads=4), rewrite_config=only(*SIZES)),
]

MISTRAL = [
    Variant(
        "mistral_window",
        small("mistral", num_attention_heads=4, head_dim=12, sliding_window=8),
        ablations={"window": {"sliding_window": None}, "one key of the window": {"sliding_window": 9}},
    ),
    Variant(
        "mistral_full",
        small("mistral", hidden_size=40, num_attention_heads=5, num_key_value_heads=1, sliding_window=None),
        rewrite_config=legacy,
    ),
]

QWEN = [
    Variant("qwen2", small("qwen2", tie_word_embeddings=True, rms_norm_eps=1e-5)),
    Variant(
        "qwen2_windows",
        small("qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=1),
        ablations={"first full layer": {"max_window_layers": 0}, "windows": {"use_sliding_window": False}},
        rewrite_config=legacy,
    ),
    Variant(
        "qwen2_layer_types",
        small(
            "qwen2",
            num_hidden_layers=3,
            use_sliding_window=True,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        ablations={"windows": {"layer_types": ["full_attention"] * 3}},
    ),
    Variant(
        "qwen2_yarn",
        small(
            "qwen2",
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters=rope("yarn", 100.0, factor=4.0, original_max_position_embeddings=32),
        ),
        ablations={"rope scaling": {"rope_parameters": rope("default", 100.0)}},
        rewrite_config=legacy_type_key,
    ),
    Variant("qwen3", small("qwen3", num_attention_heads=3, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)),
    Variant(
        "qwen3_windows_bias",
        small(
            "qwen3",
            head_dim=8,
            num_hidden_layers=3,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
        ),
        ablations={"windows": {"use_sliding_window": False}},
    ),
    Variant(
        "qwen3_minimal",
        small("qwen3", hidden_size=16, num_attention_heads=2, num_key_value_heads=1),
        rewrite_config=only(*SIZES, "num_key_value_heads"),
    ),
]

GEMMA2 = [
    Variant(
        "gemma2",
        small(
            "gemma2", num_hidden_layers=3, head_dim=16, sliding_window=8, query_pre_attn_scalar=12, pad_token_id=0,
            attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
        ),
        ablations={
            "windows": {"sliding_window": 100},
            "attention soft cap": {"attn_logit_softcapping": None},
            "logits' soft cap": {"final_logit_softcapping": None},
            "attention scale": {"query_pre_attn_scalar": 16},
        },
    ),
    Variant(
        "gemma2_plain_legacy",
        small(
            "gemma2", head_dim=6, sliding_window=8, query_pre_attn_scalar=6, attention_bias=True,
            attn_logit_softcapping=None, final_logit_softcapping=None, tie_word_embeddings=False,
        ),
        rewrite_config=lambda config: legacy(config, hidden_act="silu", cache_implementation="hybrid"),
    ),
]

VARIANTS: list[Variant] = [*LLAMA, *MISTRAL, *QWEN, *GEMMA2]
