"""Chat messages on their way to the model's template. Imports no jax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Arguments of the function that renders a template, which are not variables of the template: with some of them a
# client could bring a template of its own.
_NOT_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


@dataclass(frozen=True)
class Conversation:
    """Chat messages, each with "role" and "content", and the variables of the model's template."""

    messages: tuple[Mapping[str, str], ...]
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def check_variables(field_name: str, names: Iterable[str]) -> None:
    """ValueError, naming the request's field, for a name that is not a variable of a chat template."""
    for name in names:
        if name in _NOT_VARIABLES or name.startswith("_"):
            raise ValueError(f"{field_name}: {name!r} is no variable of the model's template; leave it out")
