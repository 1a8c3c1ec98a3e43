"""Text to token ids and back, chat templates, and text as it streams. Nothing heavy is imported before it is used."""

from jaxinfer.tokenizer.detokenizer import IncrementalDetokenizer
from jaxinfer.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer"]
