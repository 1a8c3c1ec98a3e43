"""python report.py results.jsonl -> Markdown tables (median [min-max]), and the first engine against the others."""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def f(x, d=0):
    return f"{x['median']:.{d}f} [{x['min']:.{d}f}-{x['max']:.{d}f}]" if x else "-"


rows = defaultdict(lambda: {"cold": [], "bench": None})
for line in Path(sys.argv[1]).read_text().splitlines():
    r = json.loads(line)
    k = (r["model"].split("-")[0], r["engine"], r["dtype"])
    if r["phase"] == "cold":
        rows[k]["cold"].append(r["first_token_s"])
        rows[k]["rss1"] = r["peak_rss_mib"]
    else:
        rows[k]["bench"] = r
for size in sorted({k[0] for k in rows}):
    print(f"\n## {size}\n")
    print(
        "| engine | dtype | W1 ms | W1 tok/s | W2 ITL ms | W2 tok/s | W3 out tok/s | "
        "W3 total tok/s | W4 s | W4c s | RSS MiB load/peak | first token s | ids |"
    )
    print("|" + "---|" * 13)
    for k, v in rows.items():
        b = v["bench"]
        if k[0] != size or not b:
            continue

        def g(w, m, b=b):
            return b.get(w, {}).get(m)

        ms = g("W1", "ttft_s")
        ms = ms and {q: ms[q] * 1e3 for q in ("median", "min", "max")}
        c = v["cold"] + [b["first_token_s"]]
        ver = b.get("verify")
        print(
            "|",
            " | ".join(
                [
                    k[1],
                    k[2],
                    f(ms),
                    f(g("W1", "prompt_tok_s")),
                    f(g("W2", "itl_ms"), 1),
                    f(g("W2", "tok_s"), 1),
                    f(g("W3", "out_tok_s")),
                    f(g("W3", "total_tok_s")),
                    f(g("W4", "s"), 2),
                    f(g("W4c", "s"), 2),
                    f"{v.get('rss1', 0):.0f}/{b['peak_rss_mib']:.0f}",
                    f"{c[0]:.1f}; {statistics.median(c[1:]) if c[1:] else 0:.1f}",
                    f"{sum(ver['agree'])}/{4 * ver['of']}" if ver else "-",
                ]
            ),
            "|",
        )
    # Medians of one engine over another's, turned so that above 1 the first engine is ahead.
    measured = [(k, v) for k, v in rows.items() if k[0] == size and v["bench"]]
    if len(measured) > 1:
        (first, own), others = measured[0], measured[1:]
        print(f"\n{first[1]} {first[2]} against the others, times faster:\n")
        print("| | W1 | W2 | W3 | W4 | W4c | peak memory, times less |\n|---|---|---|---|---|---|---|")
        for k, v in others:
            cells = []
            for load, metric, lower in (
                ("W1", "ttft_s", True),
                ("W2", "itl_ms", True),
                ("W3", "out_tok_s", False),
                ("W4", "s", True),
                ("W4c", "s", True),
            ):
                ours, theirs = (x["bench"].get(load, {}).get(metric) for x in (own, v))
                ratio = theirs["median"] / ours["median"] if ours and theirs else None
                cells.append("-" if ratio is None else f"{ratio if lower else 1 / ratio:.2f}")
            cells.append(f"{v['bench']['peak_rss_mib'] / own['bench']['peak_rss_mib']:.2f}")
            print("|", " | ".join([f"{k[1]} {k[2]}", *cells]), "|")
    for k, v in rows.items():
        b = v["bench"]
        if k[0] == size and b:
            bad = {
                w: n
                for w, n in b.items()
                if w.endswith("_noise") and (n["steal_s"] > 0.01 * n["wall_s"] or n["major_faults"] > 50)
            }
            err = {w: e for w, e in b.items() if w.endswith("_error")}
            if bad or err:
                print(f"\nnoise/errors {k[1]} {k[2]}: {bad or ''} {err or ''}")
