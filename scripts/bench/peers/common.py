"""Workloads, measurement and reporting shared by all peers (stdlib only).

A peer file defines a class with

    name, dtypes                       what it is called, which dtypes it takes
    __init__(model, dtype, threads, work)
    convert(model, dtype, work)        optional classmethod, run by --phase convert
    version()                          dict of package versions
    generate(prompts, max_new)         list of id lists, list of ints -> list of id lists
    stream(prompt, n, emit)            one request; calls emit(id) as each id is made
                                       (a callback and no helper thread: under torch a
                                       second Python thread cost 18 ms per token here)
    shared(prefix, suffixes, n)        optional; W4. Default: generate(prefix + suffix)

and ends with common.main(Class). generate/stream must return exactly max_new ids
(greedy, eos ignored); this is checked, so all engines do the same work.

All prompts are functions of (workload, repetition): no repetition sees a prompt
that an earlier one put into an engine's prefix cache.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
from pathlib import Path

VOCAB = 49152
FIRST_ID = 300  # skip specials and single bytes
W1_PROMPT = 512
W2_PROMPT, W2_NEW = 32, 128
W4_PREFIX, W4_SUFFIX, W4_N, W4_NEW = 384, 16, 8, 32

_r = random.Random(20250101)
W3_PROMPTS = [_r.randint(16, 256) for _ in range(32)]
W3_NEW = [_r.randint(16, 128) for _ in range(32)]


def ids(n, *key):
    r = random.Random("/".join(map(str, key)))
    return [r.randrange(FIRST_ID, VOCAB) for _ in range(n)]


VERIFY = [ids(n, "verify", n) for n in (7, 32, 100, 300)]
VERIFY_NEW = 16


def w3(rep):
    return [ids(n, "w3", rep, i) for i, n in enumerate(W3_PROMPTS)], list(W3_NEW)


def w4(rep, shared=True):
    pre = [ids(W4_PREFIX, "w4", rep, 0 if shared else i, shared) for i in range(W4_N)]
    suf = [ids(W4_SUFFIX, "w4s", rep, i, shared) for i in range(W4_N)]
    return pre, suf


def since_exec():
    """Seconds since this process was started (10 ms resolution, Linux)."""
    with open("/proc/self/stat") as f:
        start = int(f.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    with open("/proc/uptime") as f:
        return float(f.read().split()[0]) - start


def peak_rss_mib():
    return max(resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024


def noise():
    """Counters that should not move during a quiet measurement."""
    r = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/stat") as f:
        steal = int(f.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
    return {
        "major_faults": r.ru_majflt,
        "steal_s": steal,
        "cpu_s": r.ru_utime + r.ru_stime,
        "wall_s": time.perf_counter(),
    }


def summary(xs):
    return {
        "median": statistics.median(xs),
        "min": min(xs),
        "max": max(xs),
        "n": len(xs),
        "all": [float(f"{x:.5g}") for x in xs],
    }


def check(outs, want):
    got = [len(o) for o in outs]
    if got != list(want):
        raise RuntimeError(f"lengths differ: got {got}, want {list(want)}")


def run_w1(p, rep):
    ts = []
    t = time.perf_counter()
    p.stream(ids(W1_PROMPT, "w1", rep), 1, lambda tok: ts.append(time.perf_counter()))
    check([ts], [1])
    dt = ts[0] - t
    return {"ttft_s": dt, "prompt_tok_s": W1_PROMPT / dt}


def run_w2(p, rep):
    ts = []
    t = time.perf_counter()
    p.stream(ids(W2_PROMPT, "w2", rep), W2_NEW, lambda tok: ts.append(time.perf_counter()))
    check([ts], [W2_NEW])
    gaps = [b - a for a, b in itertools.pairwise(ts)]
    return {"ttft_s": ts[0] - t, "itl_ms": 1e3 * statistics.median(gaps), "tok_s": (W2_NEW - 1) / (ts[-1] - ts[0])}


def run_w3(p, rep):
    prompts, new = w3(rep)
    t = time.perf_counter()
    outs = p.generate(prompts, new)
    dt = time.perf_counter() - t
    check(outs, new)
    return {"s": dt, "out_tok_s": sum(new) / dt, "total_tok_s": (sum(new) + sum(map(len, prompts))) / dt}


def _w4(p, rep, shared):
    pre, suf = w4(rep, shared)
    t = time.perf_counter()
    if shared and hasattr(p, "shared"):
        outs = p.shared(pre[0], suf, W4_NEW)
    else:
        outs = p.generate([a + b for a, b in zip(pre, suf, strict=False)], [W4_NEW] * W4_N)
    dt = time.perf_counter() - t
    check(outs, [W4_NEW] * W4_N)
    return {"s": dt}


def run_w4(p, rep):
    return _w4(p, rep, True)


def run_w4c(p, rep):
    """Control: the same lengths as W4 with eight different prefixes."""
    return _w4(p, rep, False)


RUN = {"W1": run_w1, "W2": run_w2, "W3": run_w3, "W4": run_w4, "W4c": run_w4c}


def verify(p, ref):
    """Compare greedy ids with the reference; per prompt, ids that agree before the
    first difference, and the reference's top-1/top-2 logit margin there."""
    outs = p.generate(VERIFY, [VERIFY_NEW] * len(VERIFY))
    check(outs, [VERIFY_NEW] * len(VERIFY))
    agree, margins = [], []
    for o, r, m in zip(outs, ref["ids"], ref["margins"], strict=False):
        k = next((i for i, (a, b) in enumerate(zip(o, r, strict=False)) if a != b), len(r))
        agree.append(k)
        margins.append(None if k == len(r) else m[k])
    one = [[] for _ in VERIFY]
    for q, o in zip(VERIFY, one, strict=False):
        p.stream(q, VERIFY_NEW, o.append)
    return {
        "agree": agree,
        "of": VERIFY_NEW,
        "margin_at_first_difference": margins,
        "stream_equals_generate": one == [list(o) for o in outs],
    }


def end_children():
    """End the helper processes the engine started (os._exit would orphan them)."""
    for t in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{t}/children") as f:
            for pid in map(int, f.read().split()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def main(cls):
    ap = argparse.ArgumentParser()
    ap.add_argument("--model", required=True, help="directory made by make_model.py")
    ap.add_argument("--dtype", default="fp32", choices=cls.dtypes)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--work", required=True, help="folder for converted models")
    ap.add_argument("--phase", default="bench", choices=["convert", "cold", "bench"])
    ap.add_argument("--workloads", default="W1,W2,W3,W4,W4c")
    ap.add_argument("--reps", type=int, default=3)
    ap.add_argument(
        "--budget", type=float, default=400, help="seconds per workload after which no repetition is started"
    )
    ap.add_argument("--reference", help="JSON made by reference.py")
    ap.add_argument("--out", help="append one JSON line here")
    a = ap.parse_args()
    os.makedirs(a.work, exist_ok=True)
    if a.phase == "convert":
        if hasattr(cls, "convert"):
            t = time.perf_counter()
            cls.convert(a.model, a.dtype, a.work)
            print(f"converted in {time.perf_counter() - t:.1f} s")
        return
    p = cls(a.model, a.dtype, a.threads, a.work)
    load_s = since_exec()
    p.stream(ids(32, "cold"), 1, lambda tok: None)
    cold_s = since_exec()
    rec = {
        "engine": cls.name,
        "dtype": a.dtype,
        "threads": a.threads,
        "tag": os.environ.get("PEERS_TAG", ""),
        "model": os.path.basename(a.model.rstrip("/")),
        "phase": a.phase,
        "versions": dict(p.version(), python=sys.version.split()[0]),
        "loaded_s": load_s,
        "first_token_s": cold_s,
    }
    if a.phase == "bench":
        if a.reference:
            rec["verify"] = verify(p, json.loads(Path(a.reference).read_text()))
            print("verify", rec["verify"], flush=True)
        for w in a.workloads.split(","):
            try:
                t = time.perf_counter()
                RUN[w](p, "warm")  # warm-up, not counted
                rec[w + "_first_s"] = time.perf_counter() - t  # incl. any compile
                n0, rows = noise(), []
                while len(rows) < a.reps and (not rows or noise()["wall_s"] - n0["wall_s"] < a.budget):
                    rows.append(RUN[w](p, len(rows)))
                rec[w] = {k: summary([r[k] for r in rows]) for k in rows[0]}
                rec[w + "_noise"] = {k: round(v - n0[k], 2) for k, v in noise().items()}
                print(
                    w,
                    {k: (round(v["median"], 3), round(v["min"], 3), round(v["max"], 3)) for k, v in rec[w].items()},
                    rec[w + "_noise"],
                    flush=True,
                )
            except Exception as e:  # keep the other workloads
                rec[w + "_error"] = f"{type(e).__name__}: {e}"[:400]
                print(w, rec[w + "_error"], flush=True)
    rec["peak_rss_mib"] = peak_rss_mib()
    print(json.dumps(rec) if a.phase == "cold" else f"rss {rec['peak_rss_mib']:.0f} MiB, first token {cold_s:.2f} s")
    if a.out:
        with open(a.out, "a") as f:
            f.write(json.dumps(rec) + "\n")
    sys.stdout.flush()
    end_children()
    os._exit(0)  # some engines hang or crash in their destructors
