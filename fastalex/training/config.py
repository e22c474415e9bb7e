"""The options of a training run, and the settings that they, a recipe and the defaults come to.

Each option is described once, here: ``fastalex.training.options`` makes the command line of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from fastalex.common.command_line import whole_number
from fastalex.data.augment import AUGMENTATIONS, COLOR_NOISES
from fastalex.data.normalization import NORMALIZATIONS
from fastalex.model.ablations import get_variant
from fastalex.model.variants import VARIANTS
from fastalex.training.fine_tuning import FREEZES
from fastalex.training.recipes import (
    INITIALISATIONS,
    MOMENTUM_DTYPES,
    MOMENTUM_RULES,
    RECIPES,
    SCHEDULES,
)

PRECISIONS = {
    "auto": "bf16 on a GPU that has tensor cores for it, float32 elsewhere",
    "float32": "as torch has it: on a GPU, convolutions in TF32 and products in IEEE float32",
    "tf32": "convolutions and products in TF32, where the GPU has it",
    "bf16": "bfloat16 products, weights in float32",
    "fp16": "float16 products with dynamic loss scaling, weights in float32",
}

# Options that a resumed run may be given anew: they change no weight.
RESUMABLE = (
    "data",
    "workers",
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep_checkpoints",
    "tensorboard",
    "timeout",
)

_LARGEST_IMAGE = 2048  # pixels: the built-in set draws a thousand images of this size first
_PUBLISHED_SIZE = 224  # stands for the size that the variant was published with
_BUILT_IN = {"image_size": 64, "batch_size": 64, "epochs": 6, "keep_checkpoints": 0}
_FOLDER = {"keep_checkpoints": 2}
# What follows data and device, by whether there is a folder of images and by the device.
DEFAULTS: dict[tuple[bool, str], dict[str, int]] = {
    (False, "cpu"): {**_BUILT_IN, "workers": 1},
    (False, "cuda"): {**_BUILT_IN, "workers": 4},
    (True, "cpu"): {**_FOLDER, "image_size": 96, "batch_size": 64, "epochs": 10, "workers": 1},
    (True, "cuda"): {**_FOLDER, "image_size": 224, "batch_size": 128, "epochs": 90, "workers": 8},
}
# Settings that have a part where another one has this value.
PART_OF = {
    "lr_drop": ("schedule", "drops"),
    "lr_patience": ("schedule", "plateau"),
    "lr_max_drops": ("schedule", "plateau"),
    "color_noise": ("augmentation", "full"),
}


def number(
    least: float, above: bool = False, below: float = math.inf, most: float = math.inf
) -> Callable[[str], float]:
    """The type of an option that is a number or a fraction; ``above`` leaves out ``least``."""
    limits = f"above {least}" if above else f"of at least {least}"
    limits += f" and below {below}" if below < math.inf else ""
    limits += f" and at most {most}" if most < math.inf else ""

    def convert(text: str) -> float:
        try:
            value = float(Fraction(text))
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not (least <= value <= most and value < below and not (above and value == least)):
            raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")
        return value

    return convert


def _shares(text: str) -> tuple[float, ...]:
    return tuple(map(number(0, above=True, most=1), text.split(",")))


def option(default: Any, takes: Any, metavar: str | None, text: str) -> Any:
    """An option: its default (None follows something else), its type or choices, and its help."""
    return field(default=default, metadata={"takes": takes, "metavar": metavar, "text": text})


_COUNT, _COUNT_OR_0 = whole_number(1), whole_number(0)
_POSITIVE, _NOT_NEGATIVE, _BELOW_1 = number(0, above=True), number(0), number(0, below=1)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run does; an instance has everything filled in, but for what None has a meaning."""

    workers: int = option(None, _COUNT_OR_0, "N", "threads that load batches ahead")
    timeout: float = option(
        120.0, number(1), "SECONDS", "longest that a process may keep the others waiting"
    )
    precision: str = option("auto", PRECISIONS, None, "")
    fused_update: bool = option(
        None, bool, None, "steps without autograd, see docs/step.md (default: but in fp16)"
    )
    cuda_graph: bool = option(
        None, bool, None, "a step is one launch (default: on a GPU, with --fused-update)"
    )
    data: Path | None = option(  # noqa: RUF009
        None,
        Path,
        "DIR",
        "packed, or train/CLASS/IMAGE and val/CLASS/IMAGE (default: built-in set)",
    )
    image_size: int = option(
        None, whole_number(1, _LARGEST_IMAGE), "PIXELS", "side of the images the net gets"
    )
    batch_size: int = option(None, _COUNT, "N", "images in a step, over all processes")
    augmentation: str = option("crop", AUGMENTATIONS, None, "")
    color_noise: str = option("published", COLOR_NOISES, None, "numbers of --augmentation full: ")
    normalization: str = option("unit", NORMALIZATIONS, None, "")
    variant: str = option(
        "paper", dict.fromkeys(VARIANTS), None, "of the paper, its program, Caffe or torchvision"
    )
    init: str = option("he", INITIALISATIONS, None, "")
    init_from: Path | None = option(  # noqa: RUF009
        None, Path, "W", "begin with the weights of a run or of fastalex.convert: docs/weights.md"
    )
    freeze: str | None = option(None, FREEZES, None, "what training leaves as it is: ")
    dropout: float = option(0.5, _BELOW_1, "P", "probability that a unit of fc6 or fc7 is dropped")
    recipe: str | None = option(
        None, dict.fromkeys(RECIPES), None, "train as was published; other options still count"
    )
    epochs: int = option(None, _COUNT, "N", "passes over the training images")
    max_steps: int | None = option(None, _COUNT, "N", "stop after this many steps")
    momentum: float = option(0.9, _BELOW_1, "M", "of stochastic gradient descent")
    momentum_rule: str = option("torch", MOMENTUM_RULES, None, "")
    momentum_dtype: str = option("float32", MOMENTUM_DTYPES, None, "of fc6 to fc8's momentum; ")
    weight_decay: float = option(5e-4, _NOT_NEGATIVE, "D", "pull of the weights to zero")
    bias_lr: float | None = option(
        None, _NOT_NEGATIVE, "FACTOR", "rate of the biases, times --lr (default: the variant's)"
    )
    bias_decay: float | None = option(
        None, _NOT_NEGATIVE, "FACTOR", "theirs, times --weight-decay (default: the variant's)"
    )
    bias_schedule: bool = option(True, bool, None, "let the rate of the biases drop too")
    seed: int = option(
        0, whole_number(0, 2**63 - 1), "N", "decides weights, order, crops, colours and dropout"
    )
    lr: float = option(0.01, _POSITIVE, "RATE", "learning rate")
    schedule: str = option("drops", SCHEDULES, None, "")
    lr_drop: tuple[float, ...] = option(
        (0.8,), _shares, "SHARES", "shares of the steps, as in 25/90,51/90,79/90; 1 never drops"
    )
    lr_gamma: float = option(
        0.1, number(0, above=True, below=1), "FACTOR", "what a drop multiplies the rate by"
    )
    lr_patience: int = option(5, _COUNT, "EPOCHS", "epochs without a better error before a drop")
    lr_max_drops: int | None = option(
        None, _COUNT_OR_0, "N", "most drops that plateaus cause (default: no limit)"
    )
    warmup: float = option(0.0, _BELOW_1, "SHARE", "share of the steps in which the rate rises")
    checkpoint_every: int | None = option(
        None, _COUNT, "STEPS", "steps between two checkpoints, besides those at an epoch's end"
    )
    checkpoint_minutes: float = option(10.0, _POSITIVE, "M", "most minutes that a kill can cost")
    keep_checkpoints: int = option(
        None, _COUNT_OR_0, "N", "newest checkpoints that stay; 0: only while the run needs one"
    )
    log_every: int = option(10, _COUNT, "STEPS", "steps between two records in metrics.jsonl")
    tensorboard: bool = option(False, bool, None, "write curves for TensorBoard too")

    @classmethod
    def choose(cls, arguments: Mapping[str, Any], device_type: str, bf16: bool = False) -> Settings:
        """The settings that ``arguments``, from ``parse_arguments``, come to on a device.

        What was given wins over the recipe, and the recipe over data and device. ``bf16`` tells
        whether the device has tensor cores for bfloat16.

        Raises:
            ValueError: for an option that has no part in what the others say.
        """
        given = {n: arguments[n] for n in setting_names() if arguments[n] is not None}
        recipe = RECIPES.get(arguments["recipe"], {})
        values = {**DEFAULTS[arguments["data"] is not None, device_type], **recipe, **given}
        values = {**{name: f.default for name, f in fields().items()}, **values}
        published = values["image_size"] == _PUBLISHED_SIZE and "image_size" not in given
        if recipe and published:
            values["image_size"] = get_variant(values["variant"]).image_size
        if values["precision"] == "auto":
            values["precision"] = "bf16" if bf16 else "float32"
        for name, (other, needed) in PART_OF.items():
            if name in given and values[other] != needed:
                raise ValueError(
                    f"{as_option(name)} has no part in the {other} {values[other]}: leave it out, "
                    f"or add --{other} {needed}"
                )
        if values["momentum_dtype"] != "float32" and values["momentum_rule"] != "paper":
            raise ValueError(
                f"--momentum-dtype {values['momentum_dtype']} needs --momentum-rule paper: torch's "
                "optimizer, which has the other rule, keeps its buffers in float32"
            )
        values.update(_execution(given, values["precision"], device_type))
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; ``from_dict`` undoes it."""
        paths = {n: str(v) for n, v in vars(self).items() if isinstance(v, Path)}
        return {**vars(self), **paths, "lr_drop": list(self.lr_drop)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], device_type: str = "cpu") -> Settings:
        """The inverse of ``to_dict``; what an older version did not know takes its default."""
        unknown = sorted(set(values) - set(setting_names()))
        if unknown:
            raise ValueError(
                "written by another version of fastalex, whose settings this one does not know: "
                f"{', '.join(unknown)}"
            )
        if len(values) < len(setting_names()):
            given = {n: values.get(n) for n in ("recipe", "data")}
            known = {**dict.fromkeys(setting_names()), **given}
            values = {**cls.choose(known, device_type).to_dict(), **values}
        paths = {n: Path(values[n]) for n in ("data", "init_from") if values[n] is not None}
        return cls(**{**values, **paths, "lr_drop": tuple(values["lr_drop"])})


def _execution(given: Mapping[str, Any], precision: str, device_type: str) -> dict[str, bool]:
    """How a step is executed; without autograd, and on a GPU in one launch."""
    gpu, scaled = device_type == "cuda", precision == "fp16"
    fused = given.get("fused_update", not scaled)
    if fused and scaled:
        raise ValueError(
            "--fused-update can't look at a gradient before it is applied, as float16 needs: "
            "leave it out, or use --precision bf16"
        )
    if given.get("cuda_graph") and not gpu:
        raise ValueError("--cuda-graph needs a GPU: leave it out")
    if given.get("cuda_graph") and not fused:
        raise ValueError("--cuda-graph needs --fused-update, which float16 rules out: leave it out")
    return {"fused_update": fused, "cuda_graph": given.get("cuda_graph", gpu and fused)}


def fields() -> dict[str, dataclasses.Field[Any]]:
    """The settings' descriptions, by name."""
    return {field.name: field for field in dataclasses.fields(Settings)}


def setting_names() -> list[str]:
    return list(fields())


def chosen_variant(options: Mapping[str, Any]) -> str:
    """The variant that ``options`` name, their recipe's or the default."""
    recipe = RECIPES.get(options["recipe"], {})
    return str(options["variant"] or recipe.get("variant", Settings.variant))


def as_option(name: str) -> str:
    return "--" + name.replace("_", "-")


def describe_setting(name: str, value: Any) -> str:
    """A setting as its option: ``--lr 0.1``, ``--no-fused-update``, ``no --recipe``."""
    if value is None:
        return f"no {as_option(name)}"
    if isinstance(value, bool):
        return as_option(name if value else f"no_{name}")
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{as_option(name)} {text}"
