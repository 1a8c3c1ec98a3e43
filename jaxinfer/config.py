"""What a user chose, frozen, and where files go. The only reader of environment variables. Imports no jax.

Every field of EngineConfig but `model` can also be given as the environment variable JAXINFER_<FIELD> (for example
JAXINFER_MAX_NUM_SEQS=64). A value given in code or on the command line wins over the environment, which wins over the
default. JAXINFER_CACHE_DIR, then XDG_CACHE_HOME, say where files that can be made again are kept. JAXINFER_TOKENS holds
the bearer tokens of `python -m serving`.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jaxinfer.quantization import check_name

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of the KV cache, and what it then holds; None: keys and values as they are computed.
KV_CACHE_DTYPES = {
    "auto": None,
    "int8": "int8",
    "float8_e4m3fn": "float8_e4m3fn",
    "fp8": "float8_e4m3fn",
    "fp8_e4m3": "float8_e4m3fn",
}
PREFIX = "JAXINFER_"

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}


def parse_bytes(value: int | str, name: str = "size") -> int:
    """Bytes in 2147483648, "2GiB" (or "2G", powers of 1024) or "2GB" (powers of 1000)."""
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(
                f"{name}={value!r} is not a size; write bytes or a number with a unit, such as 2GiB or 500MB"
            )
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    if size <= 0:
        raise ValueError(f"{name}={value!r} must be more than 0 bytes; write a size such as 2GiB")
    return size


def parse_kv_cache_dtype(name: str) -> str | None:
    """What the KV cache holds of keys and values: the name of a dtype of 8 bits, or None, as they are computed."""
    if not isinstance(name, str) or name not in KV_CACHE_DTYPES:
        raise ValueError(f"kv_cache_dtype={name!r} is not supported; use one of {', '.join(KV_CACHE_DTYPES)}")
    return KV_CACHE_DTYPES[name]


def parse_bool(value: str) -> bool:
    """True for 1, true, yes, on; False for 0, false, no, off; in any case."""
    lowered = value.strip().lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"{value!r} is neither true nor false; write 1 or 0")


def parse_cache_dir(value: str) -> str | Literal[False]:
    """A directory, or False where the text is one of 0, false, no, off."""
    return False if value.strip().lower() in ("0", "false", "no", "off") else value


def _environment(name: str, default: Any, parse: Callable[[str], Any]) -> Callable[[], Any]:
    """A default factory: JAXINFER_<NAME> where that is set and not empty, else `default`."""

    def read() -> Any:
        variable = PREFIX + name.upper()
        text = os.environ.get(variable, "")
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise ValueError(f"environment variable {variable}={text!r}: {error}; change or unset it") from None

    return read


@dataclass(frozen=True)
class EngineConfig:
    """One engine's settings. None means "decided at start-up from the model and the devices", and is logged then.

    model                   a directory, or a hub id
    dtype                   of weights and activations; "auto" is the checkpoint's, and float32 on CPU
    quantization            of the layers' weights: "int8", "int4", or None for as the checkpoint has them
    mesh                    devices by axis, such as "tensor=4"; None is one device
    max_model_len           longest prompt and output together, in tokens; None is the model's own limit
    max_num_seqs            sequences in one step; None is 32 on CPU, 256 elsewhere
    max_num_batched_tokens  tokens in one step; None is 512 on CPU, 2048 elsewhere
    num_pages               pages in the KV cache; None derives them from memory
                            (these three of each shard, where the mesh splits requests: data, fsdp, expert, stage)
    kv_cache_memory         bytes for the KV cache of all devices, or text such as "2GiB"; not together with num_pages
    page_size               tokens in a page, on each device of the mesh's axis context; None is 16, or 32 where the KV
                            cache has 8 bits
    kv_cache_dtype          of keys and values in the KV cache: "auto" is as they are computed; "int8" and
                            "float8_e4m3fn" ("fp8") keep 8 bits, each token's of a head with a scale of its own
    enable_prefix_caching   share the pages of equal prompt beginnings
    seed                    from which requests without a seed get theirs
    attention_backend       name of the attention kernel; None takes the best that serves the model
    compilation_cache_dir   where compiled programs are kept; None is under the user's cache directory, False is off
    """

    model: str
    dtype: str = field(default_factory=_environment("dtype", "auto", str))
    quantization: str | None = field(default_factory=_environment("quantization", None, str))
    mesh: str | None = field(default_factory=_environment("mesh", None, str))
    max_model_len: int | None = field(default_factory=_environment("max_model_len", None, int))
    max_num_seqs: int | None = field(default_factory=_environment("max_num_seqs", None, int))
    max_num_batched_tokens: int | None = field(default_factory=_environment("max_num_batched_tokens", None, int))
    num_pages: int | None = field(default_factory=_environment("num_pages", None, int))
    kv_cache_memory: int | str | None = field(default_factory=_environment("kv_cache_memory", None, str))
    page_size: int | None = field(default_factory=_environment("page_size", None, int))
    kv_cache_dtype: str = field(default_factory=_environment("kv_cache_dtype", "auto", str))
    enable_prefix_caching: bool = field(default_factory=_environment("enable_prefix_caching", True, parse_bool))
    seed: int = field(default_factory=_environment("seed", 0, int))
    attention_backend: str | None = field(default_factory=_environment("attention_backend", None, str))
    compilation_cache_dir: str | os.PathLike[str] | Literal[False] | None = field(
        default_factory=_environment("compilation_cache_dir", None, parse_cache_dir)
    )

    def __post_init__(self) -> None:
        """Refuse what no engine could do: ValueError naming the value, the limit and the fix."""
        if not isinstance(self.model, str | os.PathLike) or not str(self.model).strip():
            raise ValueError(f"model={self.model!r} must be a directory or a hub id")
        object.__setattr__(self, "model", str(self.model))
        if self.dtype is None:
            object.__setattr__(self, "dtype", "auto")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        parse_kv_cache_dtype(self.kv_cache_dtype)
        check_name(self.quantization)
        if self.mesh is not None and not isinstance(self.mesh, str):
            raise ValueError(f"mesh={self.mesh!r} must be text such as 'tensor=4,data=2'")
        if self.mesh is not None:
            from jaxinfer.sharding.mesh import parse_mesh  # brings numpy, which --help does without

            parse_mesh(self.mesh)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_pages", "page_size"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, 2**31 - 1)
        _whole("seed", self.seed, 0, 2**32 - 1)
        if not isinstance(self.enable_prefix_caching, bool):
            raise ValueError(f"enable_prefix_caching={self.enable_prefix_caching!r} must be True or False")
        if self.num_pages is not None and self.kv_cache_memory is not None:
            raise ValueError(
                f"num_pages={self.num_pages} and kv_cache_memory={self.kv_cache_memory!r} both size the KV cache; "
                "give one"
            )
        if self.kv_cache_memory is not None:
            object.__setattr__(self, "kv_cache_memory", parse_bytes(self.kv_cache_memory, "kv_cache_memory"))
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and tokens < seqs:
            raise ValueError(
                f"max_num_batched_tokens={tokens} is less than max_num_seqs={seqs}, so a step could not serve every "
                f"running sequence; raise max_num_batched_tokens to at least {seqs}"
            )
        if self.attention_backend is not None and not str(self.attention_backend).strip():
            raise ValueError("attention_backend is empty; name a backend or leave it out")
        if self.compilation_cache_dir is True:
            raise ValueError(
                "compilation_cache_dir=True is not a directory; give a path, None (default) or False (off)"
            )
        _warn_of_unknown_variables()

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_memory` in bytes."""
        return None if self.kv_cache_memory is None else parse_bytes(self.kv_cache_memory)

    @property
    def compilation_cache_path(self) -> Path | None:
        """Directory of the compiled programs; None where keeping them is switched off."""
        if self.compilation_cache_dir is False:
            return None
        if self.compilation_cache_dir is None:
            return cache_directory() / "compiled"
        return Path(self.compilation_cache_dir).expanduser()


def cache_directory() -> Path:
    """Where files that can be made again go: JAXINFER_CACHE_DIR, or jaxinfer under XDG_CACHE_HOME (~/.cache)."""
    own = os.environ.get(PREFIX + "CACHE_DIR", "")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path("~/.cache").expanduser()
    return base / "jaxinfer"


def compiler_flags() -> list[str | None]:
    """What the environment tells XLA's compilers. They read it themselves; programs kept on disk go by it."""
    return [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]


def tokens_from_environment() -> str:
    """Bearer tokens that a server accepts, with spaces between them; empty where there are none."""
    return os.environ.get(PREFIX + "TOKENS", "")


def default_model() -> Path:
    """The model that comes with the package."""
    return Path(__file__).parent / "assets" / "demo"


_warned: set[str] = set()


def _warn_of_unknown_variables() -> None:
    known = {PREFIX + "CACHE_DIR", PREFIX + "TOKENS"} | {
        PREFIX + f.name.upper() for f in fields(EngineConfig) if f.name != "model"
    }
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX) and variable not in known and variable not in _warned:
            _warned.add(variable)
            logger.warning(
                "environment variable %s is not a setting; settings are %s", variable, ", ".join(sorted(known))
            )


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        hint = f"; use {math.floor(value)}" if isinstance(value, float) and math.isfinite(value) else ""
        raise ValueError(f"{name}={value!r} must be a whole number{hint}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value} is out of range; use a value in [{low}, {high}]")
