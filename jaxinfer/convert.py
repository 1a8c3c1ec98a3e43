"""`python -m jaxinfer.convert`: a model directory between Hugging Face safetensors and Orbax, and between dtypes.

The result is a model directory of its own, with config and tokenizer. It appears whole or not at all: it is written
beside its place and moved there at the end. Exit status: 0 done; 2 not done, one line says why; 130 interrupted.
`--help` imports no jax.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxinfer.flags import OneLineParser
from jaxinfer.quantization import BY_NAME, CONFIG_KEY, choose, num_bytes, to_config

if TYPE_CHECKING:
    import numpy as np

    from jaxinfer.checkpoint.export import Param
    from jaxinfer.models.families.base import Source
    from jaxinfer.quantization import Quantization

FORMATS = ("orbax", "safetensors")
DTYPES = ("float32", "bfloat16", "float16")
DONE, NOT_DONE, INTERRUPTED = 0, 2, 130

log = logging.getLogger("jaxinfer.convert")  # also when run as __main__


def parser() -> OneLineParser:
    result = OneLineParser(
        prog="python -m jaxinfer.convert",
        description="Convert a model between Hugging Face safetensors and Orbax.",
        epilog="Host memory: to orbax, the parameters once; to safetensors, the largest parameter or 256 MB.",
        allow_abbrev=False,
    )
    result.add_argument("--input", required=True, metavar="DIR|HUB_ID", help="the model to convert")
    result.add_argument("--output", required=True, metavar="DIR", help="where to write it; new, or empty")
    result.add_argument("--to", choices=FORMATS, help="format to write (default: the one the input is not in)")
    result.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as they are stored)")
    text = "round the layers' weights to 8 or 4 bits, which orbax alone keeps"
    result.add_argument("--quantization", choices=tuple(BY_NAME), help=text)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxinfer").setLevel(logging.INFO)
    import jax

    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and an accelerator may be serving
    try:
        convert(args.input, args.output, to=args.to, dtype=args.dtype, quantization=args.quantization)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_DONE
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return DONE


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> None:
    """Write the model in `source` (a directory or a hub id) to the directory `target`, new or empty.

    to: "orbax" or "safetensors"; None is the one that the source is not in, or "orbax" for quantized weights, which it
    alone can keep. dtype: of the weights; None keeps each one's. quantization: "int8" or "int4" for the layers'.
    ValueError, in one line, for whatever is wrong with either.
    """
    from jaxinfer.checkpoint.config import copy_side_files, read_config
    from jaxinfer.checkpoint.hub import resolve_model_dir
    from jaxinfer.checkpoint.orbax import is_orbax
    from jaxinfer.models.registry import resolve

    started = time.perf_counter()
    output = Path(target).expanduser().absolute()
    check_output(output)
    directory = resolve_model_dir(source)
    config_json, _ = read_config(directory)
    family, config = resolve(config_json)
    packed, config = config.quantization, replace(config, quantization=choose(quantization, config.quantization))
    from_orbax = is_orbax(directory)
    to = to or ("safetensors" if from_orbax and config.quantization is None else "orbax")
    if config.quantization is not None and to != "orbax":
        raise ValueError(f"to={to!r}: {config.quantization.name} weights are kept by orbax alone; write that")
    written = None if config.quantization is None else to_config(config.quantization)
    with appearing_whole(output) as partial:
        if from_orbax:
            written_bytes = _from_orbax(directory, partial, to, dtype, family.sources(config), config)
        else:
            written_bytes = _from_safetensors(directory, partial, to, dtype, family, config, packed)
        # What was packed is not any more: every family that takes such a checkpoint unpacks it.
        copy_side_files(directory, partial, _with_dtype(config_json, dtype) | {CONFIG_KEY: written})
    log.info("%s: %s, %.3f GB, in %.1f s", output, to, written_bytes / 1e9, time.perf_counter() - started)


def check_output(output: Path) -> None:
    """ValueError unless `output` is a new or an empty directory."""
    try:
        if output.exists() and not output.is_dir():
            raise ValueError(f"output={str(output)!r} is a file; give a new directory")
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"output={str(output)!r} is not empty; give a new directory, or empty it")
    except OSError as error:
        raise ValueError(f"output={str(output)!r} cannot be used: {error.strerror}; give another path") from error


@contextlib.contextmanager
def appearing_whole(output: Path) -> Iterator[Path]:
    """A directory to fill that becomes `output` when the block ends, and disappears when it fails."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            partial.rename(output)
        except BaseException:
            _remove(partial)
            raise
    except OSError as error:
        raise ValueError(
            f"output={str(output)!r} cannot be written: {error.strerror or error}; "
            f"free some space, or give another path"
        ) from error


def _remove(partial: Path) -> None:
    """Delete a directory whose failed writer has threads that make it anew, and which nobody can wait for.

    Those of tensorstore were seen at it 70 ms later on a busy machine: it is gone when it stays away for a second.
    """
    with contextlib.suppress(OSError):
        partial.rmdir()  # nothing was written yet, so nobody writes
        return
    away = 0
    for _ in range(100):
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
            away = 0
        if away == 10:
            return
        time.sleep(0.1)
        away += 1


def check_space(partial: Path, params: Mapping[str, Param]) -> None:
    """ValueError where the file system has no room for these parameters."""
    needed = num_bytes(params.values())
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise ValueError(
            f"{partial.parent} has {free / 1e9:.2f} GB free and the weights take {needed / 1e9:.2f} GB; "
            f"free some space, or give an output elsewhere"
        )


def _from_safetensors(
    directory: Path,
    partial: Path,
    to: str,
    dtype: str | None,
    family: Any,
    config: Any,
    packed: Quantization | None,
) -> int:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from jaxinfer.checkpoint.export import export_safetensors
    from jaxinfer.checkpoint.load import check_tensors, find_sources, load_param, load_params
    from jaxinfer.checkpoint.orbax import save_orbax
    from jaxinfer.checkpoint.packed import open_checkpoint

    with open_checkpoint(directory, packed) as reader:
        found = find_sources(reader, family, config)
        there = {path: reader.tensors.get(source.names(1)[0]) for path, source in found.items()}
        stored = {path: info.dtype for path, info in there.items() if info is not None}
        stored.update({path: np.dtype(jnp.bfloat16) for path, source in found.items() if source.scales is not None})
        params, abstract = _describe(config, stored, dtype)
        check_space(partial, params)
        if to == "orbax":
            loaded = load_params(reader, abstract, family, config)
            save_orbax(partial, loaded)
            return num_bytes(jax.tree.leaves(loaded))
        check_tensors(reader, found, {path: param.shape for path, param in params.items()}, family)
        sharding = SingleDeviceSharding(jax.devices()[0])

        def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
            return {
                path: np.asarray(load_param(reader, found[path], params[path].shape, params[path].dtype, sharding))
                for path in paths
            }

        return export_safetensors(partial, params, family.sources(config), read)


def _from_orbax(
    directory: Path, partial: Path, to: str, dtype: str | None, sources: Mapping[str, Source], config: Any
) -> int:
    import jax

    from jaxinfer.checkpoint.export import export_safetensors
    from jaxinfer.checkpoint.orbax import OrbaxReader, load_orbax, save_orbax

    with OrbaxReader(directory) as reader:
        params, abstract = _describe(config, reader.dtypes, dtype)
        check_space(partial, params)
        if to == "orbax":
            loaded = load_orbax(directory, abstract)
            save_orbax(partial, loaded)
            return num_bytes(jax.tree.leaves(loaded))
        reader.check({path: param.shape for path, param in params.items()})

        def read(paths: Sequence[str]) -> Mapping[str, np.ndarray]:
            return reader.read({path: params[path].dtype for path in paths})

        return export_safetensors(partial, params, sources, read)


def _describe(
    config: Any, stored: Mapping[str, np.dtype], dtype: str | None
) -> tuple[dict[str, Param], dict[str, Any]]:
    """Every parameter to be written, by path; and, nested, the abstract parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxinfer.checkpoint.export import Param
    from jaxinfer.models.model import Model

    model = Model(config)
    params: dict[str, Param] = {}

    def describe(path: Any, leaf: Any, axes: tuple[str | None, ...]) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Of a weight that is yet to be quantized, the scales are of the dtype that it is stored in.
        source = name if name in stored else name.removesuffix("/scales")
        kept = np.dtype(stored.get(source, leaf.dtype))
        wanted = np.dtype(dtype) if dtype is not None and jnp.issubdtype(kept, jnp.floating) else kept
        params[name] = Param(tuple(leaf.shape), axes, wanted)
        return jax.ShapeDtypeStruct(leaf.shape, wanted)

    abstract = jax.tree_util.tree_map_with_path(describe, model.abstract_params, model.logical_axes)
    return params, abstract


def _with_dtype(config_json: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """What changes in config.json, also one level down where multimodal models keep the text model's settings."""
    if dtype is None:
        return {}
    changes: dict[str, Any] = {"torch_dtype": dtype} if "torch_dtype" in config_json else {"dtype": dtype}
    text = config_json.get("text_config")
    if isinstance(text, Mapping) and ("dtype" in text or "torch_dtype" in text):
        changes["text_config"] = {**text, **_with_dtype(text, dtype)}
    return changes


if __name__ == "__main__":
    sys.exit(main())
