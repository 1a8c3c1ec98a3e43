"""Loading: every parameter, on every layout and dtype, equals the stored tensor; memory stays near the parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint.load import load_params, splits_into
from jaxinfer.checkpoint.reader import CheckpointReader
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
from jaxinfer.sharding.rules import param_shardings
from tests.sharding.run_on_devices import run_on_devices

N, K, H, D, F, V, E = 4, 2, 3, 8, 12, 20, 4


def tiny(dtype: Any = np.float32) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any], dict[str, Source]]:
    """A one-layer checkpoint: fused, transposed and stacked tensors, and experts': tensors, abstract, axes, sources."""
    import jax

    rng = np.random.default_rng(0)
    stored = {
        "model.embed.weight": (V, D),
        "model.qkv.weight": ((N + 2 * K) * H, D),
        "model.o.weight": (D, N * H),
        "model.up.weight": (D, F),
        "model.down.weight": (D, F),
        "model.norm.weight": (D,),
        "model.heads.weight": (2 * N * H, D),
        **{f"model.experts.{index}.weight": (D, F) for index in range(E)},
        "model.gate_up.weight": (E, D, 2 * F),
        "model.gate_up.bias": (E, 2 * F),
    }
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in stored.items()}
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)  # noqa: E731
    abstract = {
        "embed": {"weight": shape(V, D)},
        "attention": {
            "q": {"weight": shape(N, H, D)},
            "k": {"weight": shape(K, H, D)},
            "v": {"weight": shape(K, H, D)},
            "o": {"weight": shape(D, N, H)},
        },
        "mlp": {"up": {"weight": shape(F, D)}, "down": {"weight": shape(D, F)}},
        "norm": {"weight": shape(D)},
        "first": {"weight": shape(N, H, D)},
        "second": {"weight": shape(N, H, D)},
        "experts": {"down": shape(E, F, D), "up": shape(E, D, F), "bias": shape(E, F)},
    }
    axes = {
        "embed": {"weight": ("vocab", "embed")},
        "attention": {
            "q": {"weight": ("q_heads", "head_dim", "embed")},
            "k": {"weight": ("kv_heads", "head_dim", "embed")},
            "v": {"weight": ("kv_heads", "head_dim", "embed")},
            "o": {"weight": ("embed", "q_heads", "head_dim")},
        },
        "mlp": {"up": {"weight": ("ffn", "embed")}, "down": {"weight": ("embed", "ffn")}},
        "norm": {"weight": ("embed",)},
        "first": {"weight": ("q_heads", "head_dim", "embed")},
        "second": {"weight": ("q_heads", "head_dim", "embed")},
        "experts": {"down": ("experts", "ffn", "embed"), "up": ("experts", "embed", "ffn"), "bias": ("experts", "ffn")},
    }
    sources = {
        "embed/weight": Source("embed.weight"),
        "attention/q/weight": Source("qkv.weight", rows=(0, N * H)),
        "attention/k/weight": Source("qkv.weight", rows=(N * H, (N + K) * H)),
        "attention/v/weight": Source("qkv.weight", rows=((N + K) * H, (N + 2 * K) * H)),
        "attention/o/weight": Source("o.weight"),
        "mlp/up/weight": Source("up.weight", transpose=True),
        "mlp/down/weight": Source("down.weight"),
        "norm/weight": Source("norm.weight"),
        "first/weight": Source("heads.weight", head_rows=(0, H)),
        "second/weight": Source("heads.weight", head_rows=(H, 2 * H)),
        "experts/down": Source("experts.*.weight", transpose=True, stacked=True),
        "experts/up": Source("gate_up.weight", every=(1, 2), stacked=True),
        "experts/bias": Source("gate_up.bias", every=(1, 2), stacked=True),
    }
    return tensors, abstract, axes, sources


def expected(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    q, k, v = np.split(tensors["model.qkv.weight"], [N * H, (N + K) * H])
    return {
        "embed/weight": tensors["model.embed.weight"],
        "attention/q/weight": q.reshape(N, H, D),
        "attention/k/weight": k.reshape(K, H, D),
        "attention/v/weight": v.reshape(K, H, D),
        "attention/o/weight": tensors["model.o.weight"].reshape(D, N, H),
        "mlp/up/weight": tensors["model.up.weight"].T,
        "mlp/down/weight": tensors["model.down.weight"],
        "norm/weight": tensors["model.norm.weight"],
        "first/weight": tensors["model.heads.weight"].reshape(N, 2, H, D)[:, 0],
        "second/weight": tensors["model.heads.weight"].reshape(N, 2, H, D)[:, 1],
        "experts/down": np.stack([tensors[f"model.experts.{index}.weight"].T for index in range(E)]),
        "experts/up": tensors["model.gate_up.weight"][:, :, 1::2],
        "experts/bias": tensors["model.gate_up.bias"][:, 1::2],
    }


def flat(params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in params.items():
        out |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return out


NO_CONFIG = ModelConfig("test", V, D, 16, ())


def family_of(sources: dict[str, Source], ignored: tuple[str, ...] = ()) -> Family:
    """A family whose checkpoints write "model." before every name."""
    return Family((), lambda _: NO_CONFIG, lambda _: sources, aliases=(("", "model."),), ignored=ignored)


def load(directory: Path, ignored: tuple[str, ...] = (), wanted: Any = np.float32, mesh: Any = None) -> dict[str, Any]:
    import jax

    _, abstract, axes, sources = tiny()
    abstract = jax.tree.map(lambda leaf: leaf.update(dtype=wanted), abstract)
    shardings = None if mesh is None else param_shardings(abstract, axes, mesh)
    with CheckpointReader(directory) as reader:
        return flat(load_params(reader, abstract, family_of(sources, ignored), NO_CONFIG, shardings))


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16])
def test_single_device(tmp_path: Path, stored: Any, wanted: Any) -> None:
    tensors, *_ = tiny(stored)
    save_file(tensors, tmp_path / "model.safetensors")
    params = load(tmp_path, wanted=wanted)
    assert set(params) == set(expected(tensors))
    for path, value in expected(tensors).items():
        want = value.astype(wanted)
        assert params[path].dtype == want.dtype
        np.testing.assert_array_equal(np.asarray(params[path]), want, err_msg=path)


def test_parameters_can_be_donated(tmp_path: Path) -> None:
    """Buffers taken over from the host are ordinary arrays: donating one leaves the others as they were."""
    import jax

    tensors, *_ = tiny()
    save_file(tensors, tmp_path / "model.safetensors")
    params = load(tmp_path)
    doubled = jax.jit(lambda w: w * 2, donate_argnums=0)(params["embed/weight"])
    np.testing.assert_array_equal(doubled, tensors["model.embed.weight"] * 2)
    np.testing.assert_array_equal(params["norm/weight"], tensors["model.norm.weight"])


SHARDED = """
import jax, ml_dtypes, numpy as np
from pathlib import Path
from tests.checkpoint.test_checkpoint_load import expected, flat, load, tiny
from jaxinfer.sharding.mesh import make_mesh
tensors = tiny(ml_dtypes.bfloat16)[0]
for spec in ("tensor=2", "fsdp=4", "tensor=2,fsdp=2", "tensor=4", "data=2,tensor=2,fsdp=2", "data=8",
             "expert=4", "expert=2,tensor=2,fsdp=2", None):
    mesh = make_mesh(spec)
    for path, value in expected(tensors).items():
        got = load(Path({directory!r}), mesh=mesh)[path]
        np.testing.assert_array_equal(np.asarray(got), value.astype(np.float32), err_msg=f"{{spec}} {{path}}")
        for shard in got.addressable_shards:
            np.testing.assert_array_equal(shard.data, value.astype(np.float32)[shard.index])
    embed = load(Path({directory!r}), mesh=mesh)["embed/weight"]
    ways = mesh.shape["tensor"] * mesh.shape["fsdp"]
    assert {{shard.data.size for shard in embed.addressable_shards}} == {{embed.size // ways}}, spec
print("every layout agrees")
"""


def test_every_layout_on_eight_devices(tmp_path: Path) -> None:
    """Each device holds exactly its slice, rows and columns alike, whatever the mesh."""
    tensors, *_ = tiny(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert "every layout agrees" in run_on_devices(SHARDED.format(directory=str(tmp_path)), 8)


MEMORY = """
import jax, numpy as np
from jaxinfer.checkpoint.load import load_params
from jaxinfer.checkpoint.reader import CheckpointReader
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.families.base import Family, Source
def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024
jax.block_until_ready(jax.device_put(np.zeros(8)))
with CheckpointReader({directory!r}) as reader:
    shapes = {{name: info.shape for name, info in reader.tensors.items()}}
    if {stacked}:
        shapes = {{"w0.*": (6, *shapes["w0.0"][::-1]), "w1.*": (6, *shapes["w1.0"][::-1])}}
    abstract = {{name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}}
    before = memory("VmRSS")
    sources = {{name: Source(name, transpose={stacked}, stacked={stacked}) for name in abstract}}
    config = ModelConfig("test", 1, 1, 1, ())
    family = Family((), lambda _: config, lambda _: sources)
    params = load_params(reader, abstract, family, config)
    peak = memory("VmHWM") - before
    total = sum(array.nbytes for array in params.values())
print(peak / total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(
    ("stored", "stacked"),
    [(np.float32, False), (ml_dtypes.bfloat16, False), (ml_dtypes.bfloat16, True)],
    ids=["float32", "bfloat16", "experts"],
)
def test_peak_memory_stays_near_the_parameters(tmp_path: Path, stored: Any, stacked: bool) -> None:
    """200 MB of float32 parameters: the process grows by little more than that, whatever is stored and how."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal((4096, 1024), np.float32).astype(stored)
    for shard in range(2):
        save_file({f"w{shard}.{i}": block for i in range(6)}, tmp_path / f"model-{shard}.safetensors")
    assert 0.9 < float(run_on_devices(MEMORY.format(directory=str(tmp_path), stacked=stacked))) < 1.15


def change(name: str, value: np.ndarray | None) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("model.norm.weight", None), r"lacks 1 of the 13 tensors of this model: 'norm\.weight'"),
        (change("model.extra", np.zeros(2, np.float32)), r"1 tensors this model has no place for: 'model\.extra'"),
        (change("model.down.weight", np.zeros((F, D), np.float32)), r"\[12, 8\], which does not fill mlp/down/weight"),
        (change("model.norm.weight", np.zeros(D + 1, np.float32)), r"\[9\], which does not fill norm/weight .*\[8\]"),
        (change("model.qkv.weight", np.zeros((N * H, D), np.float32)), r"\[12, 8\], which does not fill attention/k"),
        (change("model.qkv.weight", np.zeros((99, D), np.float32)), r"has 99 rows and the model uses 24"),
        (change("model.heads.weight", np.zeros((23, D), np.float32)), r"\[23, 8\], which does not fill first/weight"),
        (change("model.heads.weight", np.zeros((36, D), np.float32)), r"has 36 rows and the model uses 24"),
        (change("model.norm.weight", np.zeros((), np.float32)), r"\[\], which does not fill norm/weight"),
        (
            change("model.experts.2.weight", None),
            r"lacks 1 of the 13 tensors of this model: 'model\.experts\.2\.weight'",
        ),
        (change("model.experts.4.weight", np.zeros(2, np.float32)), r"no place for: 'model\.experts\.4\.weight'"),
        (
            change("model.experts.2.weight", np.zeros((F, D), np.float32)),
            r"\[12, 8\], which does not fill experts/down",
        ),
        (change("model.gate_up.bias", np.zeros((E + 1, 2 * F), np.float32)), r"\[5, 24\], which does not fill .*bias"),
        (change("model.gate_up.bias", np.zeros((E, 2 * F + 1), np.float32)), r"\[4, 25\], which does not fill .*bias"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, edit: Callable[..., None], message: str) -> None:
    tensors, *_ = tiny()
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_ignored_tensors(tmp_path: Path) -> None:
    tensors, *_ = tiny()
    extra = {"vision.tower": np.zeros(2, np.float32), "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert len(load(tmp_path, ignored=("vision.*", "*.inv_freq"))) == 13
    with pytest.raises(ValueError, match=r"no place for: 'vision\.tower'"):
        load(tmp_path, ignored=("*.inv_freq",))


@pytest.mark.parametrize(
    ("stored", "shape", "fits"),
    [
        ((12, 8), (4, 3, 8), True),
        ((8, 12), (8, 4, 3), True),
        ((8,), (8,), True),
        ((), (1,), True),
        ((1,), (), True),
        ((5, 1), (5,), True),
        ((12, 8), (8, 12), False),
        ((12, 8), (3, 4, 7), False),
        ((12, 8), (96,), False),
        ((12,), (4, 3, 1), True),
        ((6, 2), (4, 3), False),
    ],
)
def test_splits_into(stored: tuple[int, ...], shape: tuple[int, ...], fits: bool) -> None:
    assert splits_into(stored, shape) is fits


def packed(blocks: tuple[int, ...], scales: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "w_blocks": rng.integers(0, 256, blocks, np.uint8),
        "w_scales": rng.integers(120, 132, scales, np.uint8),
    }


def load_packed(directory: Path, **fields: Any) -> np.ndarray:
    import jax

    abstract = {"w": jax.ShapeDtypeStruct((E, 64, 6), np.float32)}
    sources = {"w": Source("w", stacked=True, **fields)}
    family = Family((), lambda _: NO_CONFIG, lambda _: sources)
    with CheckpointReader(directory) as reader:
        return np.asarray(load_params(reader, abstract, family, NO_CONFIG)["w"])


def test_packed_numbers(tmp_path: Path) -> None:
    """MXFP4, number by number: sign, exponent of two bits, one bit of mantissa, low half of a byte first."""
    tensors = packed((E, 12, 2, 16), (E, 12, 2))
    save_file(tensors, tmp_path / "model.safetensors")
    want = np.zeros((E, 12, 64))
    for place in np.ndindex(want.shape):
        expert, row, column = place
        byte = int(tensors["w_blocks"][expert, row, column // 32, column % 32 // 2])
        number = byte >> 4 if column % 2 else byte & 15
        exponent, half = number >> 1 & 3, number & 1
        size = half / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + half / 2)
        scale = 2.0 ** (int(tensors["w_scales"][expert, row, column // 32]) - 127)
        want[place] = (-size if number & 8 else size) * scale
    np.testing.assert_array_equal(load_packed(tmp_path, every=(1, 2)), want[:, 1::2].swapaxes(1, 2))


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ((E, 6, 2, 16), (E, 6, 1), "are not MXFP4 blocks of 16 bytes and their scales"),
        ((E, 6, 4, 8), (E, 6, 4), "are not MXFP4 blocks of 16 bytes"),
        ((E, 6, 1, 16), (E, 6, 1), r"\[4, 6, 1, 16\], which does not fill w"),
        ((E - 1, 6, 2, 16), (E - 1, 6, 2), r"\[3, 6, 2, 16\], which does not fill w"),
    ],
)
def test_packed_tensors_that_do_not_fit(
    tmp_path: Path, blocks: tuple[int, ...], scales: tuple[int, ...], message: str
) -> None:
    save_file(packed(blocks, scales), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_packed(tmp_path)
