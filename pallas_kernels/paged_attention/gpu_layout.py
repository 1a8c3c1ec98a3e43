"""What the GPU kernel is made for: which cases it serves, how its pool lies in memory, how large its blocks are.

Pages are [pages, 2, K, B, H]: a head's keys in a page, and its values, are each one piece of memory, which the tensor
memory accelerator copies into tiles of 8 rows by 128 bytes, as the tensor cores read them. So head dims are padded to
a multiple of 64. Keys that begin with their values (latent attention) have pages [pages, 1, K, B, H].

Of a quantized pool the scales are [pages, 2 or 1, K, B]: a head's in a page are one piece of memory too.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import jax

from pallas_kernels import mosaic_gpu
from pallas_kernels.paged_attention.quantized import LARGEST
from pallas_kernels.paged_attention.tpu_layout import Case, round_up

DTYPES = ("bfloat16", "float16")
KV_DTYPES = tuple(LARGEST)
HEAD_MULTIPLE = 64  # 128 bytes, the widest swizzle, of a 16-bit type
MAX_HEAD_DIM = 256
MAX_LATENT_HEAD_DIM, MAX_LATENT_DIM = 576, 512  # of keys that begin with their values: DeepSeek's
TILE_ROWS = 64  # rows of a WGMMA tile
TURNS_ROWS = 128  # of the two tiles that take turns (gpu_chunks.py)
WRITTEN_TOKENS = 16  # that gpu_chunks.py writes into their pages at a time
ALIGNMENT = 8  # rows of a tile of shared memory
SHARED_BYTES = 231424  # of a program: Hopper's 227 KiB, less a KiB for barriers
PAGE_SIZES = (8, 16, 32, 64, 128)  # whole tiles of 8 rows, and blocks of whole pages


def supports(case: Case) -> str | None:
    """None, or the reason why the kernel cannot serve the case."""
    if (reason := mosaic_gpu.refusal()) is not None:
        return reason
    if case.dtype not in DTYPES:
        return f"dtype {case.dtype} is not one of {', '.join(DTYPES)}"
    if case.kv_dtype is not None and case.kv_dtype not in KV_DTYPES:
        return f"kv_dtype {case.kv_dtype} is not one of {', '.join(KV_DTYPES)}"
    if case.num_kv_heads < 1 or case.num_heads % case.num_kv_heads:
        return f"{case.num_heads} query heads are no multiple of {case.num_kv_heads} kv heads"
    most_dim = MAX_HEAD_DIM if case.latent_dim is None else MAX_LATENT_HEAD_DIM
    if not 1 <= case.head_dim <= most_dim:
        return f"head_dim {case.head_dim} is not in 1..{most_dim}"
    if case.latent_dim is not None:
        most_dim = min(case.head_dim, MAX_LATENT_DIM)
        if not 1 <= case.latent_dim <= most_dim:
            return f"latent_dim {case.latent_dim} is not in 1..{most_dim}"
        if case.num_kv_heads > 1:
            return f"latent_dim {case.latent_dim} with {case.num_kv_heads} kv heads, where all heads share one latent"
    if case.page_size not in PAGE_SIZES:
        return f"page_size {case.page_size} is not one of {', '.join(map(str, PAGE_SIZES))}"
    needed = shared_bytes(case, Blocks(max(_tuned("default")["block_keys"], case.page_size), 1, 0))
    if needed > SHARED_BYTES:
        return f"page_size {case.page_size} needs {needed} bytes of shared memory, more than {SHARED_BYTES}"
    if case.window is not None and case.window < 1:
        return f"window {case.window} is less than 1"
    return None


def takes_turns(case: Case) -> bool:
    """Whether chunks are for gpu_chunks.py, where two warpgroups take turns at the tensor cores. The others' are for
    the kernel that decodes have too: pools of 8 bits, since the warpgroups would have to widen each block together;
    latents, whose values fill two warpgroups' registers for 64 rows; keys that devices share, whose positions are not
    next to each other; and a scale that is not above 0, with which the largest product is not the largest logit."""
    return case.kv_dtype is None and case.latent_dim is None and case.context == 1 and case.scale > 0


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from a case, in elements.

    kinds        what the pool holds of a token and head: key and value, or a key that begins with its value
    lanes        of a key, padded
    value_lanes  of a value, padded
    group        query heads of a tile: those of a kv head, or a part of them where they are more than a tile's rows
    parts        so many tiles' heads are a kv head's
    warpgroups   that share a tile: the values that one mixes have to fit its registers
    chunk_rows   of a tile of a chunk
    """

    kinds: int
    lanes: int
    value_lanes: int
    group: int
    parts: int
    warpgroups: int
    chunk_rows: int

    @classmethod
    def of(cls, case: Case) -> Layout:
        value_dim = case.latent_dim or case.head_dim
        warpgroups = 1 if value_dim <= MAX_HEAD_DIM else 2
        value_lanes = round_up(value_dim, HEAD_MULTIPLE * warpgroups)
        heads = case.num_heads // case.num_kv_heads
        group = next(size for size in range(min(heads, TILE_ROWS), 0, -1) if heads % size == 0)
        return cls(
            kinds=2 if case.latent_dim is None else 1,
            lanes=max(round_up(case.head_dim, HEAD_MULTIPLE), value_lanes),
            value_lanes=value_lanes,
            group=group,
            parts=heads // group,
            warpgroups=warpgroups,
            chunk_rows=TURNS_ROWS if takes_turns(case) else TILE_ROWS,
        )

    @property
    def tile_tokens(self) -> int:
        """Tokens of a chunk that are a tile."""
        return self.chunk_rows // self.group


def pool_shape(case: Case, num_pages: int) -> tuple[int, int, int, int, int]:
    """[pages, 2, K, B, padded H], keys at [:, 0] and values at [:, 1]; of a case with a latent_dim [pages, 1, ...]."""
    layout = Layout.of(case)
    return (num_pages, layout.kinds, case.num_kv_heads, case.page_size, layout.lanes)


def scales_shape(case: Case, num_pages: int) -> tuple[int, int, int, int]:
    """[pages, 2 or 1, K, B], of a quantized pool."""
    return pool_shape(case, num_pages)[:-1]


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


@dataclass(frozen=True)
class ChunkBlocks:
    """Sizes that gpu_chunks.py works in: keys of a block, and how many blocks shared memory holds."""

    keys: int
    slots: int


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
    sizes = [Blocks(keys, slots, table["programs"]) for slots in range(table["max_slots"], 0, -1)]
    for least, programs in ((2, 2), (1, 1)):
        for blocks in sizes:
            if blocks.slots >= least and shared_bytes(case, blocks) <= table["shared_bytes"] // programs:
                return blocks
    return sizes[-1]


def choose_chunk_blocks(case: Case, chip: str = "default") -> ChunkBlocks:
    """As many slots as there is room for."""
    table = _tuned(chip)
    keys = table["chunk_keys" if Layout.of(case).lanes <= 128 else "chunk_keys_above_128_lanes"]
    sizes = [ChunkBlocks(keys, slots) for slots in range(table["max_slots"], 0, -1)]
    return next(blocks for blocks in sizes if chunk_shared_bytes(case, blocks) <= table["shared_bytes"])


def chunk_shared_bytes(case: Case, blocks: ChunkBlocks) -> int:
    """Shared memory of gpu_chunks.py's buffers, each in whole KiB."""
    layout = Layout.of(case)
    stage = layout.kinds * min(WRITTEN_TOKENS, layout.tile_tokens)
    rows = TURNS_ROWS, blocks.slots * layout.kinds * blocks.keys, stage
    return sum(round_up(2 * count * layout.lanes, 1024) for count in rows) + 1024


def shared_bytes(case: Case, blocks: Blocks) -> int:
    """Shared memory of the kernel's buffers (gpu_kernel.Kernel.scratch), each in whole KiB."""
    layout, wide = Layout.of(case), 2 if case.kv_dtype is None else 1
    keys = layout.kinds * blocks.keys
    sizes = [2 * TILE_ROWS * layout.lanes, blocks.slots * keys * layout.lanes * wide, 2 * TILE_ROWS * blocks.keys, 1024]
    if case.kv_dtype is not None:
        sizes += [4 * blocks.slots * keys, 2 * blocks.keys * layout.lanes]
    return sum(round_up(size, 1024) for size in sizes)
