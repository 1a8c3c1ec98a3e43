"""Parts of OpenAI's answers: log-probabilities in both of its styles, and usage. Imports no jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.types import Logprob

_LOWEST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this for a token that could not have been chosen


def completion_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None] | None,
    first_offset: int = 0,
    unscored: str = "",
) -> dict[str, Any] | None:
    """The style of /v1/completions. first_offset: where the first token's text begins in the completion.

    unscored: the text of a token without logprobs, which is a prompt's first: nothing precedes it.
    """
    if logprobs is None:
        return None
    chosen = list(zip(token_ids, logprobs, strict=True))
    tokens = [unscored if at is None else token_text(token_id, at[token_id]) for token_id, at in chosen]
    starts = [first_offset]
    for token in tokens:
        starts.append(starts[-1] + len(token))
    return {
        "tokens": tokens,
        "token_logprobs": [None if at is None else finite(at[token_id]) for token_id, at in chosen],
        "top_logprobs": [
            None if at is None else {token_text(i, entry): finite(entry) for i, entry in at.items()} for _, at in chosen
        ],
        "text_offset": starts[:-1],
    }


def chat_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None, num_top: int
) -> dict[str, Any] | None:
    """The style of /v1/chat/completions, with the `num_top` best at each position."""
    if logprobs is None:
        return None
    content = []
    for token_id, at in zip(token_ids, logprobs, strict=True):
        # The chosen token's entry is always there; among the top ones it is only if it is one of them.
        best = sorted((item for item in at.items() if (item[1].rank or 0) <= num_top), key=_rank)
        top = [_chat_logprob(i, entry) for i, entry in best]
        content.append({**_chat_logprob(token_id, at[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def usage(*, num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def token_text(token_id: int, entry: Logprob) -> str:
    """A token's text; a model without a tokenizer has none."""
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def finite(entry: Logprob) -> float:
    return entry.logprob if math.isfinite(entry.logprob) else _LOWEST_LOGPROB


def _chat_logprob(token_id: int, entry: Logprob) -> dict[str, Any]:
    token = token_text(token_id, entry)
    return {"token": token, "logprob": finite(entry), "bytes": list(token.encode("utf-8", "replace"))}


def _rank(item: tuple[int, Logprob]) -> int:
    return item[1].rank or 0
