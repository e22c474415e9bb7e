"""Philox-4x32-10 in torch against its published values, and the mask made of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastalex_kernels as fk
from fastalex_kernels.common import philox

# Counter, key and words of philox4x32 with 10 rounds, from Random123's kat_vectors.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_published_words(counter, key, words) -> None:
    seed = _signed(key[1] << 32 | key[0])
    c = [torch.tensor([word]) for word in counter]
    for form in (seed, torch.tensor(seed)):
        assert tuple(int(word) for word in philox.philox(form, *c)) == words
    negative = [torch.tensor([word - 2**32]) for word in counter]
    assert tuple(int(word) for word in philox.philox(seed, *negative)) == words


def test_words_become_uniform_numbers() -> None:
    ends = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    numbers = philox.uniform(ends)
    assert numbers.dtype == torch.float32
    assert numbers[[0, 5]].tolist() == [0.0, 0.0]
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    assert torch.equal(numbers[2], numbers[3])


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_the_share_of_what_is_kept(p: float) -> None:
    kept = philox.keep_mask(torch.tensor([5, 6]), 500, 400, p).double()
    spread = (p * (1 - p)) ** 0.5
    # Five standard deviations of a mean of n draws: of the whole, of a row, of a column.
    assert abs(float(kept.mean()) - (1 - p)) < 5 * spread / 200_000**0.5
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * spread / 400**0.5
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * spread / 500**0.5


def test_neighbours_are_independent() -> None:
    drawn = philox.keep_mask(torch.tensor([5, 6]), 400, 400, 0.5).double() * 2 - 1
    bound = 5 / 159_600**0.5
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < bound
    assert abs(float((drawn[:, 1:] * drawn[:, :-1]).mean())) < bound
    assert abs(float((drawn * drawn.t()).mean())) < 5 * 2**0.5 / 400


@pytest.mark.parametrize("columns", [16, 20])
def test_bits_of_parts_are_those_of_the_whole(columns: int) -> None:
    """Halves of rows or of columns, and blocks of rows, as a tower and a thread take them."""
    whole = philox.random_bits(torch.tensor([5, 6, 7, 0, 0]), 12, 2 * columns)
    assert whole.shape == (12, 2 * columns)
    assert int(whole.min()) >= 0
    assert int(whole.max()) < 2**16
    lower = philox.random_bits(torch.tensor([5, 6, 7, 6, 0]), 6, 2 * columns)
    right = philox.random_bits(torch.tensor([5, 6, 7, 0, columns]), 4, columns, first=3)
    assert torch.equal(lower, whole[6:])
    assert torch.equal(right, whole[3:7, columns:])


@pytest.mark.parametrize("place", range(5))
def test_every_number_of_a_place_counts(place: int) -> None:
    first = [5, 6, 7, 8, 64]
    other = [n + 64 * (i == place) for i, n in enumerate(first)]
    one, two = (philox.random_bits(torch.tensor(rng), 64, 64) for rng in (first, other))
    assert float((one == two).double().mean()) < 1e-2


def test_bits_are_uniform() -> None:
    bits = philox.random_bits(torch.tensor([5, 6, 7, 0, 0]), 512, 512).double() / 2**16
    spread = 12**-0.5 / 512  # of a mean of so many; five of them, of each column too
    assert abs(float(bits.mean()) - 0.5) < 5 * spread
    assert (bits.mean(0) - 0.5).abs().max() < 5 * spread * 512**0.5


@pytest.mark.parametrize("other", [(6, 6), (5, 7), (5 + 2**32, 6), (5, 6 + 2**32), (-5, 6)])
def test_every_bit_of_seed_and_offset_counts(other: tuple[int, int]) -> None:
    one = philox.keep_mask(torch.tensor([5, 6]), 64, 64, 0.5)
    two = philox.keep_mask(torch.tensor(other), 64, 64, 0.5)
    assert 0.4 < (one != two).double().mean() < 0.6


def test_a_part_is_that_part_of_the_whole() -> None:
    rng = torch.tensor([-(2**63), 2**63 - 1])
    whole = philox.keep_mask(rng, 20, 30, 0.5, 10**6, 10**5)
    part = philox.keep_mask(rng, 7, 11, 0.5, 10**6 + 13, 10**5 + 19)
    assert torch.equal(part, whole[13:, 19:])


@pytest.fixture(params=["aten", pytest.param("interpreter", marks=pytest.mark.interpreted)])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with fk.backend(request.param):
        yield


@pytest.mark.usefixtures("backend")
def test_dropout_alone_has_the_mask_of_the_fused_layer() -> None:
    x = torch.rand(9, 12) + 1
    arguments = {"p": 0.4, "rng": torch.tensor([3, 4]), "row_offset": 5, "feature_offset": 6}
    alone = fk.dropout(x, **arguments)
    assert torch.equal(fk.dropout(x, training=False), x)
    assert torch.equal(fk.dropout(x, p=0.0), x)
    fused = fk.linear_relu_dropout(x, torch.eye(12), **arguments)
    torch.testing.assert_close(alone, fused)
    kept = philox.keep_mask(arguments["rng"], 9, 12, 0.4, 5, 6)
    torch.testing.assert_close(alone, torch.where(kept, x / 0.6, torch.zeros(())))


@pytest.mark.usefixtures("backend")
def test_dropout_alone_hands_back_the_gradient_of_what_it_kept() -> None:
    x, rng = torch.randn(5, 8, requires_grad=True), torch.tensor([3, 4])
    y = fk.dropout(x, p=0.5, rng=rng)
    rng.add_(1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y != 0) * 2.0)
