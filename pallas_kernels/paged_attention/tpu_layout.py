"""What the TPU kernel is made for: which cases it serves, how its pool lies in memory, how large its blocks are.

A TPU keeps the last two axes of an array in tiles of 128 lanes by 8 sublanes (16 rows of a 16-bit type), and copies
whole tiles. So a page holds, head by head, a matrix with a token in each row, its key and value side by side:
[pages, K, B, W]. A page is one piece of memory and each head's share of it goes to the matrix unit as it is. Where the
head dim fills half a tile or less, or 192 lanes, the value begins in the tile where the key ends, and costs no padding.
In latent attention the key begins with its value, and there is nothing beside it.

Scales of quantized keys and values are kept by the tile, the smallest piece of a page that is written: of its 32 tokens
there are 32 lanes for each head's keys, then 32 for its values, head by head through rows of 128: [pages, B / 32, R,
128]. So a page's scales are one piece of memory too, without padding but in the last row, and no two writes meet in it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pallas_kernels.paged_attention.quantized import LARGEST

LANES = 128
SUBLANES = 8
ITEMSIZE = {"float32": 4, "bfloat16": 2}
KV_DTYPES = tuple(LARGEST)
PIECE = 32  # tokens, and so lanes, whose scales lie together: a tile of 8-bit numbers
PIECES = LANES // PIECE
MAX_HEAD_DIM = 256
MAX_LATENT_HEAD_DIM = 640  # of keys that begin with their values; DeepSeek's have 576 numbers
MAX_TILE_TOKENS = 128
MIN_BLOCK_KEYS, MAX_BLOCK_KEYS = 128, 1024
# Tiles in flight while a chunk's keys and values are written, by the kinds of scales: as many bytes. Of latents half:
# their one head is padded to eight where it comes from.
WRITE_DEPTH = {0: 8, 1: 2, 2: 4}
_HEADROOM = 0.5  # part of the scratch memory left to the compiler's own temporaries


class Case(Protocol):
    """What is static about one kind of layer's attention; jaxinfer's AttentionCase has these fields."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def window(self) -> int | None: ...
    @property
    def soft_cap(self) -> float | None: ...
    @property
    def scale(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def has_sinks(self) -> bool: ...
    @property
    def latent_dim(self) -> int | None: ...
    @property
    def context(self) -> int: ...
    @property
    def kv_dtype(self) -> str | None: ...


def supports(case: Case) -> str | None:
    """None, or the reason why the kernel cannot serve the case."""
    if case.dtype not in ITEMSIZE:
        return f"dtype {case.dtype} is not one of {', '.join(ITEMSIZE)}"
    if case.kv_dtype is not None and case.kv_dtype not in KV_DTYPES:
        return f"kv_dtype {case.kv_dtype} is not one of {', '.join(KV_DTYPES)}"
    if case.num_kv_heads < 1 or case.num_heads % case.num_kv_heads:
        return f"{case.num_heads} query heads are no multiple of {case.num_kv_heads} kv heads"
    most_dim = MAX_HEAD_DIM if case.latent_dim is None else MAX_LATENT_HEAD_DIM
    if not 1 <= case.head_dim <= most_dim:
        return f"head_dim {case.head_dim} is not in 1..{most_dim}"
    if case.latent_dim is not None and not 1 <= case.latent_dim <= case.head_dim:
        return f"latent_dim {case.latent_dim} is not in 1..{case.head_dim}, the head_dim"
    rows = Layout.of(case).rows
    if case.page_size < 1 or case.page_size % rows:
        held = case.kv_dtype or case.dtype
        return f"page_size {case.page_size} is no multiple of {rows}, the rows of a tile of {held}"
    if case.window is not None and case.window < 1:
        return f"window {case.window} is less than 1"
    needed, most = _vmem_bytes(case, _SMALLEST), int(tuned("default").vmem_limit_bytes * _HEADROOM)
    if needed > most:
        return f"one page of {case.num_kv_heads} kv heads needs {needed} bytes of scratch memory, more than {most}"
    return None


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from a case, in elements.

    rows         tokens of one tile: the smallest piece of a page that can be copied
    width        lanes of one token and head, key and value; the key begins at lane 0, the value at value_start
    key_lanes    lanes from 0 that hold the key, up to the tile's end (queries are zero beyond the head dim)
    value_first, value_lanes  the tiles that hold the value
    out_lanes    lanes of one token and head of what comes out: where devices share the keys, a tile more than a value
    heads, kv_heads           padded to whole tiles of 32-bit numbers
    group        query heads of a kv head, padded to whole tiles
    kinds        scales of a token and head: its key's and its value's, or one for both; 0: there are none
    scale_rows   rows of a tile's scales
    write_depth  tiles in flight while a chunk's keys and values are written
    itemsize, kv_itemsize     bytes of a number of a query, and of one in the pool
    """

    rows: int
    width: int
    key_lanes: int
    value_start: int
    value_first: int
    value_lanes: int
    out_lanes: int
    heads: int
    kv_heads: int
    group: int
    kinds: int
    scale_rows: int
    write_depth: int
    itemsize: int
    kv_itemsize: int

    @classmethod
    def of(cls, case: Case) -> Layout:
        itemsize = ITEMSIZE[case.dtype]
        key_lanes = round_up(case.head_dim, LANES)
        shares_tile = round_up(2 * case.head_dim, LANES) < 2 * key_lanes
        value_start = case.head_dim if shares_tile else key_lanes
        width = round_up(value_start + case.head_dim, LANES)
        value_first = value_start // LANES * LANES
        value_lanes = width - value_first
        if case.latent_dim is not None:
            value_start, value_first, width, value_lanes = 0, 0, key_lanes, round_up(case.latent_dim, LANES)
        kinds = 0 if case.kv_dtype is None else 1 if case.latent_dim is not None else 2
        kv_itemsize = itemsize if case.kv_dtype is None else 1
        return cls(
            rows=SUBLANES * 4 // kv_itemsize,
            width=width,
            key_lanes=key_lanes,
            value_start=value_start,
            value_first=value_first,
            value_lanes=value_lanes,
            out_lanes=value_lanes + (LANES if case.context > 1 else 0),
            heads=round_up(case.num_heads, SUBLANES),
            kv_heads=round_up(case.num_kv_heads, SUBLANES),
            group=round_up(case.num_heads // case.num_kv_heads, SUBLANES * 4 // itemsize),
            kinds=kinds,
            scale_rows=-(-kinds * case.num_kv_heads // PIECES),
            write_depth=WRITE_DEPTH[kinds],
            itemsize=itemsize,
            kv_itemsize=kv_itemsize,
        )


def pool_shape(case: Case, num_pages: int) -> tuple[int, int, int, int]:
    """[pages, K, B, W]; see Layout for W."""
    return (num_pages, case.num_kv_heads, case.page_size, Layout.of(case).width)


def scales_shape(case: Case, num_pages: int) -> tuple[int, int, int, int]:
    """[pages, B / 32, R, 128], of a quantized pool."""
    return (num_pages, case.page_size // PIECE, Layout.of(case).scale_rows, LANES)


@dataclass(frozen=True)
class Blocks:
    """Sizes the kernel works in.

    pages        pages of one block of keys
    slots        blocks in scratch memory: one in work, the others on their way
    tile_tokens  queries of a chunk taken together; a power of two
    vmem_limit_bytes  scratch memory the compiler may use
    """

    pages: int
    slots: int
    tile_tokens: int
    vmem_limit_bytes: int


@dataclass(frozen=True)
class Tuned:
    """A chip's file. block_bytes: of a block of keys and values; tile_rows: queries of a tile times a group's heads."""

    block_bytes: int
    slots: int
    tile_rows: int
    vmem_limit_bytes: int


_SMALLEST = Blocks(pages=1, slots=2, tile_tokens=SUBLANES, vmem_limit_bytes=0)


@functools.cache
def tuned(chip: str) -> Tuned:
    """The table of a chip ("v5e", "v5p", "v6e", "7x", ...), or the conservative default's for one that has none."""
    folder = Path(__file__).parent / "tuned"
    path = folder / f"tpu_{chip}.json"
    table = json.loads((path if path.exists() else folder / "tpu_default.json").read_text())
    return Tuned(**table["blocks"])


def choose_blocks(case: Case, num_tokens: int, table_width: int, chip: str = "default") -> Blocks:
    """Blocks for a step of num_tokens tokens and tables of table_width pages, that fit the scratch memory."""
    table, layout = tuned(chip), Layout.of(case)
    token_bytes = case.num_kv_heads * layout.width * layout.kv_itemsize
    keys = min(max(table.block_bytes // token_bytes, MIN_BLOCK_KEYS), MAX_BLOCK_KEYS)
    tile = max(table.tile_rows * case.num_kv_heads // case.num_heads, SUBLANES)
    tile = min(_power_of_two(tile), MAX_TILE_TOKENS)
    if num_tokens == 1:
        tile = 1
    while tile > SUBLANES and tile // 2 >= num_tokens:
        tile //= 2
    pages = min(_power_of_two(max(keys // case.page_size, 1)), table_width)
    blocks = Blocks(pages, table.slots, tile, table.vmem_limit_bytes)
    most = int(table.vmem_limit_bytes * _HEADROOM)
    while _vmem_bytes(case, blocks) > most:
        if blocks.pages * case.page_size > MIN_BLOCK_KEYS:
            pages = blocks.pages // 2
        elif blocks.tile_tokens > SUBLANES:
            tile = blocks.tile_tokens // 2
        elif blocks.slots > 2:
            blocks = Blocks(pages, 2, tile, table.vmem_limit_bytes)
        else:
            pages = blocks.pages // 2
        blocks = Blocks(pages, blocks.slots, tile, table.vmem_limit_bytes)
    return blocks


def _vmem_bytes(case: Case, blocks: Blocks) -> int:
    """Scratch memory of the kernel's own buffers."""
    layout = Layout.of(case)
    rows = max(layout.group, case.num_heads // case.num_kv_heads * blocks.tile_tokens)
    flat = blocks.tile_tokens * layout.heads
    keys = blocks.pages * case.page_size
    pages = blocks.slots * keys * case.num_kv_heads * layout.width * layout.kv_itemsize
    out_bytes = layout.out_lanes * (layout.itemsize if case.context == 1 else 4)
    in_and_out = 2 * flat * (layout.key_lanes * layout.itemsize + out_bytes)
    in_and_out += (flat + layout.group) * (layout.key_lanes + layout.out_lanes) * 4
    state = case.num_kv_heads * rows * (layout.key_lanes * layout.itemsize + (layout.value_lanes + 2 * LANES) * 4)
    tile_heads = case.num_kv_heads * layout.kv_itemsize + layout.kv_heads * layout.itemsize
    writing = layout.write_depth * layout.rows * tile_heads * layout.width
    writing += layout.rows * layout.kv_heads * layout.width * 4
    logits = 3 * rows * keys * 4  # the compiler's, of one head
    scales = 0
    if layout.kinds:
        slabs = blocks.slots * keys // PIECE + PIECES * -(-keys // LANES) + layout.write_depth * (PIECE + 1)
        scales = slabs * round_up(layout.scale_rows, SUBLANES) * LANES * 4
        logits += keys * layout.width * (4 + layout.itemsize)  # keys and values of one head, widened
    return pages + in_and_out + state + writing + logits + scales


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _power_of_two(value: int) -> int:
    """The largest power of two up to value."""
    return 1 << (value.bit_length() - 1)
