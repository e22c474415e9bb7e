"""The candidates for each kernel: a few configs around its own, the likeliest first."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastalex_kernels.common.tuned import Key, Tile
from fastalex_kernels.conv2d.tiles import split_channels

# (BLOCK_M, BLOCK_N, num_warps): at most 128 sums in a thread's registers, 192 for pixels.
_SHAPES = {
    16: [
        (128, 128, 8), (128, 64, 4), (128, 256, 8), (256, 128, 8), (128, 64, 8), (64, 128, 4),
        (128, 128, 4), (256, 64, 8), (64, 64, 4), (64, 256, 8),
    ],
    32: [(64, 64, 8), (64, 32, 4), (32, 64, 4), (128, 64, 8), (32, 32, 4), (64, 128, 8)],
}  # fmt: skip
_PIXEL_SHAPES = [(128, 128, 8), (256, 128, 8), (384, 128, 8), (384, 64, 4)]
_DEPTHS = {16: (64, 32, 128), 32: (32, 16)}  # BLOCK_K, the likeliest first
_STAGES = {16: (4, 3, 5, 2), 32: (3, 2)}
_LEAST_STEPS = 4  # of a part of a reduction


def is_split(key: Key) -> bool:
    """Whether a key is of a reduction to split: its sizes follow from another key's tile."""
    return key[0].endswith(" parts")


def candidates(key: Key, own: Tile, bits: int, shared: int) -> Iterator[Tile]:
    """Configs for a key, ``own`` first; some may come to the same launches.

    Args:
        key: kernel, kind of its operands and sizes.
        own: what the package takes where nothing was tuned.
        bits: of an operand.
        shared: bytes of shared memory that a program can have.
    """
    yield own
    kernel, _, sizes = key
    if is_split(key):
        yield from _splits(own[0], steps=sizes[-1])
    elif kernel == "lrn forward":
        yield from _lrn_forward(own, pooled_rows=sizes[3])
    elif kernel == "lrn backward":
        yield from _lrn_backward(own, sizes)
    elif kernel.startswith("pool"):
        yield from _pooling(own)
    elif kernel == "linear backward":
        yield from _one_pass(own)
    elif kernel == "conv2d run":
        yield from ((1,), (own[0] - 1,))  # the plain kernel, or fewer registers
    else:
        pixels = bits == 16 and kernel in ("conv2d forward", "conv2d input")
        shared_weights = _pixels(sizes[3], sizes[4], shared) if pixels else ()
        yield from dict.fromkeys((*shared_weights, *_products(bits, shared)))


def _pixels(channels: int, outputs: int, shared: int) -> Iterator[Tile]:
    """One to three pixels of 128 images, with all the stages that fit and with half of them."""
    depth = math.gcd(64, channels)
    for m, n, warps in _PIXEL_SHAPES if depth >= 16 else ():
        columns = sum(split_channels(n, outputs, n // 2))  # 192 as 128 and a tail of 64
        if m * columns > 3 * 128 * 128:  # more sums spill
            continue
        most = min(8, shared // (2 * depth * (m + max(n, columns))))
        for stages in (most, most // 2):
            if stages > 1:
                yield m, n, depth, warps, stages


def _products(bits: int, shared: int) -> Iterator[Tile]:
    """Every shape at its deepest pipeline, then shallower ones."""
    for stage in range(2):
        for depth in _DEPTHS[bits]:
            for m, n, warps in _SHAPES[bits]:
                size = (m + n) * depth * bits // 8
                fitting = [s for s in _STAGES[bits] if s * size <= shared]
                if stage < len(fitting):
                    yield m, n, depth, warps, fitting[stage]


def _one_pass(own: Tile) -> Iterator[Tile]:
    """Fewer warps, blocks of twice the size, strips of half the width, a deeper pipeline."""
    outputs, inputs, warps, stages = own
    yield outputs, inputs, warps // 2, stages
    yield 2 * outputs, inputs, warps, stages
    yield outputs, inputs // 2, warps // 2, stages + 1
    yield outputs, inputs, warps, stages + 1


def _splits(own: int, steps: int) -> Iterator[Tile]:
    """Twice, half and three times as many parts; of few, also one."""
    for parts in (2 * own, own // 2, 3 * own, *([1] if own <= 4 else [])):
        if 1 <= parts <= steps // _LEAST_STEPS:
            yield (parts,)


def _shares(rows: int, own: int) -> list[int]:
    """Rows of a program where one program more, or one less, goes down them."""
    parts = math.ceil(rows / own)
    return [math.ceil(rows / p) for p in (parts + 1, parts - 1) if 1 <= p <= rows]


def _lrn_forward(own: Tile, pooled_rows: int) -> Iterator[Tile]:
    chunks, strip, rows = own
    yield chunks // 2, strip, rows
    for share in _shares(pooled_rows, rows):
        yield chunks, strip, share
    yield chunks, strip - 1, rows  # fewer registers, a column more for each that is kept


def _lrn_backward(own: Tile, sizes: tuple[int, ...]) -> Iterator[Tile]:
    (chunks, rows), (_, height, *_, channels, groups) = own, sizes
    if channels // groups // 8 <= chunks // 2:  # a program holds whole groups
        yield chunks // 2, rows
    yield 2 * chunks, rows
    for share in _shares(math.ceil(height / 2), rows):
        yield chunks, share


def _pooling(own: Tile) -> Iterator[Tile]:
    """Less and more for a program, in as many registers of a thread and in others."""
    block, warps = own
    for tile in ((block // 2, warps // 2), (block // 2, warps), (2 * block, 2 * warps)):
        if tile[0] >= 1 and 1 <= tile[1] <= 16:
            yield tile
