"""How the published AlexNets were trained, as data.

| name | what it is | source |
|---|---|---|
| paper | as the paper says it | P§2, P§4, P§5 |
| source2012 | as the authors' net 145 was trained | S:layers/layer-params-145.cfg and its log |
| caffe | BVLC's reference AlexNet | BVLC models/bvlc_alexnet/{solver,train_val}.prototxt |
| torchvision | the net that torchvision ships | pytorch/examples imagenet/main.py |

P§n is a section of the paper, S:file a file of the authors' 2012 program
(computerhistory/AlexNet-Source-Code), C:file one of BVLC/caffe, T:file one of pytorch/examples.

What a recipe leaves open is the size of the images, which follows data and device. Places in a
schedule are shares of the run, so that a shorter run keeps the shape of the published one.
"""

from __future__ import annotations

from dataclasses import dataclass

INITIALISATIONS = {
    "he": "weights of variance 2 / fan-in, biases 0",
    "published": "as the authors of the variant drew theirs",
}
MOMENTUM_RULES = {
    "torch": "v <- m v + g + wd w, w <- w - lr v",
    "paper": "v <- m v - wd lr w - lr g, w <- w + v",
}
SCHEDULES = {
    "constant": "the same rate throughout",
    "drops": "times --lr-gamma after each share of the run in --lr-drop",
    "step": "times --lr-gamma after every --lr-step of the run",
    "plateau": "times --lr-gamma where the validation error stopped falling",
    "poly": "lr (1 - share of the run) ^ --lr-power",
    "cosine": "half a cosine from lr to 0",
}


@dataclass(frozen=True)
class Recipe:
    """What a run does where the command line is silent; the defaults are those without a recipe.

    None leaves a setting to data and device (``batch_size``, ``epochs``) or to the variant
    (``bias_lr``, ``bias_decay``).
    """

    variant: str = "paper"
    init: str = "he"
    dropout: float = 0.5
    batch_size: int | None = None
    epochs: int | None = None
    lr: float = 0.01
    momentum: float = 0.9
    momentum_rule: str = "torch"
    weight_decay: float = 5e-4
    bias_lr: float | None = None  # of the biases, as a multiple of lr
    bias_decay: float | None = None  # of the biases, as a multiple of weight_decay
    bias_schedule: bool = True  # False: the rate of the biases never drops
    schedule: str = "drops"
    warmup: float = 0.0  # share of the run in which the rate rises from 0 to lr
    lr_gamma: float = 0.1
    lr_drop: tuple[float, ...] = (0.8,)
    lr_step: float = 1 / 3
    lr_power: float = 1.0
    lr_patience: int = 5  # epochs without a better validation error before a drop
    lr_max_drops: int | None = None  # how often a plateau may drop the rate
    augmentation: str = "crop"
    normalization: str = "unit"


NO_RECIPE = Recipe()

RECIPES: dict[str, Recipe] = {
    "paper": Recipe(
        variant="paper",
        init="published",  # P§5: normal weights of deviation .01, biases 1 or 0
        dropout=0.5,  # P§4.2
        batch_size=128,  # P§5
        epochs=90,  # P§5, "roughly 90 cycles"
        lr=0.01,  # P§5
        momentum=0.9,  # P§5
        momentum_rule="paper",  # P§5, the equations
        weight_decay=5e-4,  # P§5
        bias_lr=1.0,  # P§5, "an equal learning rate for all layers"
        bias_decay=1.0,  # P§5 makes no exception
        schedule="plateau",  # P§5: divided by 10 "when the validation error rate stopped improving"
        lr_gamma=0.1,  # P§5
        lr_patience=5,  # ours: the authors judged by eye
        lr_max_drops=3,  # P§5, "reduced three times prior to termination"
        augmentation="full",  # P§4.1
        normalization="mean-image",  # P§2: mean subtracted from each pixel, raw otherwise
    ),
    "source2012": Recipe(
        variant="source2012",
        init="published",  # S:layers/layers-145.cfg
        dropout=0.5,  # S:layers/layers-145.cfg, hs1 and hs2
        batch_size=128,  # P§5
        epochs=90,  # the log: killed in epoch 91
        lr=0.01,  # the log: "from 0.01"
        momentum=0.9,  # S:layers/layer-params-145.cfg, momW and momB
        momentum_rule="paper",  # S:src/weights.cu, update()
        weight_decay=5e-4,  # S:layers/layer-params-145.cfg, wc
        bias_lr=2.0,  # S:layers/layer-params-145.cfg, epsB .02 beside epsW .01
        bias_decay=0.0,  # S:layer.py reads wc for weights alone
        bias_schedule=False,  # epsB is still .02 where the log ends with epsW 1e-5
        schedule="drops",  # by hand, as the log notes
        lr_gamma=0.1,  # the log
        lr_drop=(25 / 90, 51 / 90, 79 / 90),  # the log: epochs 25, 51 and 79
        augmentation="full",  # the log: "color noise ... from 0.1"
        normalization="mean-centre",  # S:convdata_jpeg.py, data_mean_crop
    ),
    "caffe": Recipe(
        variant="caffe",
        init="published",  # C:train_val.prototxt, weight_filler and bias_filler
        dropout=0.5,  # C:train_val.prototxt, drop6 and drop7
        batch_size=256,  # C:train_val.prototxt
        epochs=90,  # C:solver.prototxt: 450,000 steps of 256, 89.9 times 1,281,167 images
        lr=0.01,  # C:solver.prototxt, base_lr
        momentum=0.9,  # C:solver.prototxt
        momentum_rule="paper",  # Caffe's SGDSolver has the rate inside the velocity too
        weight_decay=5e-4,  # C:solver.prototxt
        bias_lr=2.0,  # C:train_val.prototxt, lr_mult of the second blob
        bias_decay=0.0,  # C:train_val.prototxt, decay_mult of the second blob
        schedule="step",  # C:solver.prototxt, lr_policy
        lr_gamma=0.1,  # C:solver.prototxt
        lr_step=100_000 / 450_000,  # C:solver.prototxt, stepsize of max_iter
        augmentation="crop",  # C:train_val.prototxt, mirror and crop_size 227
        normalization="mean-image",  # C:train_val.prototxt, mean_file
    ),
    "torchvision": Recipe(
        variant="owt",
        init="published",  # torchvision models/alexnet.py leaves it to torch's layers
        dropout=0.5,  # torchvision models/alexnet.py
        batch_size=256,  # T:imagenet/main.py
        epochs=90,  # T:imagenet/main.py
        lr=0.01,  # T:imagenet/README.md, for AlexNet
        momentum=0.9,  # T:imagenet/main.py
        momentum_rule="torch",  # T:imagenet/main.py, torch.optim.SGD
        weight_decay=1e-4,  # T:imagenet/main.py
        bias_lr=1.0,  # T:imagenet/main.py makes no exception
        bias_decay=1.0,  # T:imagenet/main.py makes no exception
        schedule="step",  # T:imagenet/main.py
        lr_gamma=0.1,  # T:imagenet/main.py
        lr_step=30 / 90,  # T:imagenet/main.py: every 30 epochs
        augmentation="resized",  # T:imagenet/main.py, RandomResizedCrop and a flip
        normalization="imagenet",  # T:imagenet/main.py
    ),
}
