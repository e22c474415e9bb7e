"""How the published AlexNets were trained, as data.

| name | what it is | source |
|---|---|---|
| paper | as the paper says it | P§2, P§4, P§5 |
| source2012 | as the authors' net 145 was trained | S:layers/layer-params-145.cfg and its log |
| caffe | BVLC's reference AlexNet | BVLC models/bvlc_alexnet/{solver,train_val}.prototxt |
| torchvision | the net that torchvision ships | pytorch/examples imagenet/main.py |

P§n is a section of the paper, S:file a file of the authors' 2012 program
(computerhistory/AlexNet-Source-Code). docs/training.md has the source of every number. What a
recipe leaves open is the size of the images, which follows data and device. Places in a schedule
are shares of the run, so that a shorter run keeps the shape of the published one.
"""

from __future__ import annotations

from typing import Any

INITIALISATIONS = {
    "he": "weights of variance 2 / fan-in, biases 0",
    "published": "as the authors of the variant drew theirs",
}
MOMENTUM_RULES = {
    "torch": "v <- m v + g + wd w, w <- w - lr v",
    "paper": "v <- m v - wd lr w - lr g, w <- w + v",
}
MOMENTUM_DTYPES = {
    "float32": "",
    "bf16": "stochastic rounding, --momentum-rule paper",
}
SCHEDULES = {
    "drops": "times --lr-gamma after each share of the run in --lr-drop",
    "plateau": "times --lr-gamma where the validation error stopped falling",
}

_SAME: dict[str, Any] = {
    "init": "published",
    "dropout": 0.5,
    "epochs": 90,
    "lr": 0.01,
    "momentum": 0.9,
    "lr_gamma": 0.1,
}

# The values of settings by the name of the recipe.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        **_SAME,
        "variant": "paper",
        "batch_size": 128,
        "momentum_rule": "paper",
        "weight_decay": 5e-4,
        "bias_lr": 1.0,  # P§5, "an equal learning rate for all layers"
        "bias_decay": 1.0,  # P§5 makes no exception
        "schedule": "plateau",  # P§5: "when the validation error rate stopped improving"
        "lr_patience": 5,  # ours: the authors judged by eye
        "lr_max_drops": 3,  # P§5, "reduced three times prior to termination"
        "augmentation": "full",
        "normalization": "mean-image",
    },
    "source2012": {
        **_SAME,
        "variant": "source2012",
        "batch_size": 128,
        "momentum_rule": "paper",
        "weight_decay": 5e-4,
        "bias_lr": 2.0,
        "bias_decay": 0.0,
        "bias_schedule": False,  # epsB is still .02 where the log ends with epsW 1e-5
        "schedule": "drops",
        "lr_drop": (25 / 90, 51 / 90, 79 / 90),  # the log: epochs 25, 51 and 79
        "augmentation": "full",
        "normalization": "mean-centre",
    },
    "caffe": {
        **_SAME,
        "variant": "caffe",
        "batch_size": 256,
        "momentum_rule": "paper",  # Caffe's SGDSolver has the rate inside the velocity too
        "weight_decay": 5e-4,
        "bias_lr": 2.0,
        "bias_decay": 0.0,
        "schedule": "drops",  # solver.prototxt: each 100,000 of 450,000 steps
        "lr_drop": (2 / 9, 4 / 9, 6 / 9, 8 / 9),
        "augmentation": "crop",
        "normalization": "mean-image",
    },
    "torchvision": {
        **_SAME,
        "variant": "owt",
        "batch_size": 256,
        "momentum_rule": "torch",
        "weight_decay": 1e-4,
        "bias_lr": 1.0,
        "bias_decay": 1.0,
        "schedule": "drops",  # main.py: every 30 epochs
        "lr_drop": (30 / 90, 60 / 90),
        "augmentation": "resized",
        "normalization": "imagenet",
    },
}
