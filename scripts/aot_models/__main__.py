"""Compile the real step of large models for TPU slices that are not there, and hold it to a hand count.

    make aot                                        # after the kernels
    python scripts/aot_models --cases 70B 405B
    python scripts/aot_models --quick               # one model on one slice
    python scripts/aot_models --sweep docs/scaling.svg

Weights are shapes alone. For every model and mesh this prints one device's memory (weights by the layout and by hand,
the cache, scratch of a step), the collectives of a whole step by kind, number and bytes, those of its layers by the
program and by hand, what a step can not be faster than by the weights it reads, and the compiler's estimate of it. It
fails where weights differ from the hand count by 5 % or more, where a layer under tensor parallelism alone has other
than two all-reduces or gathers anything, where fsdp has more than two layers whole at a time, and where the cache is
not updated in place. A sweep compiles the same for 8 to 256 devices and draws it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# Before jax is imported: stay on the CPU, and keep libtpu from asking which TPU it is on.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v6e-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
sys.path.insert(0, str(Path(__file__).parents[2]))

import sweep
from compiled import Case, Found, compile_step
from published import BANDWIDTH, MODELS

CASES = (
    Case("Llama 3.1 70B", "v6e:2x4", "tensor=8"),
    Case("Llama 3.1 70B", "v5p:2x2x2", "tensor=8"),
    Case("Llama 3.1 70B", "tpu7x:2x2x1", "tensor=8"),
    Case("Llama 3.1 70B", "v6e:4x4", "data=2,tensor=8"),
    Case("Llama 3.1 405B", "v6e:8x8", "fsdp=8,tensor=8"),
    Case("Llama 3.1 405B", "v5p:4x4x4", "fsdp=64"),
    Case("Llama 3.1 405B", "tpu7x:2x4x4", "data=2,fsdp=4,tensor=8"),
    Case("Llama 3.1 405B", "v5p:4x4x4", "stage=8,tensor=8"),
    Case("Llama 3.1 70B", "v5p:4x4x4", "context=8,tensor=8", 2048, 1, 2**20, 2**20 // 16 // 8 + 1),
    Case("Llama 3.1 70B", "v5p:4x4x4", "context=8,tensor=8", 2048, 1, 2**20, 2**20 // 16 // 8 + 1, keys_travel=True),
    Case("Qwen3 235B A22B", "v6e:4x8", "expert=8,tensor=4"),
    Case("Qwen3 235B A22B", "v5p:2x4x4", "expert=32"),
    Case("Qwen3 235B A22B", "tpu7x:2x2x2", "expert=4,tensor=4"),
    Case("DeepSeek V3", "v6e:8x16", "expert=16,tensor=8"),
    Case("DeepSeek V3", "v5p:4x4x4", "expert=16,tensor=4"),
    Case("DeepSeek V3", "tpu7x:2x4x4", "expert=64"),
)


def report(case: Case, *, with_ends: bool = True) -> Found | None:
    """Compile a case, or its layers alone, and print what is found; None where it failed."""
    started = time.perf_counter()
    try:
        found = compile_step(case, with_ends=with_ends)
    except Exception as error:  # whatever the compiler says of one case, the others are still compiled
        print(f"{case} FAILED {type(error).__name__}: {str(error)[:400]}", flush=True)
        return None
    kinds: dict[str, list[int]] = {}
    for (kind, size), count in found.moved.items():
        total = kinds.setdefault(kind, [0, 0])
        total[0] += count
        total[1] += count * size
    moved = ", ".join(f"{count} {kind} {size / 2**20:.0f} MiB" for kind, (count, size) in sorted(kinds.items()))
    least = found.weights / BANDWIDTH[case.slice.split(":")[0]] * 1e3
    print(
        f"{case} weights {found.weights / 2**30:6.2f} GiB (by hand {found.weights_by_hand / 2**30:6.2f}), "
        f"cache {found.cache / 2**30:.2f}, scratch {found.scratch / 2**30:.2f}; {moved}; "
        f"in layers {found.moved_in_layers / 2**20:.0f} MiB (by hand {found.moved_by_hand / 2**20:.0f}); "
        f"at least {least:.1f} ms to read the weights, {1e3 * found.estimate:.1f} ms by the compiler  "
        f"({time.perf_counter() - started:.0f} s)",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="aot_models", description="Compile the step of large models without a TPU.")
    parser.add_argument("--cases", nargs="+", default=[], help="those whose model, slice or mesh contains one of these")
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    parser.add_argument(
        "--sweep", type=Path, metavar="PLOT", help="8 to 256 devices instead, drawn into PLOT (.svg, .png)"
    )
    arguments = parser.parse_args()
    wanted = arguments.cases or [""]
    every = sweep.CASES if arguments.sweep else CASES
    cases = [case for case in every if any(text in str(case) for text in wanted)]
    if not cases:
        parser.error(f"nothing matches {wanted}; models are {', '.join(MODELS)}")
    chosen = cases[:1] if arguments.quick else cases
    results = [(case, report(case, with_ends=not arguments.sweep)) for case in chosen]
    if arguments.sweep:
        sweep.draw([(case, found) for case, found in results if found is not None], arguments.sweep)
    num_failed = sum(found is None for _, found in results)
    print(f"{len(results)} models and slices, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
