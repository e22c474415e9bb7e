"""Recipes: what they set, what wins over them, and that nothing changes without one."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastalex.training.config import Settings
from fastalex.training.options import parse_arguments
from fastalex.training.recipes import RECIPES
from tests._commands import ROOT


def _settings(*arguments: str, device: str = "cpu") -> Settings:
    return Settings.choose(parse_arguments(arguments), device)


def test_without_a_recipe_the_defaults_are_those_of_help() -> None:
    settings = _settings()
    assert (settings.variant, settings.init, settings.momentum_rule) == ("paper", "he", "torch")
    assert (settings.lr, settings.momentum, settings.weight_decay) == (0.01, 0.9, 5e-4)
    assert (settings.schedule, settings.lr_drop, settings.lr_gamma) == ("drops", (0.8,), 0.1)
    assert (settings.batch_size, settings.epochs, settings.image_size) == (64, 6, 64)
    assert (settings.augmentation, settings.normalization) == ("crop", "unit")
    assert (settings.bias_lr, settings.precision) == (None, "float32")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_all_it_says(name: str) -> None:
    settings = _settings("--recipe", name)
    assert {f: getattr(settings, f) for f in RECIPES[name]} == RECIPES[name]


OTHER = {
    "variant": ("owt", "owt"),
    "init": ("he", "he"),
    "dropout": ("0.25", 0.25),
    "batch_size": ("12", 12),
    "epochs": ("3", 3),
    "lr": ("0.3", 0.3),
    "momentum": ("0.5", 0.5),
    "momentum_rule": ("torch", "torch"),
    "weight_decay": ("0.1", 0.1),
    "bias_lr": ("3", 3.0),
    "bias_decay": ("0.5", 0.5),
    "schedule": ("drops", "drops"),
    "warmup": ("0.1", 0.1),
    "lr_gamma": ("0.5", 0.5),
    "augmentation": ("none", "none"),
    "normalization": ("unit", "unit"),
}


@pytest.mark.parametrize("name", OTHER)
def test_any_setting_can_be_given_beside_a_recipe(name: str) -> None:
    text, value = OTHER[name]
    plain = _settings("--recipe", "paper")
    settings = _settings("--recipe", "paper", "--" + name.replace("_", "-"), text)
    assert getattr(plain, name) != value
    assert settings == dataclasses.replace(plain, **{name: value})


def test_every_setting_of_a_recipe_has_an_option() -> None:
    rest = {"bias_schedule", "lr_drop", "lr_patience", "lr_max_drops"}
    assert {name for recipe in RECIPES.values() for name in recipe} | {"warmup"} == set(
        OTHER
    ) | rest
    arguments = ["--recipe", "source2012", "--bias-schedule", "--lr-drop", "1/4,0.5"]
    settings = _settings(*arguments)
    assert settings.bias_schedule
    assert settings.lr_drop == (0.25, 0.5)
    settings = _settings("--recipe", "paper", "--lr-patience", "7", "--lr-max-drops", "9")
    assert (settings.lr_patience, settings.lr_max_drops) == (7, 9)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--recipe", "paper", "--lr-drop", "0.5"], "add --schedule drops"),
        (["--color-noise", "measured"], "--color-noise has no part in the augmentation crop"),
        (["--lr-patience", "3"], "--schedule plateau"),
    ],
)
def test_an_option_without_effect_is_refused(arguments: list[str], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        _settings(*arguments)


def test_the_published_image_size_is_the_variant_s() -> None:
    assert _settings("--recipe", "caffe", "--data", "x", device="cuda").image_size == 227
    assert _settings("--recipe", "paper", "--data", "x", device="cuda").image_size == 224
    assert _settings("--variant", "caffe", "--data", "x", device="cuda").image_size == 224
    given = ["--recipe", "caffe", "--data", "x", "--image-size", "224"]
    assert _settings(*given, device="cuda").image_size == 224


@pytest.mark.parametrize("arguments", [[], ["--recipe", "source2012", "--data", "some/where"]])
def test_settings_survive_json(arguments: list[str]) -> None:
    settings = _settings(*arguments)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_settings_of_another_version_are_refused() -> None:
    values = {**_settings().to_dict(), "nesterov": True}
    with pytest.raises(ValueError, match=r"another version of fastalex, .* not know: nesterov$"):
        Settings.from_dict(values)


def test_settings_that_an_older_version_did_not_have_take_their_defaults() -> None:
    chosen = _settings("--recipe", "paper", "--lr", "0.5", "--log-every", "3")
    values = json.loads(json.dumps(chosen.to_dict()))
    for name in ("checkpoint_minutes", "momentum_rule"):
        del values[name]
    assert Settings.from_dict(values) == chosen


def test_the_table_of_recipes_has_the_numbers_that_are_trained_with() -> None:
    """They were written down twice, from the same sources; a slip in one shows."""
    lines = (ROOT / "docs" / "training.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    rows = {row[0]: row[1:] for row in cells if len(row) == 5}
    for column, recipe in enumerate(RECIPES.values()):
        for name in ("dropout", "batch_size", "epochs", "lr", "momentum", "weight_decay"):
            text = rows[f"`--{name.replace('_', '-')}`"][column]
            assert float(text.split(" ")[0]) == recipe[name], (name, column)
        for name in ("variant", "momentum_rule", "augmentation", "normalization"):
            text = rows[f"`--{name.replace('_', '-')}`"][column]
            assert text.split(" ")[0] == recipe[name], (name, column)
        factors = rows["`--bias-lr`, `--bias-decay`"][column].split(" (")[0].split(", ")
        assert list(map(float, factors)) == [recipe["bias_lr"], recipe["bias_decay"]]
        assert rows["`--bias-schedule`"][column].startswith(
            "yes" if recipe.get("bias_schedule", True) else "no"
        )
