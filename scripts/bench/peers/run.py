"""Run the whole matrix: per row, 3 cold starts and one bench process.

    python run.py --venvs DIR --models DIR --work DIR --out results.jsonl
                  [--size 135m] [--only substring] [--reps 3] [--threads 2]

Row "hf" runs with hf/bin/python in the directory of --venvs. Rows whose venv is
missing are skipped. stdlib only.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ALL = "W1,W2,W3,W4,W4c"
BATCH = "W3,W4,W4c"
# venv, peer file, dtype, environment, workloads
ROWS = [
    ("jaxinfer", "peer_jaxinfer", "fp32", {}, ALL),
    ("llamacpp", "peer_llamacpp", "fp32", {}, ALL),
    ("llamacpp", "peer_llamacpp", "bf16", {}, ALL),
    ("llamacpp", "peer_llamacpp", "q8_0", {}, ALL),
    ("vllm", "peer_vllm", "fp32", {}, ALL),
    ("vllm", "peer_vllm", "bf16", {}, ALL),
    ("hf", "peer_hf", "fp32", {}, ALL),
    ("hf", "peer_hf", "fp32", {"HF_BATCH": "8"}, "W3"),
]


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--venvs", required=True)
    ap.add_argument("--models", required=True)
    ap.add_argument("--work", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--size", default="135m")
    ap.add_argument("--only", default="", help="comma-separated substrings of a row's label")
    ap.add_argument("--reps", default="3")
    ap.add_argument("--budget", default="400")
    ap.add_argument("--threads", default="2")
    ap.add_argument("--colds", type=int, default=3)
    ap.add_argument("--timeout", type=float, default=1800)
    a = ap.parse_args()
    os.makedirs(a.work, exist_ok=True)
    for venv, peer, dtype, extra, loads in ROWS:
        label = " ".join([venv, dtype] + [f"{k}={v}" for k, v in extra.items()])
        if a.only and not any(s in label for s in a.only.split(",")):
            continue
        py = os.path.join(a.venvs, venv, "bin", "python")
        if not os.path.exists(py):
            print(f"== {label}: no venv, skipped", flush=True)
            continue
        # vLLM reads the checkpoint in the asked dtype; HF bf16 too
        md = "bf16" if dtype == "bf16" and venv in ("hf", "vllm") else "fp32"
        model = os.path.join(a.models, f"{a.size}-{md}")
        ref = os.path.join(a.models, f"reference-{a.size}.json")
        cache = os.path.join(a.work, "compile-cache")
        shutil.rmtree(cache, ignore_errors=True)  # first cold start: empty caches
        env = dict(
            os.environ,
            OMP_NUM_THREADS=a.threads,
            MKL_NUM_THREADS=a.threads,
            VLLM_CACHE_ROOT=os.path.join(cache, "vllm"),
            TORCHINDUCTOR_CACHE_DIR=os.path.join(cache, "inductor"),
            PEERS_TAG=label,
            PYTHONDONTWRITEBYTECODE="1",
            **extra,
        )
        base = [
            py,
            os.path.join(HERE, peer + ".py"),
            "--model",
            model,
            "--dtype",
            dtype,
            "--threads",
            a.threads,
            "--work",
            a.work,
        ]
        print(f"== {label} {time.strftime('%H:%M:%S')}", flush=True)
        conv = os.path.join(a.work, f".converted-{a.size}-{peer}-{dtype}")
        todo = [] if os.path.exists(conv) else [["--phase", "convert"]]
        todo += [["--phase", "cold", "--out", a.out]] * a.colds
        bench = ["--phase", "bench", "--out", a.out, "--workloads", loads, "--reps", a.reps, "--budget", a.budget]
        todo += [bench + (["--reference", ref] if os.path.exists(ref) else [])]
        for args in todo:
            try:
                r = subprocess.run(
                    base + args, env=env, timeout=a.timeout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            except subprocess.TimeoutExpired:
                print(f"   {args[1]}: over {a.timeout:.0f} s, ended", flush=True)
                break
            if r.returncode:
                print(f"   {args[1]} failed:\n" + r.stdout[-1500:], flush=True)
                break
            if args[1] == "convert":
                open(conv, "w").close()
            if args[1] == "bench":
                for line in r.stdout.splitlines():
                    if line.startswith(("verify", "W", "rss")) and "WARN" not in line:
                        print("   " + line[:400], flush=True)


if __name__ == "__main__":
    sys.exit(main())
