"""What the GPU kernel is made for: which cases it serves, how its pool lies in memory, how large its blocks are.

Pages are [pages, 2, K, B, H]: a head's keys in a page, and its values, are each one piece of memory, which the tensor
memory accelerator copies into tiles of 8 rows by 128 bytes, as the tensor cores read them. So head dims are padded to
a multiple of 64.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jax

from pallas_kernels.paged_attention.tpu_layout import Case, round_up

DTYPES = ("bfloat16", "float16")
HEAD_MULTIPLE = 64  # 128 bytes, the widest swizzle, of a 16-bit type
MAX_HEAD_DIM = 256
TILE_ROWS = 64  # rows of a WGMMA tile
ALIGNMENT = 8  # rows of a tile of shared memory
PAGE_SIZES = (8, 16, 32, 64, 128)  # whole tiles of 8 rows, and blocks of whole pages
MIN_JAX = (0, 12)  # of which Mosaic GPU's interface and its simulation are


def supports(case: Case) -> str | None:
    """None, or the reason why the kernel cannot serve the case."""
    if jax.__version_info__[:2] < MIN_JAX:
        return f"JAX {jax.__version__} is older than {'.'.join(map(str, MIN_JAX))}, whose Mosaic GPU the kernel needs"
    if case.dtype not in DTYPES:
        return f"dtype {case.dtype} is not one of {', '.join(DTYPES)}"
    if case.context > 1:
        return f"it gives no log-sum-exp, and the keys are spread over context={case.context} devices"
    if case.kv_dtype is not None:
        return f"it reads no keys and values of {case.kv_dtype}"
    if case.latent_dim is not None:
        return "keys that begin with their values (latent attention) need a kernel of their own, which there is not"
    if case.num_kv_heads < 1 or case.num_heads % case.num_kv_heads:
        return f"{case.num_heads} query heads are no multiple of {case.num_kv_heads} kv heads"
    if case.num_heads // case.num_kv_heads > TILE_ROWS:
        return (
            f"{case.num_heads // case.num_kv_heads} query heads of a kv head are more than {TILE_ROWS}, a tile's rows"
        )
    if not 1 <= case.head_dim <= MAX_HEAD_DIM:
        return f"head_dim {case.head_dim} is not in 1..{MAX_HEAD_DIM}"
    if case.page_size not in PAGE_SIZES:
        return f"page_size {case.page_size} is not one of {', '.join(map(str, PAGE_SIZES))}"
    if case.window is not None and case.window < 1:
        return f"window {case.window} is less than 1"
    return None


def pool_shape(case: Case, num_pages: int) -> tuple[int, int, int, int, int]:
    """[pages, 2, K, B, padded H], keys at [:, 0] and values at [:, 1]."""
    return (num_pages, 2, case.num_kv_heads, case.page_size, round_up(case.head_dim, HEAD_MULTIPLE))


@dataclass(frozen=True)
class Blocks:
    """Sizes the kernel works in.

    keys      keys of a block, of whole pages
    slots     blocks in shared memory: one in work, the others on their way
    programs  enough to fill the GPU: the keys of decodes are split until there are so many
    """

    keys: int
    slots: int
    programs: int


@functools.cache
def _tuned(chip: str) -> dict[str, int]:
    """The table of a chip ("h100", "h200"), or the conservative default's for one that nobody tuned."""
    folder = Path(__file__).parent / "tuned"
    path = folder / f"gpu_{chip}.json"
    return json.loads((path if path.exists() else folder / "gpu_default.json").read_text())["blocks"]


def chip_name() -> str:
    """This process's GPU, as its tuned table is called; "default" where there is none or another."""
    kind = jax.devices()[0].device_kind.lower()
    return next((chip for chip in ("h100", "h200") if chip in kind), "default")


def choose_blocks(case: Case, chip: str = "default") -> Blocks:
    """As many slots as leave room for two programs on a multiprocessor; for one, where two got a single slot."""
    table = _tuned(chip)
    keys = max(table["block_keys"], case.page_size)
    row_bytes = 2 * round_up(case.head_dim, HEAD_MULTIPLE)
    slot_bytes, other_bytes = 2 * keys * row_bytes, TILE_ROWS * (row_bytes + 2 * keys)  # and queries, and weights
    slots = 0
    for programs in (2, 1):
        slots = (table["shared_bytes"] // programs - other_bytes) // slot_bytes
        if slots >= 2:
            break
    return Blocks(keys, min(max(slots, 1), table["max_slots"]), table["programs"])
