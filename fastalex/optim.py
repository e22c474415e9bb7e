"""The optimizer of a run: stochastic gradient descent with each variant's rules for biases."""

from __future__ import annotations

from typing import Any

import torch

from fastalex.model import AlexNet


def build_optimizer(
    model: AlexNet, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4
) -> torch.optim.SGD:
    """SGD over ``model``'s parameters: v <- momentum v + (g + weight_decay w); w <- w - lr v.

    Weights and biases are two groups. The authors' program and Caffe train biases at twice the
    rate and without decay, and so do the variants ``source2012`` and ``caffe``.

    Args:
        model: whole, or one tower of it; its parameters must not be replaced afterwards.
        lr: learning rate of the weights, >= 0.
        momentum: in [0, 1).
        weight_decay: of the weights, >= 0.

    Returns:
        The optimizer, for ``set_learning_rate`` to steer; its first group holds the weights.

    Raises:
        ValueError: for a negative ``lr`` or ``weight_decay``, or a ``momentum`` out of its range.

    Source: P§5; S:layers/layer-params-145.cfg; BVLC models/bvlc_alexnet/train_val.prototxt.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    variant = model.variant
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not name.endswith("bias")], "lr_multiplier": 1.0},
        {
            "params": [p for name, p in named if name.endswith("bias")],
            "lr_multiplier": variant.bias_lr_multiplier,
            "weight_decay": weight_decay if variant.bias_weight_decay else 0.0,
        },
    ]
    # Fused: one pass over weights, gradients and velocities instead of five.
    optimizer = torch.optim.SGD(
        groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True
    )
    set_learning_rate(optimizer, lr)
    return optimizer


def learning_rate(lr: float, step: int, steps: int, drop: float) -> float:
    """The rate of a step of a run: ``lr``, and a tenth of it for the last steps.

    Args:
        lr: at the start.
        step: from 1 to ``steps``.
        steps: of the whole run.
        drop: share of the steps that keep ``lr``; 1 is all.

    Source: P§5 divides by 10 where the validation error stops falling.
    """
    return lr if step <= drop * steps else lr / 10


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Train with ``lr`` from the next step on; biases with their multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
