"""Benchmarks: `python scripts/bench engine` for figures of this engine, `python scripts/bench peers ...` for others."""

from __future__ import annotations

import argparse
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
    commands.add_parser("peers", help="the same workloads on other engines; see peers/README.md", add_help=False)
    arguments, rest = parser.parse_known_args()
    if arguments.command == "peers":
        return subprocess.call([sys.executable, str(Path(__file__).parent / "peers" / "run.py"), *rest])
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    import engine_figures  # brings jax, which --help does without

    try:
        return engine_figures.report(arguments.only)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
