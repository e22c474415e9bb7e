"""What is read for the figures, and what of it is drawn where."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from fastalex.evaluation import figures
from fastalex.evaluation.ensemble import Ensemble
from tests._nets import random_weights

pytest.importorskip("matplotlib")


def test_the_bar_of_the_correct_class_is_red_and_as_long_as_it_is_probable() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    guesses = [("cat", 0.6), ("dog", 0.3), ("cow", 0.1)]
    figure = figures.draw_predictions([figures.Prediction(pixels, "dog", guesses)])
    picture, bars = figure.axes
    assert [bar.get_width() for bar in bars.patches] == [0.6, 0.3, 0.1]
    colours = [to_hex(bar.get_facecolor()) for bar in bars.patches]
    assert colours[0] == colours[2] != colours[1]
    red, green, blue = bars.patches[1].get_facecolor()[:3]
    assert red > 1.5 * max(green, blue)
    assert [text.get_text() for text in bars.texts] == ["cat", "dog", "cow"]
    assert picture.get_xlabel() == "dog"


FERRET = "black-footed ferret, ferret, Mustela nigripes"


def test_long_names_are_whole_and_stay_in_their_place() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    guesses = [(FERRET, 0.6), ("dog", 0.3), (FERRET, 0.1)]
    figure = figures.draw_predictions([figures.Prediction(pixels, FERRET, guesses)])
    figure.draw_without_rendering()
    picture, bars = figure.axes
    for text in (picture.xaxis.label, *bars.texts):
        assert text.get_text().replace("\n", " ") in (FERRET, "dog")
    frame = bars.get_window_extent()
    places = [text.get_window_extent() for text in bars.texts]
    for upper, lower in itertools.pairwise(places):
        assert upper.y0 > lower.y1
    assert all(frame.x0 < p.x0 and p.x1 < frame.x1 for p in places)
    assert places[0].y1 < frame.y1
    assert places[-1].y0 > frame.y0
    title = picture.xaxis.label.get_window_extent()
    assert frame.y1 < title.y0
    assert title.y1 < picture.get_window_extent().y0

    row = figures.Neighbours(pixels, FERRET, [(pixels, FERRET)])
    figure = figures.draw_neighbours([row, row])
    figure.draw_without_rendering()
    names = [axes.xaxis.label for axes in figure.axes]
    assert [name.get_text().replace("\n", " ") for name in names] == [FERRET] * 4
    upper, below = names[0].get_window_extent(), figure.axes[2].get_window_extent()
    assert upper.y1 < figure.axes[0].get_window_extent().y0
    assert upper.y0 > below.y1


def test_neighbours_of_another_class_are_red() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    row = figures.Neighbours(pixels, "cat", [(pixels, "cat"), (pixels, "dog")])
    names = [axes.xaxis.label for axes in figures.draw_neighbours([row]).axes]
    assert [name.get_text() for name in names] == ["cat", "cat", "dog"]
    colours = [to_hex(name.get_color()) for name in names]
    assert colours[:2] == ["#000000"] * 2
    assert colours[2] != "#000000"


@pytest.mark.parametrize(
    ("variant", "towers"), [("paper-without-fc6+fc7", 2), ("paper-half-without-fc6+fc7", 0)]
)
def test_kernels_stand_by_tower(tmp_path: Path, variant: str, towers: int) -> None:
    weights = random_weights(tmp_path / "a", 0, variant=variant)
    figure = figures.draw_first_layer(Ensemble([weights]))
    names = [text.get_text() for text in figure.texts]
    assert names == [f"tower {number + 1}" for number in range(towers)]
    assert len(figure.axes) == max(1, towers)
