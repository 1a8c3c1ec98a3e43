"""The model variants that make_goldens.py turns into golden checkpoints, but for Gemma's (golden_gemma.py)
and those with experts (golden_experts.py).

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
    packed: the experts' weights are stored as MXFP4.
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
    packed: bool = False


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
        rename=str,
        ignored_tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": (6,)},
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
        small("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=10, attention_bias=True, mlp_bias=True),
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
    Variant(
        "qwen3", small("qwen3", num_attention_heads=3, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True)
    ),
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

SHORT_FACTOR = [1.0, 1.1, 1.3, 1.6]
LONG_FACTOR = [1.2, 2.0, 4.0, 8.0]
PHI4_ROPE = {
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.4, 1.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}


def longrope(**parameters) -> dict:
    return rope("longrope", 100.0, short_factor=SHORT_FACTOR, long_factor=LONG_FACTOR) | parameters


def phi3_longrope_legacy(config: dict) -> dict:
    """As published: the original length at the top only, the kind of scaling as `type`."""
    config = legacy(config)
    scaling = config["rope_scaling"]
    config["rope_scaling"] = {key: scaling[key] for key in ("short_factor", "long_factor")} | {"type": "longrope"}
    return config


def phi4_mini_legacy(config: dict) -> dict:
    """As published: partial_rotary_factor at the top."""
    config = legacy(config)
    config["partial_rotary_factor"] = config["rope_scaling"].pop("partial_rotary_factor")
    return config


PHI3 = [
    Variant(
        "phi3",
        small("phi3", hidden_size=36, num_attention_heads=3, num_key_value_heads=3, sliding_window=8),
        ablations={"windows": {"sliding_window": None}},
    ),
    Variant(
        "phi3_longrope",
        small("phi3", max_position_embeddings=96, original_max_position_embeddings=24, rope_parameters=longrope()),
        ablations={
            "long factors": {"rope_parameters": longrope(long_factor=SHORT_FACTOR)},
            "scaled cosines": {"rope_parameters": longrope(attention_factor=1.0)},
        },
        rewrite_config=phi3_longrope_legacy,
    ),
    Variant(
        "phi4_mini",
        small(
            "phi3",
            num_attention_heads=3,
            num_key_value_heads=1,
            hidden_size=48,
            max_position_embeddings=96,
            original_max_position_embeddings=24,
            tie_word_embeddings=True,
            rope_parameters=longrope(**PHI4_ROPE),
        ),
        ablations={"long factors": {"rope_parameters": longrope(**PHI4_ROPE | {"long_factor": [1.0] * 6})}},
        rewrite_config=phi4_mini_legacy,
    ),
]


def bigcode(**changes) -> dict:
    return {
        "model_type": "gpt_bigcode",
        "vocab_size": VOCAB,
        "n_positions": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes


OTHERS = [
    Variant("gpt_bigcode_mqa", bigcode(activation_function="gelu")),
    Variant("gpt_bigcode_mha", bigcode(multi_query=False, n_embd=30, n_head=3, n_inner=48)),
    Variant(
        "starcoder2",
        small("starcoder2", hidden_size=36, num_attention_heads=6, sliding_window=8, norm_epsilon=1e-5),
        ablations={"windows": {"sliding_window": None}},
    ),
    Variant("starcoder2_plain", small("starcoder2", use_bias=False, tie_word_embeddings=False), rewrite_config=legacy),
    Variant("olmo2", small("olmo2", num_key_value_heads=4, num_hidden_layers=3), rewrite_config=legacy),
    Variant("olmo2_gqa_bias", small("olmo2", hidden_size=36, num_attention_heads=6, attention_bias=True)),
    Variant(
        "smollm3",
        small(
            "smollm3",
            num_hidden_layers=3,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=8,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
        ),
        ablations={"windows": {"use_sliding_window": False}, "layer without rope": {"no_rope_layers": [1, 1, 1]}},
        no_gradient=("layers.1.self_attn.k_proj.bias",),
    ),
    Variant(
        "smollm3_minimal",
        small("smollm3", hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_key_value_heads=4),
        ablations={"layer without rope": {"no_rope_layers": [1, 1, 1, 1]}},
        rewrite_config=only(*SIZES, "pad_token_id"),
    ),
]

VARIANTS: list[Variant] = [*LLAMA, *MISTRAL, *QWEN, *PHI3, *OTHERS]
