"""What is published of large models and of TPUs, and what a layout of one on the other needs, counted by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama 3.1 70B": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "Llama 3.1 405B": {
        **_LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
    },
    "Qwen3 235B A22B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "DeepSeek V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
}
# Bytes a second of one device's memory.
BANDWIDTH = {"v5p": 2765e9, "v6e": 1640e9, "tpu7x": 3690e9}


def weight_bytes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> float:
    """Bytes of one device's weights in bfloat16: the matrices alone, from published sizes; stages alike."""
    width, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    whole = 0  # a layer's matrices that tensor parallelism does not cut
    if "kv_lora_rank" in config:
        q_rank, rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        key, value = config["qk_nope_head_dim"], config["v_head_dim"]
        whole = width * (q_rank + rank + rope)
        attention = heads * (q_rank * (key + rope) + rank * (key + value) + value * width)
    else:
        head = config.get("head_dim", width // heads)
        attention = width * head * (2 * heads + 2 * config["num_key_value_heads"])
    num_experts = config.get("num_experts", config.get("n_routed_experts", 0))
    expert = 3 * width * config.get("moe_intermediate_size", 0)
    num_dense = config.get("first_k_dense_replace", 0) if num_experts else layers
    dense = num_dense * 3 * width * config["intermediate_size"]
    shared = (layers - num_dense) * expert * config.get("n_shared_experts", 0)
    routed = (layers - num_dense) * expert * num_experts / sizes["expert"]
    cut = 2 * config["vocab_size"] * width + layers * attention + dense + shared + routed
    return 2 * (cut / sizes["tensor"] + layers * whole) / sizes["fsdp"] / sizes["stage"]


def moved_bytes(config: Mapping[str, Any], sizes: Mapping[str, int], rows: int, keys_travel: bool = False) -> float:
    """Bytes that collectives give one device in the layers of a step of `rows` tokens a shard, in bfloat16.

    tensor: two all-reduces of a device's rows a layer. fsdp: every matrix of a layer, whole again. expert: room for
    twice the rows that are chosen for, there and back, or with no more devices than choices the rows of all shards with
    their choices, and back the sums of its own. context: all rows' queries, keys, values and maxima, and back the sums
    of its own in float32, with their weights; where keys travel, all rows' keys and values, and so many again.
    """
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    own = rows // sizes["context"]
    total = 0.0
    if sizes["tensor"] > 1:
        total += layers * 2 * own * width * 2
    if sizes["fsdp"] > 1:
        ends = 2 * 2 * config["vocab_size"] * width / sizes["tensor"]
        total += weight_bytes(config, sizes) * sizes["stage"] * sizes["fsdp"] - ends
    if sizes["expert"] > 1:
        with_experts = layers - config.get("first_k_dense_replace", 0)
        choices = config["num_experts_per_tok"]
        if sizes["expert"] > choices:
            total += with_experts * 2 * own * choices * (2 * width * 2 + 4)
        else:
            total += with_experts * (sizes["expert"] * own * (2 * width + 8 * choices) + own * width * 2)
    if sizes["context"] > 1:
        head = config.get("head_dim", width // config["num_attention_heads"])
        heads, kv_heads = (config[f"num_{name}_heads"] / sizes["tensor"] for name in ("attention", "key_value"))
        if keys_travel:
            return total + layers * 2 * rows * head * 2 * 2 * kv_heads
        total += layers * (rows * (head * 2 * (heads + 2 * kv_heads) + heads * 4) + own * heads * (head + 1) * 4)
    return total
