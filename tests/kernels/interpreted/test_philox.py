"""The random bits of torch, of Triton and of our kernels are the same bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastalex_kernels.common import philox

from ._observe import Interpreted

SEEDS = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), 0x123456789ABCDEF, -987654321987]
BLOCK = 1024


@Interpreted
@triton.jit
def _philox_kernel(rng_ptr, c_ptr, words_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    seed = tl.load(rng_ptr)
    c0 = tl.load(c_ptr + offs)
    c1 = tl.load(c_ptr + BLOCK + offs)
    c2 = tl.load(c_ptr + 2 * BLOCK + offs)
    c3 = tl.load(c_ptr + 3 * BLOCK + offs)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    tl.store(words_ptr + offs, w0.to(tl.uint32).to(tl.int64))
    tl.store(words_ptr + BLOCK + offs, w1.to(tl.uint32).to(tl.int64))
    tl.store(words_ptr + 2 * BLOCK + offs, w2.to(tl.uint32).to(tl.int64))
    tl.store(words_ptr + 3 * BLOCK + offs, w3.to(tl.uint32).to(tl.int64))


@Interpreted
@triton.jit
def _rand_kernel(rng_ptr, first, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.rand(tl.load(rng_ptr), first + offs))


@Interpreted
@triton.jit
def _keep_kernel(rng_ptr, out_ptr, row_offset, feature_offset, p, M: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, M)[:, None]
    feature = tl.arange(0, N)[None, :]
    kept = philox.keep(rng_ptr, row + row_offset, feature + feature_offset, p)
    tl.store(out_ptr + row * N + feature, kept.to(tl.uint8))


@Interpreted
@triton.jit
def _drop_kernel(rng_ptr, x_ptr, row_offset, feature_offset, p, M: tl.constexpr, N: tl.constexpr):
    row = tl.arange(0, M)
    ptrs = x_ptr + row[:, None] * N + tl.arange(0, N)[None, :]
    x = philox.drop(tl.load(ptrs), rng_ptr, row + row_offset, feature_offset, p)
    tl.store(ptrs, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_words(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed & 0xFFFF)
    counters = torch.randint(-(2**31), 2**31, (4, BLOCK), generator=generator).to(torch.int32)
    counters[:, :2] = torch.tensor([0, -1])
    words = torch.empty(4, BLOCK, dtype=torch.int64)
    _philox_kernel[(1,)](torch.tensor([seed, 0]), counters, words, BLOCK=BLOCK)
    assert torch.equal(torch.stack(philox.philox(seed, *counters)), words)
    assert torch.equal(torch.stack(philox.philox(torch.tensor(seed), *counters)), words)
    assert words.unique().numel() > 4000


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**31 - 2 * BLOCK])
def test_uniform_numbers(seed: int, first: int) -> None:
    out = torch.empty(BLOCK)
    _rand_kernel[(1,)](torch.tensor([seed, 0]), first, out, BLOCK=BLOCK)
    ours = philox.uniform(philox.philox(seed, torch.arange(first, first + BLOCK), 0, 0, 0)[0])
    assert torch.equal(ours, out)
    assert ours.dtype == torch.float32
    assert ours.min() >= 0
    assert ours.max() < 1


@pytest.mark.parametrize("seed", SEEDS[::3])
@pytest.mark.parametrize("offset", [0, 1, -1, 2**32 + 5, -(2**40)])
@pytest.mark.parametrize("first", [(0, 0), (100_000, 4096), (2**31 - 64, 2**30)])
def test_the_mask_of_dropout(seed: int, offset: int, first: tuple[int, int]) -> None:
    rng, kept = torch.tensor([seed, offset]), torch.empty(16, 32, dtype=torch.uint8)
    _keep_kernel[(1,)](rng, kept, *first, 0.3, M=16, N=32)
    assert torch.equal(philox.keep_mask(rng, 16, 32, 0.3, *first), kept.bool())


@pytest.mark.parametrize("shape", [(16, 32), (256, 32), (16, 64), (128, 64), (64, 256)], ids=str)
def test_a_block_is_dropped_by_the_mask(shape: tuple[int, int]) -> None:
    rng, first = torch.tensor([-5, 3 << 40]), (2**31 - 256, 100)
    x = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
    expected = torch.where(philox.keep_mask(rng, *shape, 0.3, *first), x, 0.0)
    _drop_kernel[(1,)](rng, x, *first, 0.3, M=shape[0], N=shape[1])
    assert torch.equal(x, expected)
