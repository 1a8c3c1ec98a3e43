"""The sampler's slow twin: float64, sorts, one row at a time, written from the papers' definitions."""

from __future__ import annotations

import numpy as np

from jaxinfer.types import SamplingParams


def adjusted(logits, params: SamplingParams, prompt=(), output=(), stop_token_ids=()):
    """Logits [V] after bias, bans, min_tokens and penalties, in that order."""
    x = np.asarray(logits, np.float64).copy()
    if params.allowed_token_ids is not None:
        x[[i for i in range(len(x)) if i not in set(params.allowed_token_ids)]] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in params.banned_token_ids or ():
        x[token] = -np.inf
    if len(output) < params.min_tokens:
        x[list(stop_token_ids)] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        times = list(output).count(token)
        x[token] -= params.frequency_penalty * times + params.presence_penalty
    return x


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def _nucleus(order, probabilities, portion, key):
    """The shortest prefix of `order` that holds `portion`, with the ties of its last entry's key."""
    last = np.searchsorted(np.cumsum(probabilities[order]), portion - 1e-12)
    return key <= key[order[min(last, len(order) - 1)]]


def distribution(x, params: SamplingParams):
    """Probabilities [V] after temperature, min-p, top-k, top-p and typical-p; a point mass for greedy."""
    x = np.asarray(x, np.float64)
    if params.temperature < 1e-5:
        return (np.arange(len(x)) == np.argmax(x)).astype(np.float64)
    x = x / params.temperature
    p = softmax(x)
    if params.min_p > 0:
        x = np.where(p >= params.min_p * p.max() * (1 - 1e-12), x, -np.inf)
    if 0 < params.top_k < len(x):
        x = np.where(x >= np.sort(x)[-params.top_k], x, -np.inf)
    if params.top_p < 1:
        x = np.where(_nucleus(np.argsort(-x, kind="stable"), softmax(x), np.float32(params.top_p), -x), x, -np.inf)
    if params.typical_p < 1:
        p = softmax(x)
        surprisal = np.where(p > 0, -np.log(np.where(p > 0, p, 1)), np.inf)
        entropy = np.sum(p[p > 0] * surprisal[p > 0])
        key = np.abs(surprisal - entropy)
        order = np.argsort(key, kind="stable")
        keep = _nucleus(order, p, np.float32(params.typical_p), key)
        x = np.where(keep & (p > 0), x, -np.inf)
    return softmax(x)
