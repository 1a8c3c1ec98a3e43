"""Command-line flags for EngineConfig and for default sampling, shared by the commands. Imports no jax.

A flag that is not given leaves no trace in the namespace, so that the environment and the defaults keep their say.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jaxinfer.config import DTYPES, KV_CACHE_DTYPES, EngineConfig, default_model, parse_cache_dir
from jaxinfer.quantization import BY_NAME

if TYPE_CHECKING:
    from jaxinfer.distributed.group import Group

_SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "n", "stop", "ignore_eos", "logprobs")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, `error: ...`, with exit status 2."""

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field of EngineConfig."""
    group = parser.add_argument_group("model and engine", "Each but --model can also be set as JAXINFER_<NAME>.")

    def add(flag: str, metavar: str | None, text: str, **options: Any) -> None:
        if metavar is not None:
            options["metavar"] = metavar
        group.add_argument(flag, help=text, default=argparse.SUPPRESS, **options)

    add("--model", "DIR", "checkpoint directory or hub id (default: the model that comes with jaxinfer)")
    add("--dtype", None, "of weights and activations (default: the checkpoint's; float32 on CPU)", choices=DTYPES)
    add(
        "--quantization",
        None,
        "round the layers' weights to 8 or 4 bits as they are read (default: as the checkpoint has them)",
        choices=tuple(BY_NAME),
    )
    axes = "data, fsdp, stage, context, expert, tensor"
    add("--mesh", "AXES", f"devices by axis ({axes}), such as data=2,tensor=4 (default: one device)")
    add("--max-model-len", "N", "longest prompt and output together, in tokens (default: the model's limit)", type=int)
    add("--max-num-seqs", "N", "sequences in one step (default: 32 on CPU, 256 elsewhere)", type=int)
    add("--max-num-batched-tokens", "N", "tokens in one step (default: 512 on CPU, 2048 elsewhere)", type=int)
    add("--num-pages", "N", "pages in the KV cache (default: from the free memory)", type=int)
    add("--kv-cache-memory", "SIZE", "memory for the KV cache, such as 2GiB; instead of --num-pages")
    add("--page-size", "N", "tokens in a page of the KV cache", type=int)
    add(
        "--kv-cache-dtype",
        None,
        "of keys and values in the KV cache; 8 bits each but for auto (default: auto, as they are computed)",
        choices=tuple(KV_CACHE_DTYPES),
    )
    add(
        "--enable-prefix-caching",
        None,
        "share the KV cache of equal prompt beginnings (default: on)",
        action=argparse.BooleanOptionalAction,
    )
    add("--seed", "N", "from which every line without a seed gets its own (default: 0)", type=int)
    add("--attention-backend", "NAME", "attention kernel (default: the best that serves the model)")
    add(
        "--compilation-cache-dir",
        "DIR",
        "where compiled programs are kept, or 'off' (default: in the user's cache directory)",
        type=parse_cache_dir,
    )


def add_group_flags(parser: argparse.ArgumentParser) -> None:
    """Where this process is one of several that run a model together."""
    group = parser.add_argument_group(
        "several processes", "The same command, on every host, with a --process-id of its own; process 0 leads."
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of process 0; or auto, on TPU pods, SLURM, Kubernetes and Open MPI, without the other two",
    )
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="from 0 to N - 1")


def join_group(args: argparse.Namespace, status_when_lost: int) -> Group | None:
    """Meet the others, where the flags say that there are any. ValueError for flags that do not, or contradict."""
    if args.coordinator is None:
        for flag in ("num_processes", "process_id"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag.replace('_', '-')} needs --coordinator HOST:PORT, of process 0")
        return None
    from jaxinfer.distributed.group import join

    return join(args.coordinator, args.num_processes, args.process_id, status_when_lost=status_when_lost)


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The flags given, checked. ValueError for what no engine could do."""
    given = {name: value for name, value in vars(args).items() if name in EngineConfig.__dataclass_fields__}
    return EngineConfig(**{"model": str(default_model()), **given})


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Sampling of requests that do not say themselves."""
    group = parser.add_argument_group("sampling", "For what a line of the input does not set itself.")

    def add(flag: str, metavar: str | None, text: str, **options: Any) -> None:
        if metavar is not None:
            options["metavar"] = metavar
        group.add_argument(flag, help=text, default=argparse.SUPPRESS, **options)

    add(
        "--max-tokens",
        "N",
        "tokens to generate (default: 16; to the context's end for chat; 256 for --prompt)",
        type=int,
    )
    add("--temperature", "T", "0 is greedy (default: 1)", type=float)
    add("--top-k", "K", "sample from the K most probable tokens (default: 0, off)", type=int)
    add("--top-p", "P", "sample from the most probable tokens that make up P (default: 1, off)", type=float)
    add("--min-p", "P", "drop tokens less than P times as probable as the best (default: 0, off)", type=float)
    add("--n", "N", "completions of each prompt (default: 1)", type=int)
    add("--stop", "TEXT", "end before this text; may be given more than once", action="append")
    add("--ignore-eos", None, "go on after the end-of-sequence token", action="store_true")
    add("--logprobs", "N", "log-probabilities of the chosen and the N most probable tokens", type=int)


def sampling_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags given, as SamplingParams fields. ValueError for a value out of range."""
    from jaxinfer.types import SamplingParams

    given = {name: value for name, value in vars(args).items() if name in _SAMPLING}
    SamplingParams(**given)
    return given
