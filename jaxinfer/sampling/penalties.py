"""Changes to the logits that depend on a request's own tokens: bias, banned and required tokens, penalties."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.sampling.rows import SamplingRows
from jaxinfer.sampling.state import COUNT_MASK, IN_PROMPT, IS_STOP_TOKEN, SamplerState


def adjust(logits: jax.Array, state: SamplerState, rows: SamplingRows) -> jax.Array:
    """[S, G, W] float32 -> the same, with each row's slot applied; rows that do not use their slot's state stay.

    Allowed and banned tokens and logit bias are one addition; then stop tokens are masked while min_tokens is pending;
    then the repetition penalty divides positive and multiplies negative logits of tokens in prompt or output
    (Keskar et al., "CTRL", 2019); then frequency and presence penalties subtract for tokens in the output.
    Masks are added, so that a NaN stays a NaN.
    """

    def column(x: jax.Array) -> jax.Array:
        return lax.expand_dims(x, (1, 2))

    packed = state.counts[rows.slot]
    count = packed & COUNT_MASK
    x = logits + state.bias[rows.slot]
    x += jnp.where(column(rows.min_tokens_pending) & ((packed & IS_STOP_TOKEN) != 0), -jnp.inf, 0.0)
    penalty = column(rows.repetition_penalty)
    penalised = jnp.where(x > 0, x / penalty, x * penalty)
    x = jnp.where((count > 0) | ((packed & IN_PROMPT) != 0), penalised, x)
    x -= column(rows.frequency_penalty) * count.astype(jnp.float32)
    x -= column(rows.presence_penalty) * (count > 0)
    return jnp.where(column(rows.uses_dense_state), x, logits)
