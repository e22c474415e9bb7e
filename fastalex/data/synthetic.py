"""The built-in set: ten classes drawn by a program, so that training needs no download.

Each picture is a function of (seed, split, index). What tells the classes apart is the direction
and the width of stripes, the way two tones alternate, the outline of a figure, and which of two
colours is in front. Colours, place, scale, phase, sharpness, light, clutter and noise are drawn at
random, so that no mean colour gives a class away and a linear function of the pixels fails at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastalex.data.base import ImageCache, Pixels

TRAIN_COUNT = 3000
VAL_COUNT = 500

Split = Literal["train", "val"]
Plane = npt.NDArray[np.float32]  # [size, size], or [size, size, 3]
_SPLITS: tuple[Split, ...] = ("train", "val")
_UNIFORMS = 96  # random numbers a scene may use


class SyntheticImages:
    """Ten classes in equal numbers: image i is of class i mod 10.

    Args:
        split: "train" or "val"; the same index is another picture in each.
        count: how many images.
        seed: another seed draws other images; not negative.
    """

    def __init__(self, split: Split, count: int, seed: int = 0) -> None:
        self.split = split
        self.seed = seed
        self.classes = list(_FIGURES)
        self.labels = np.arange(count) % len(self.classes)
        self._cache = ImageCache()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"synthetic {self.split} {index}"

    def image(self, index: int, size: int) -> Pixels:
        """uint8 [size, size, 3]: the same scene at every size, with its own noise."""
        image = self._cache.get(index, size)
        if image is None:
            key = [self.seed, _SPLITS.index(self.split), index]
            image = _draw(self.classes[self.labels[index]], _Random(key), size)
            self._cache.put(index, image)
        return image

    def whole(self, index: int, size: int) -> Image.Image:
        """As ``image``: the scene has no size of its own."""
        return Image.fromarray(self.image(index, size))

    def keys(self) -> list[tuple[int, str, int]]:
        return [(self.seed, self.split, index) for index in range(len(self))]


class _Random:
    """Numbers for one picture, from raw Philox words: the same with every numpy."""

    def __init__(self, key: list[int]) -> None:
        self._bits = np.random.Philox(np.random.SeedSequence(key))
        words = self._bits.random_raw(_UNIFORMS)
        self._uniforms = iter(((words >> np.uint64(11)) * 2.0**-53).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(next(self._uniforms))

    def sign(self) -> float:
        return 1.0 if next(self._uniforms) < 0.5 else -1.0

    def place(self, spread: float) -> tuple[float, float]:
        return self.between(-spread, spread), self.between(-spread, spread)

    def colour(self) -> tuple[float, float, float]:
        return self.between(15, 240), self.between(15, 240), self.between(15, 240)

    def noise(self, size: int) -> Plane:
        """Float32 [size, size, 3] of unit variance: the sum of two bytes, centred and scaled."""
        count = 3 * size * size
        words = self._bits.random_raw(-(-2 * count // 8))
        pairs = words.view(np.uint8)[: 2 * count].reshape(2, size, size, 3)
        noise: Plane = pairs[0].astype(np.float32) + pairs[1] - np.float32(255)
        noise *= np.float32(math.sqrt(6 / (256**2 - 1)))
        return noise


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Plane, Plane]:
    """X and y of each pixel's centre, from -1/2 to 1/2."""
    line = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    x, y = np.meshgrid(line, line)
    return x, y


def _rotated(size: int, angle: float, centre: tuple[float, float]) -> tuple[Plane, Plane]:
    """Coordinates along and across the direction ``angle``, from ``centre``."""
    x, y = _grid(size)
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    return dx * cos + dy * sin, dy * cos - dx * sin


def _wave(u: Plane, cycles: float, phase: float) -> Plane:
    """A triangle wave from -1 to 1; no transcendental function, so the same on every machine."""
    t = u * np.float32(cycles) + np.float32(phase)
    t -= np.floor(t)
    wave: Plane = np.abs(t - np.float32(0.5)) * np.float32(4) - np.float32(1)
    return wave


def _share(x: Plane) -> Plane:
    clipped: Plane = np.clip(x, 0, 1)
    return clipped


def _inside(distance: Plane, size: int) -> Plane:
    """Share of each pixel within a figure, from the signed distance to its outline."""
    return _share(np.float32(0.5) - distance * np.float32(size))


# Each figure returns how much of the first of two colours each pixel has, 0 to 1.


def _stripes(random: _Random, size: int, angle: float, low: float, high: float) -> Plane:
    """Of ``low`` to ``high`` cycles over the picture, in a direction in degrees."""
    u, _ = _rotated(size, (angle + random.between(-10, 10)) * math.pi / 180, (0, 0))
    wave = _wave(u, low * (high / low) ** random.between(0, 1), random.between(0, 1))
    return _share(wave * np.float32(random.between(0.6, 3)) + np.float32(0.5))


def _diagonal_stripes(random: _Random, size: int) -> Plane:
    return _stripes(random, size, 45 * random.sign(), 4, 8)


def _checkerboard(random: _Random, size: int) -> Plane:
    u, v = _rotated(size, random.between(-15, 15) * math.pi / 180, (0, 0))
    cycles = 1.3 * (2.3 / 1.3) ** random.between(0, 1)
    product = _wave(u, cycles, random.between(0, 1)) * _wave(v, cycles, random.between(0, 1))
    return _share(product * np.float32(random.between(2, 6)) + np.float32(0.5))


def _ring(random: _Random, size: int) -> Plane:
    u, v = _rotated(size, 0, random.place(0.15))
    radius = random.between(0.26, 0.38)
    distance = np.abs(np.sqrt(u * u + v * v) - np.float32(radius))
    return _inside(distance - np.float32(radius * random.between(0.15, 0.3)), size)


def _triangle(random: _Random, size: int) -> Plane:
    u, v = _rotated(size, random.between(0, 2 * math.pi), random.place(0.12))
    sides = np.maximum(np.abs(u) * np.float32(math.sqrt(3) / 2) + v / 2, -v)
    return _inside(sides - np.float32(random.between(0.18, 0.25)), size)


def _cross(random: _Random, size: int) -> Plane:
    u, v = map(np.abs, _rotated(size, random.between(0, math.pi / 2), random.place(0.12)))
    length = random.between(0.32, 0.44)
    width = np.float32(length * random.between(0.22, 0.32))
    bars = np.maximum(np.minimum(u, v) - width, np.maximum(u, v) - np.float32(length))
    return _inside(bars, size)


def _disc(random: _Random, size: int) -> Plane:
    u, v = _rotated(size, 0, random.place(0.25))
    # Half of the picture on average: neither colour is seen more of in either class.
    return _inside(np.sqrt(u * u + v * v) - np.float32(random.between(0.36, 0.48)), size)


_FIGURES: dict[str, Callable[[_Random, int], Plane]] = {
    "broad_horizontal_stripes": functools.partial(_stripes, angle=90, low=2.2, high=3.6),
    "checkerboard": _checkerboard,
    "cross": _cross,
    "diagonal_stripes": _diagonal_stripes,
    "fine_horizontal_stripes": functools.partial(_stripes, angle=90, low=6, high=9),
    "green_disc_on_red": _disc,
    "red_disc_on_green": _disc,
    "ring": _ring,
    "triangle": _triangle,
    "vertical_stripes": functools.partial(_stripes, angle=0, low=3, high=8),
}

Colour = tuple[float, float, float]


def _colours(label: str, random: _Random) -> tuple[Colour, Colour]:
    """Front and back: any two colours far enough apart, or the two that the class is about."""
    red = random.between(170, 240), random.between(20, 90), random.between(20, 90)
    green = random.between(20, 90), random.between(140, 220), random.between(20, 90)
    pairs = [(random.colour(), random.colour()) for _ in range(8)]
    if label == "red_disc_on_green":
        return red, green
    if label == "green_disc_on_red":
        return green, red
    far = [pair for pair in pairs if math.dist(*pair) > 160]
    return far[0] if far else max(pairs, key=lambda pair: math.dist(*pair))


def _draw(label: str, random: _Random, size: int) -> Pixels:
    """The picture, uint8 [size, size, 3]: figure, clutter, uneven light and noise."""
    colours = np.array(_colours(label, random), np.float32)
    front = _FIGURES[label](random, size)[..., None]
    image = colours[1] + front * (colours[0] - colours[1])
    for _ in range(2):
        u, v = _rotated(size, random.between(0, math.pi), random.place(0.45))
        half = np.float32(random.between(0.03, 0.09)), np.float32(random.between(0.03, 0.09))
        patch = _inside(np.maximum(np.abs(u) - half[0], np.abs(v) - half[1]), size)[..., None]
        image += patch * np.float32(0.7) * (np.array(random.colour(), np.float32) - image)
    light, _ = _rotated(size, random.between(0, 2 * math.pi), (0, 0))
    image += (light * np.float32(random.between(0, 50)))[..., None]
    image += random.noise(size) * np.float32(random.between(2, 10))
    pixels: Pixels = np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)
    return pixels
