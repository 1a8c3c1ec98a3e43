"""A model's name, a directory or a Hugging Face hub id, to a local directory. Imports no jax."""

from __future__ import annotations

import re
from pathlib import Path

# What a model needs: configs, tokenizers, chat templates and safetensors. Never pickles, never a second copy of the
# weights in the layout of another library.
DOWNLOAD_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
SKIP_PATTERNS = ("*/*", "consolidated*.safetensors", "*.onnx*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model_dir(model: str | Path) -> Path:
    """The local directory of a model; a hub id ("organisation/name") is downloaded, or found in the hub's cache.

    ValueError when there is neither such a directory nor such a model, or when the hub cannot be reached.
    """
    if not str(model):
        raise ValueError("model='': no such directory; give a directory or a hub id")
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            return path
        if path.exists():
            raise ValueError(
                f"model={str(model)!r} is a file; give the directory that holds config.json and the weights"
            )
    except OSError as error:
        raise ValueError(f"model={str(model)!r} cannot be read: {error.strerror}") from error
    text = str(model)
    if isinstance(model, Path) or not _HUB_ID.fullmatch(text) or ".." in text:
        raise ValueError(f"model={text!r}: no such directory; check the path")
    if "/" not in text:
        raise ValueError(f"model={text!r}: no such directory; check the path, or give a hub id as 'organisation/name'")
    return _download(text)


def _download(repo_id: str) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ValueError(
            f"model={repo_id!r} is no directory here, and huggingface_hub is not installed to fetch it; "
            f"run 'pip install huggingface_hub' or give a directory"
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, allow_patterns=list(DOWNLOAD_PATTERNS), ignore_patterns=list(SKIP_PATTERNS)
            )
        )
    except errors.GatedRepoError as error:
        raise ValueError(
            f"model={repo_id!r} is gated on the hub; accept its terms there, then run 'hf auth login'"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"model={repo_id!r}: no such directory and no such model on the hub; check the name "
            f"(a private one needs 'hf auth login')"
        ) from error
    except Exception as error:  # beside its own errors come those of its HTTP client, which changes between releases
        lines = str(error).splitlines() or [""]
        raise ValueError(
            f"model={repo_id!r} is no directory here and could not be fetched from the hub "
            f"({type(error).__name__}: {lines[0][:200]}); check the network, or give a directory"
        ) from error
