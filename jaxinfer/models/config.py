"""What varies between decoder families, as data. Imports no jax.

`ModelConfig` is all the decoder knows about a model. A family file turns a Hugging Face config into one; nothing below
a family ever asks for a model's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxinfer.quantization import Quantization

NormKind = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "sandwich"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen"]
RopeScaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer (RoFormer, arXiv:2104.09864) and its context extension.

    The first `rotary_dim` numbers of a head are rotated, half against half; the rest pass through.
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling = "default"
    factor: float = 1.0
    original_max_position: int | None = None
    max_position: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): what all heads' keys and values are made from.

    rank: numbers in a token's latent. rope_dim: numbers of a key that are rotated, the same for all heads; the cache
    keeps the latent and these, nothing else. key_dim, value_dim: numbers that a head makes of the latent for its key
    (beside the rotated ones) and for its value. q_rank: numbers in the latent that queries are made from; None: they
    come from the residual stream. interleaved: pairs that are rotated are neighbours, not half against half.
    """

    rank: int
    rope_dim: int
    key_dim: int
    value_dim: int
    q_rank: int | None
    interleaved: bool = True


@dataclass(frozen=True)
class ExpertsConfig:
    """A feed-forward of many experts, of which each token is sent to `num_active`.

    scoring: what logits become before the best are chosen; "softmax_of_chosen" chooses first. normalize: the chosen
    scores are divided by their sum (plus normalize_eps). scaling: what the weights are multiplied with in the end.
    score_bias: a parameter added to the scores for the choice, and not to the weights. num_groups: experts are chosen
    from the num_active_groups groups whose group_best best experts score highest in sum (arXiv:2405.04434).
    bias, router_bias: of the experts' projections, and of the router's. clamp: None, or alpha and limit of
    act(gate) * up = min(gate, limit) * sigmoid(alpha * gate) * (clip(up) + 1).
    shared_ffn_dim: width of the expert that every token is sent to, 0 for none; shared_gate: it has a sigmoid gate.
    """

    num_experts: int
    num_active: int
    scoring: Scoring = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scaling: float = 1.0
    score_bias: bool = False
    num_groups: int = 1
    num_active_groups: int = 1
    group_best: int = 1
    bias: bool = False
    router_bias: bool = False
    clamp: tuple[float, float] | None = None
    shared_ffn_dim: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts={self.num_experts} is not a multiple of num_groups={self.num_groups}")
        reachable = self.num_experts // self.num_groups * min(self.num_active_groups, self.num_groups)
        if self.num_active > reachable:
            raise ValueError(
                f"num_active={self.num_active} experts a token are more than the {reachable} to choose from"
            )
        if self.group_best > self.num_experts // self.num_groups or self.num_active_groups > self.num_groups:
            raise ValueError(
                f"group_best={self.group_best} or num_active_groups={self.num_active_groups} is more than there are in "
                f"num_groups={self.num_groups} of {self.num_experts // self.num_groups} experts"
            )


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer.

    window: a query at position i sees keys j with i - window < j <= i; None sees all j <= i.
    rope: None for a layer without rotary embedding.
    kv_source: the earlier layer whose keys and values this one reads; it then has no k and v of its own.
    value_is_key: values are the (unrotated, un-normed) key projection.
    ffn_dim: width of the feed-forward, or of one expert where the layer has `experts`.
    latent: multi-head latent attention. To the cache the layer then has one kv head, whose key is the latent and the
    rotated numbers (head_dim of them) and whose value is the latent.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    window: int | None = None
    rope: RopeConfig | None = None
    kv_source: int | None = None
    value_is_key: bool = False
    experts: ExpertsConfig | None = None
    latent: LatentConfig | None = None

    @property
    def latent_dim(self) -> int | None:
        """How many numbers of a key, the first ones, are its value too; None where values are apart."""
        return None if self.latent is None else self.latent.rank


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Dimension letters: D hidden_size, V vocab_size; N, K, H, F per layer."""

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[LayerConfig, ...]
    attention_scale: float | None = None  # None: head_dim ** -0.5, layer by layer
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # y = x / rms(x) * (weight + norm_offset)
    norm_bias: bool = False
    norm_placement: NormPlacement = "pre"
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "full"] | None = None
    value_norm: bool = False  # RMS norm of the values, without a weight
    attention_sinks: bool = False  # every head has one more logit in its softmax, which mixes in nothing
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    tie_embeddings: bool = True
    learned_positions: bool = False
    per_layer_input_dim: int = 0
    per_layer_input_vocab: int = 0
    layer_scalar: bool = False
    quantization: Quantization | None = None  # of the layers' projections

    def __post_init__(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer.num_heads % layer.num_kv_heads:
                raise ValueError(
                    f"layer {index}: num_heads={layer.num_heads} is not a multiple of num_kv_heads={layer.num_kv_heads}"
                )
            if layer.latent is not None:
                if (layer.num_kv_heads, layer.head_dim) != (1, layer.latent.rank + layer.latent.rope_dim):
                    raise ValueError(
                        f"layer {index}: num_kv_heads={layer.num_kv_heads} and head_dim={layer.head_dim} must be 1 and "
                        f"{layer.latent.rank + layer.latent.rope_dim}, what its latent attention keeps"
                    )
                if layer.rope is None or layer.kv_source is not None or self.attention_scale is None:
                    raise ValueError(f"layer {index}: latent attention needs rope, attention_scale, keys of its own")
            if layer.kv_source is not None and not 0 <= layer.kv_source < index:
                raise ValueError(f"layer {index}: kv_source={layer.kv_source} must be an earlier layer")

    def scale_of(self, layer: LayerConfig) -> float:
        return layer.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
