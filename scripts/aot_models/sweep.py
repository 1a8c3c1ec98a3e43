"""The same models on slices of 8 to 256 devices: what each device keeps and is sent, as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compiled import Case, Found

_SLICES = {8: "v6e:2x4", 16: "v6e:4x4", 32: "v6e:4x8", 64: "v6e:8x8", 128: "v6e:8x16", 256: "v6e:16x16"}
_HBM = 32 * 2**30  # of one device of v6e

# A mesh of n devices for each model, and how many of its axis' parts there are when n is 8.
_MESHES = {
    "Llama 3.1 405B": ("fsdp={},tensor=8", 8),
    "Qwen3 235B A22B": ("expert={},tensor=4", 4),
}

CASES = tuple(
    Case(model, name, mesh.format(devices // ways))
    for model, (mesh, ways) in _MESHES.items()
    for devices, name in _SLICES.items()
)


def draw(results: Sequence[tuple[Case, Found]], path: Path) -> None:
    """Two panels: GiB of weights and scratch on a device, and MiB that collectives give it in the layers of a step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (memory, moved) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, model in enumerate(dict.fromkeys(case.model for case, _ in results)):
        own = [(case, found) for case, found in results if case.model == model]
        devices = [found.devices for _, found in own]
        label = f"{model}, {_MESHES[model][0].format('n/' + str(_MESHES[model][1]))}"
        color = f"C{number}"
        memory.plot(devices, [(f.weights + f.scratch) / 2**30 for _, f in own], "o-", color=color, label=label)
        memory.plot(devices, [f.weights_by_hand / 2**30 for _, f in own], "--", color=color)
        moved.plot(devices, [f.moved_in_layers / 2**20 for _, f in own], "o-", color=color, label=label)
        moved.plot(devices, [f.moved_by_hand / 2**20 for _, f in own], "--", color=color)
    memory.axhline(_HBM / 2**30, color="black", linewidth=0.8)
    memory.annotate("a v6e's memory", (devices[-1], _HBM / 2**30), (0, 4), textcoords="offset points", ha="right")
    memory.set_title("a device's weights and scratch (dashed: weights by hand)", fontsize="medium")
    memory.set_ylabel("GiB")
    moved.set_title("what a decode's collectives give a device (dashed: by hand)", fontsize="medium")
    moved.set_ylabel("MiB")
    for axes in (memory, moved):
        axes.set_xlabel("devices")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(devices, [str(count) for count in devices])
        axes.grid(alpha=0.3)
    memory.legend(loc="lower left", fontsize="small")
    figure.savefig(path)
