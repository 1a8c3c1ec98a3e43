"""`python -m jaxinfer.run`: a batch job over a file of prompts, or one prompt streamed to the terminal.

Results go to the file, a prompt's completion to standard output, everything else to standard error. Exit status:
0 every line was answered; 1 the job is finished and some lines are error records; 2 the job is not finished or did not
start (bad flags, no such model, nowhere to write): one line says why; 3 a defect of the program: its traceback;
130 interrupted and 143 terminated, with all finished results kept. `--help` imports no jax.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

from jaxinfer.batchjob.job import Job, JobCounts, JobSettings
from jaxinfer.batchjob.lines import InputFile, JobError
from jaxinfer.batchjob.results import Mode, ResultsFile
from jaxinfer.config import EngineConfig
from jaxinfer.flags import (
    OneLineParser,
    add_engine_flags,
    add_group_flags,
    add_sampling_flags,
    engine_config,
    join_group,
    sampling_defaults,
)
from jaxinfer.metrics import format_seconds, format_table

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

ALL_ANSWERED, SOME_FAILED, NOT_FINISHED, DEFECT, INTERRUPTED, TERMINATED, NO_READER = 0, 1, 2, 3, 130, 143, 141

OpenEngine = Callable[[EngineConfig], "Engine"]


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as Ctrl-C does."""


def open_engine(config: EngineConfig) -> Engine:
    """The real engine. ValueError for a model that cannot be loaded, and where JAX finds no device."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # what JAX raises depends on how the platform is missing
        platforms, reason = jax.config.jax_platforms, str(error) or "no such platform here"
        raise ValueError(f"JAX has no device for JAX_PLATFORMS={platforms!r} ({reason}); set it to cpu, say") from error

    from jaxinfer.engine import Engine

    return Engine(config)


def parser() -> argparse.ArgumentParser:
    result = OneLineParser(
        prog="python -m jaxinfer.run",
        description="Complete every line of a file of prompts, or one prompt.",
        epilog=(
            'An input line is {"prompt": TEXT or [token ids], ...} with any sampling parameter and an "id", or a line '
            "of OpenAI's batch format for /v1/completions or /v1/chat/completions. Exit status: 0 every line answered, "
            "1 some lines failed, 2 not finished, 3 a defect, 130 interrupted."
        ),
        allow_abbrev=False,
    )
    job = result.add_argument_group("job")
    job.add_argument("--input", metavar="FILE", help="JSON lines to complete; - is standard input")
    job.add_argument("--output", metavar="FILE", help="where results go, a line each, as they finish")
    job.add_argument("--resume", action="store_true", help="finish an output that an earlier run began, or begin it")
    job.add_argument("--overwrite", action="store_true", help="replace the output if it is there")
    job.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="progress bar on standard error (default: if it is a terminal)",
    )
    job.add_argument("--prompt", metavar="TEXT", help="complete this text and print it as it comes")
    job.add_argument("--chat", action="store_true", help="give --prompt to the model as a user's chat message")
    add_engine_flags(result)
    add_group_flags(result)
    add_sampling_flags(result)
    return result


def main(argv: Sequence[str] | None = None, *, open_engine: OpenEngine = open_engine) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    with _sigterm_as_interrupt():
        return _status_of(lambda: _command(args, open_engine))


def _command(args: argparse.Namespace, open_engine: OpenEngine) -> int:
    with _as_job_error():
        _check_flags(args)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxinfer").setLevel(logging.INFO)
    if args.coordinator is not None:
        _keep_output_for_results()
    with _as_job_error():
        group = join_group(args, status_when_lost=NOT_FINISHED)
    if group is not None and group.process_id:
        from jaxinfer.distributed import follow

        logging.getLogger("jaxinfer").setLevel(logging.WARNING)  # process 0 says the same
        follow()
        return ALL_ANSWERED
    work = _batch if args.prompt is None else _prompt
    status = _status_of(lambda: work(args, open_engine))
    if group is not None:
        group.close(status)
    return status


def _keep_output_for_results() -> None:
    """Gloo, by which CPUs of several processes talk, tells of its connections on standard output: not on ours."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def _status_of(work: Callable[[], int]) -> int:
    """The exit status, and for whatever went wrong a line."""
    try:
        return work()
    except JobError as error:
        _tell_error(str(error))
        return NOT_FINISHED
    except BrokenPipeError:
        # Nobody reads standard output any more; the interpreter would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER
    except KeyboardInterrupt as error:
        _tell("stopped")
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    except Exception:
        traceback.print_exc()
        _tell_error("this is a defect of jaxinfer; the lines above say where")
        return DEFECT


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    if args.prompt is None and args.input is None:
        raise JobError("nothing to do; give --input FILE --output FILE, or --prompt TEXT")
    if args.prompt is not None:
        for name in ("input", "output", "resume", "overwrite", "progress", "logprobs"):
            given = getattr(args, name, None)
            if given is not None and given is not False:
                raise JobError(f"--{name} does not go with --prompt; leave one of them out")
        if getattr(args, "n", 1) != 1:
            raise JobError(f"--n {args.n} does not go with --prompt, which shows one completion; use --input")
        if not args.prompt:
            raise JobError("--prompt is empty; give at least one character")
        return
    if args.chat:
        raise JobError("--chat goes with --prompt only; in a file, use lines for /v1/chat/completions")
    if args.output is None:
        raise JobError("--output is missing; name the file for the results")
    if args.resume and args.overwrite:
        raise JobError("--resume and --overwrite contradict each other; give one")
    if args.resume and args.input == "-":
        raise JobError("--resume needs to read the input again, which standard input cannot do; use a file")
    both_exist = args.input != "-" and os.path.exists(args.input) and os.path.exists(args.output)
    if both_exist and os.path.samefile(args.input, args.output):
        raise JobError(f"--input and --output are the same file, {args.input}; choose another --output")


def _prompt(args: argparse.Namespace, open_engine: OpenEngine) -> int:
    from jaxinfer.batchjob.oneoff import run_prompt

    with _as_job_error():
        config, sampling = engine_config(args), sampling_defaults(args)
    engine = _open(open_engine, config)
    summary = run_prompt(engine, args.prompt, chat=args.chat, sampling=sampling, seed=config.seed, out=sys.stdout)
    _tell(summary)
    return ALL_ANSWERED


def _batch(args: argparse.Namespace, open_engine: OpenEngine) -> int:
    with _as_job_error():
        config, sampling = engine_config(args), sampling_defaults(args)
    model_name = os.path.basename(os.path.normpath(config.model))
    source = InputFile(args.input, settings=json.dumps([model_name, config.seed, sampling], sort_keys=True))
    source.check()
    mode: Mode = "resume" if args.resume else "overwrite" if args.overwrite else "new"
    with contextlib.closing(ResultsFile(args.output, mode)) as results:
        before = len(results.digests)
        left = results.check_against(source) if source.can_be_read_again else None
        if left == 0:
            if not before:
                raise JobError(f"{source.name} has no lines; nothing was done")
            _tell(f"all {before:,} lines of {source.name} were answered already")
            return SOME_FAILED if results.num_failed else ALL_ANSWERED
        engine = _open(open_engine, config)
        results.begin()
        settings = JobSettings(model_name, config.seed, sampling, max_in_flight=2 * engine.plan.num_slots)
        job = Job(engine, source, results, settings)
        started = time.monotonic()
        try:
            with _progress(args.progress, left) as on_line:
                job.run(on_line)
        except BaseException:
            _say_how_to_go_on(args, before + job.counts.num_done)
            raise
        elapsed = time.monotonic() - started
        if not job.counts.num_done:
            raise JobError(f"{source.name} has no lines; nothing was done")
        _tell(format_table(engine.stats(), elapsed))
        return _close(args, job.counts, before, results.num_failed)


def _close(args: argparse.Namespace, counts: JobCounts, before: int, failed_before: int) -> int:
    earlier = f", {before:,} before" if before else ""
    _tell(f"{counts.num_done:,} lines answered in {args.output}{earlier}")
    failed = counts.num_failed + failed_before
    if not failed:
        return ALL_ANSWERED
    first = f"; the first: {counts.first_failure}" if counts.first_failure else ""
    _tell_error(f"{failed:,} {'line' if failed == 1 else 'lines'} failed, see their error records{first}")
    return SOME_FAILED


def _open(open_engine: OpenEngine, config: EngineConfig) -> Engine:
    started = time.monotonic()
    with _as_job_error():
        engine = open_engine(config)
    _tell(f"{config.model} is ready after {format_seconds(time.monotonic() - started)}")
    return engine


def _say_how_to_go_on(args: argparse.Namespace, num_done: int) -> None:
    if args.input == "-":
        _tell(f"{num_done:,} lines answered so far are in {args.output}")
    else:
        _tell(f"{num_done:,} lines answered so far are in {args.output}; the same command with --resume does the rest")


@contextlib.contextmanager
def _progress(wanted: bool | None, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar over the lines, or nothing. Yields what is to be called with each line's number of tokens."""
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield lambda num_tokens: None
        return
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    tokens, started = 0, time.monotonic()
    # A pseudo-terminal may say that it is 0 by 0, and tqdm then shows nothing; shutil says 80 by 24.
    size = shutil.get_terminal_size()
    columns, rows = min(size.columns, 100), size.lines
    with logging_redirect_tqdm(), tqdm(total=total, unit=" lines", file=sys.stderr, ncols=columns, nrows=rows) as bar:

        def on_line(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s", refresh=False)
            bar.update()

        yield on_line


@contextlib.contextmanager
def _as_job_error() -> Iterator[None]:
    """What the boundary refuses (ValueError) and the system refuses (OSError) becomes one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise JobError(str(error)) from error


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _tell_error(message: str) -> None:
    """One line, whatever a library put into the message."""
    _tell(f"error: {' '.join(message.split())}")


if __name__ == "__main__":
    sys.exit(main())
