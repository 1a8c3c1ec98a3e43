"""Benchmarks: `python scripts/bench engine` for figures of the engine, `serve` of the server, `kernels` of attention on
an accelerator, `pipeline` of stages that overlap, `quantized` of products with quantized weights, `peers ...` of
others."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python scripts/bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    engine = commands.add_parser(
        "engine", help="host overhead, compilations, KV-cache waste, window memory; no downloads"
    )
    engine.add_argument(
        "--only", nargs="+", metavar="FIGURE", help="overhead, compilations, waste or window; all if left out"
    )
    serve = commands.add_parser("serve", help="the server's overhead, and load that does not wait; about two minutes")
    serve.add_argument("--model", metavar="DIR", help="default: the model that comes with jaxinfer")
    serve.add_argument("--rounds", type=int, default=7, metavar="N", help="turns of engine and server (default: 7)")
    serve.add_argument(
        "--seconds", type=float, default=10.0, metavar="S", help="of arrivals at each rate (default: 10)"
    )
    serve.add_argument(
        "--overload", type=float, metavar="S", help="instead: so many seconds of four times what the engine can serve"
    )
    serve.add_argument("--plot", metavar="FILE", help="draw the load's figures: .png, .svg or .pdf")
    pipeline = commands.add_parser(
        "pipeline", help="idle share of pipeline stages against (p-1)/(m+p-1), on as many processors as stages"
    )
    pipeline.add_argument("--stages", type=int, default=2, metavar="P", help="default: 2")
    pipeline.add_argument(
        "--engine", action="store_true", help="instead: tokens a second of an engine with 1 to P lanes busy"
    )
    kernels = commands.add_parser("kernels", help="attention kernels against copy bandwidth, matmul rate and cuDNN")
    kernels.add_argument("--quick", action="store_true", help="few shapes: a minute or two")
    kernels.add_argument("--allow-cpu", action="store_true", help="run the script itself where there is only a CPU")
    commands.add_parser("quantized", help="products with quantized weights beside those in float32; a few seconds")
    commands.add_parser("peers", help="the same workloads on other engines; see peers/README.md", add_help=False)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "peers":
        return subprocess.call([sys.executable, str(Path(__file__).parent / "peers" / "run.py"), *rest])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    try:
        if arguments.command == "serve":
            import serve_figures  # brings jax, which --help does without

            return serve_figures.report(
                arguments.model, arguments.rounds, arguments.seconds, arguments.plot, arguments.overload
            )
        if arguments.command == "kernels":
            import kernel_figures

            return kernel_figures.report(arguments.quick, arguments.allow_cpu)
        if arguments.command == "pipeline":
            os.environ["JAX_PLATFORMS"] = "cpu"
            os.environ["NPROC"] = "1"  # a program then has one thread,
            os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = str(arguments.engine)  # or else that of who sends it
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={arguments.stages}"
            import pipeline_figures

            report = pipeline_figures.report_engine if arguments.engine else pipeline_figures.report
            return report(arguments.stages)
        if arguments.command == "quantized":
            import quantized_figures

            return quantized_figures.report()
        import engine_figures

        return engine_figures.report(arguments.only)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
