"""The settings of a training run: what the command line, its recipe and the defaults come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalex.model.ablations import get_variant
from fastalex.training.recipes import NO_RECIPE, RECIPES, Recipe

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

_PUBLISHED_SIZE = 224  # stands for the size that the variant was published with

# The schedules that a setting belongs to.
PART_OF = {
    "lr_gamma": ("drops", "step", "plateau"),
    "lr_drop": ("drops",),
    "lr_step": ("step",),
    "lr_power": ("poly",),
    "lr_patience": ("plateau",),
    "lr_max_drops": ("plateau",),
}


_BUILT_IN = {"image_size": 64, "batch_size": 64, "epochs": 6, "keep_checkpoints": 0}
_FOLDER = {"keep_checkpoints": 2}
# What follows data and device, by whether there is a folder of images and by the device.
DEFAULTS: dict[tuple[bool, str], dict[str, int]] = {
    (False, "cpu"): {**_BUILT_IN, "workers": 1},
    (False, "cuda"): {**_BUILT_IN, "workers": 4},
    (True, "cpu"): {**_FOLDER, "image_size": 96, "batch_size": 64, "epochs": 10, "workers": 1},
    (True, "cuda"): {**_FOLDER, "image_size": 224, "batch_size": 128, "epochs": 90, "workers": 8},
}


@dataclass(frozen=True, kw_only=True)
class Settings(Recipe):
    """What a run does; an instance has everything filled in, but for what None has a meaning."""

    recipe: str | None = None
    data: Path | None = None
    init_from: Path | None = None
    freeze: str | None = None
    image_size: int
    batch_size: int
    epochs: int
    max_steps: int | None = None
    color_noise: str = "published"
    precision: str = "auto"
    fused_update: bool
    cuda_graph: bool
    seed: int = 0
    log_every: int = 10
    workers: int
    checkpoint_every: int | None = None  # steps; None: at the end of each epoch and after a time
    checkpoint_minutes: float = 10.0  # most that are lost to a kill
    keep_checkpoints: int
    tensorboard: bool = False
    timeout: float = 120.0  # seconds

    @classmethod
    def choose(cls, arguments: Mapping[str, Any], device_type: str, bf16: bool = False) -> Settings:
        """The settings that ``arguments``, from ``parse_arguments``, come to on a device.

        What was given wins over the recipe, and the recipe over data and device. ``bf16`` tells
        whether the device has tensor cores for bfloat16.

        Raises:
            ValueError: for an option that the schedule has no use for.
        """
        given = {n: arguments[n] for n in setting_names() if arguments[n] is not None}
        chosen = vars(RECIPES.get(arguments["recipe"], NO_RECIPE))
        values = {**plain_defaults(), **chosen, **given}
        for name, value in DEFAULTS[arguments["data"] is not None, device_type].items():
            values[name] = value if values.get(name) is None else values[name]
        published = values["image_size"] == _PUBLISHED_SIZE and "image_size" not in given
        if arguments["recipe"] is not None and published:
            values["image_size"] = get_variant(values["variant"]).image_size
        if values["precision"] == "auto":
            values["precision"] = "bf16" if bf16 else "float32"
        for name, schedules in PART_OF.items():
            if name in given and values["schedule"] not in schedules:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"{option} has no part in the schedule {values['schedule']}: leave it out, or "
                    f"add --schedule {' or '.join(schedules)}"
                )
        values.update(_execution(given, values["precision"], device_type))
        if "color_noise" in given and values["augmentation"] != "full":
            raise ValueError(
                f"--color-noise has no part in the augmentation {values['augmentation']}: leave it "
                "out, or add --augmentation full"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; ``from_dict`` undoes it."""
        paths = {n: str(v) for n, v in vars(self).items() if isinstance(v, Path)}
        return {**vars(self), **paths, "lr_drop": list(self.lr_drop)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], device_type: str = "cpu") -> Settings:
        """The inverse of ``to_dict``; what an older version did not know takes its default.

        Raises:
            ValueError: where a setting is unknown.
        """
        unknown = sorted(set(values) - set(setting_names()))
        if unknown:
            raise ValueError(
                "written by another version of fastalex, whose settings this one does not know: "
                f"{', '.join(unknown)}"
            )
        if set(values) != set(setting_names()):
            given = {n: values.get(n) for n in ("recipe", "data")}
            known = {**dict.fromkeys(setting_names()), **given}
            values = {**cls.choose(known, device_type).to_dict(), **values}
        paths = {n: Path(values[n]) for n in ("data", "init_from") if values[n] is not None}
        return cls(**{**values, **paths, "lr_drop": tuple(values["lr_drop"])})


def describe_setting(name: str, value: Any) -> str:
    """A setting as its option: ``--lr 0.1``, ``--no-fused-update``, ``no --recipe``."""
    option = name.replace("_", "-")
    if value is None:
        return f"no --{option}"
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"--{option} {text}"


def _execution(given: Mapping[str, Any], precision: str, device_type: str) -> dict[str, bool]:
    """How a step is executed; on a GPU as few kernels as can be, in one launch.

    Raises:
        ValueError: for what the device or the precision does not allow.
    """
    gpu, scaled = device_type == "cuda", precision == "fp16"
    fused = given.get("fused_update", gpu and not scaled)
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


def setting_names() -> list[str]:
    return [field.name for field in dataclasses.fields(Settings)]


def plain_defaults() -> dict[str, Any]:
    """The settings that follow neither data nor device, as they are without a recipe."""
    fields = dataclasses.fields(Settings)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
