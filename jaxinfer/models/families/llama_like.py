"""What most decoder families share: the shape of their configs and the names of their tensors. Imports no jax.

A family file passes what differs. `LLAMA_NAMES` maps a module of the decoder to the tensors' stem; a parameter's tensor
is the stem and ".weight" or ".bias".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxinfer.models.config import ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from jaxinfer.models.families.base import Source
from jaxinfer.models.families.fields import Fields

# In checkpoints of old releases, and the head of a model that ties it to its embedding.
LLAMA_IGNORED = ("*.rotary_emb.inv_freq", "lm_head.weight")

LLAMA_NAMES: dict[str, str] = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "layers": "model.layers",
    "attention": "self_attn",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.o_proj",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    # Where layers have experts; "*" is an expert's number.
    "mlp/router": "mlp.gate",
    "mlp/experts/gate": "mlp.experts.*.gate_proj",
    "mlp/experts/up": "mlp.experts.*.up_proj",
    "mlp/experts/down": "mlp.experts.*.down_proj",
    "mlp/shared/gate": "mlp.shared_expert.gate_proj",
    "mlp/shared/up": "mlp.shared_expert.up_proj",
    "mlp/shared/down": "mlp.shared_expert.down_proj",
    "mlp/shared_gate": "mlp.shared_expert_gate",
}

# Leaves that checkpoints call something else.
LEAVES = {"score_bias": "e_score_correction_bias"}

# Norms on both sides of attention and feed-forward, or after them only.
POST_NORM_NAMES: dict[str, str] = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def llama_like_config(
    fields: Fields,
    *,
    windows: Sequence[int | None] | int | None = None,
    ropes: Sequence[RopeConfig | None] | RopeConfig | None,
    experts: Sequence[ExpertsConfig | None] | ExpertsConfig | None = None,
    expert_width: str = "intermediate_size",
    norm_eps: str = "rms_norm_eps",
    activation: str = "hidden_act",
    **differences: Any,
) -> ModelConfig:
    """A ModelConfig whose layers have one shape. windows, ropes, experts: one for all layers, or one each.

    expert_width, norm_eps, activation: the keys these are under. `differences`: any other field of ModelConfig.
    """
    num_layers = fields.integer("num_hidden_layers")
    num_heads = fields.integer("num_attention_heads")
    windows = windows if isinstance(windows, Sequence) else [windows] * num_layers
    ropes = ropes if isinstance(ropes, Sequence) else [ropes] * num_layers
    experts = experts if isinstance(experts, Sequence) else [experts] * num_layers
    layers = tuple(
        LayerConfig(
            num_heads=num_heads,
            num_kv_heads=fields.optional_integer("num_key_value_heads") or num_heads,
            head_dim=fields.head_dim(),
            ffn_dim=fields.integer("intermediate_size" if own is None else expert_width),
            window=window,
            rope=rope,
            experts=own,
        )
        for window, rope, own in zip(windows, ropes, experts, strict=True)
    )
    return model_config(fields, layers, norm_eps=norm_eps, activation=activation, **differences)


def model_config(
    fields: Fields,
    layers: tuple[LayerConfig, ...],
    *,
    norm_eps: str = "rms_norm_eps",
    activation: str = "hidden_act",
    **differences: Any,
) -> ModelConfig:
    """A ModelConfig of the given layers, with the fields every family has."""
    return ModelConfig(
        family=fields.family,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        max_position=fields.integer("max_position_embeddings"),
        layers=layers,
        norm_eps=fields.number(norm_eps),
        activation=fields.activation(activation),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        **differences,
    )


def parameters(config: ModelConfig) -> Iterator[tuple[int | None, str, str]]:
    """(layer or None, module, leaf) of every parameter that any family may have but Gemma 4's own."""
    norm_leaves = ("weight", "bias") if config.norm_bias else ("weight",)
    yield None, "embed", "weight"
    if config.learned_positions:
        yield None, "positions", "weight"
    if not config.tie_embeddings:
        yield None, "lm_head", "weight"
    for leaf in norm_leaves:
        yield None, "final_norm", leaf
    norms = {
        "pre": ("attention_norm", "mlp_norm"),
        "post": ("attention_post_norm", "mlp_post_norm"),
        "sandwich": ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"),
    }[config.norm_placement]
    for index, layer in enumerate(config.layers):
        owns_k = layer.kv_source is None and layer.latent is None
        linears = [("attention/o", config.output_bias)]
        if layer.latent is None:
            linears.append(("attention/q", config.qkv_bias))
        else:
            linears += [("attention/q", False), ("attention/kv_down", config.qkv_bias)]
            linears += [("attention/k_up", False), ("attention/v_up", False)]
            yield index, "attention/kv_norm", "weight"
            if layer.latent.q_rank is not None:
                linears.append(("attention/q_down", config.qkv_bias))
                yield index, "attention/q_norm", "weight"
        if owns_k:
            linears.append(("attention/k", config.qkv_bias))
        if owns_k and not layer.value_is_key:
            linears.append(("attention/v", config.qkv_bias))
        linears += _feed_forward(config, layer)
        for module, has_bias in linears:
            yield index, module, "weight"
            if has_bias:
                yield index, module, "bias"
        for module in norms:
            for leaf in norm_leaves:
                yield index, module, leaf
        if config.attention_sinks:
            yield index, "attention", "sinks"
        if layer.experts is not None and layer.experts.score_bias:
            yield index, "mlp/router", "score_bias"
        if config.qk_norm is not None:
            yield index, "attention/q_norm", "weight"
            if owns_k:
                yield index, "attention/k_norm", "weight"


def _feed_forward(config: ModelConfig, layer: LayerConfig) -> list[tuple[str, bool]]:
    """The projections of a layer's feed-forward, and whether they have a bias."""
    dense = [(part, config.mlp_bias) for part in (("gate", "up", "down") if config.gated_mlp else ("up", "down"))]
    if layer.experts is None:
        return [(f"mlp/{part}", bias) for part, bias in dense]
    linears = [("mlp/router", layer.experts.router_bias)]
    linears += [(f"mlp/experts/{part}", layer.experts.bias) for part in ("gate", "up", "down")]
    if layer.experts.shared_ffn_dim:
        linears += [(f"mlp/shared/{part}", bias) for part, bias in dense]
    if layer.experts.shared_gate:
        linears.append(("mlp/shared_gate", False))
    return linears


def sources(config: ModelConfig, names: Mapping[str, str] = LLAMA_NAMES) -> dict[str, Source]:
    """Every parameter in a tensor of its own, or each expert's part of it, under `names`."""
    found = {}
    for layer, module, leaf in parameters(config):
        if layer is None:
            found[f"{module}/{leaf}"] = Source(f"{names[module]}.{leaf}")
        else:
            name = f"{names['layers']}.{layer}.{names[module]}.{LEAVES.get(leaf, leaf)}"
            stacked = "*" in name  # stacks of matrices are [E, in, out]
            path = f"layers/{layer}/{module}/{leaf}"
            found[path] = Source(name, stacked=stacked, transpose=stacked and leaf == "weight")
    return found
