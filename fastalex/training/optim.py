"""The optimizers of a run: stochastic gradient descent by the papers' rule and by torch's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastalex.model.alexnet import AlexNet
from fastalex_kernels.momentum import RULES

BUFFER = "momentum_buffer"  # where both rules keep it, as torch does


class PaperSGD(torch.optim.Optimizer):
    """SGD with the learning rate inside the velocity, as the paper and Caffe have it.

        v <- momentum v - weight_decay lr w - lr g
        w <- w + v

    ``torch.optim.SGD`` applies the rate to the velocity instead. With a constant rate the two are
    one; after a drop this one goes on with steps of the old size for a while, torch's does not.

    Args:
        params: parameters, or groups of them with options of their own.
        lr: learning rate, >= 0.
        momentum: in [0, 1).
        weight_decay: >= 0.

    Source: P§5; S:src/weights.cu.
    """

    # Gradients that float16 could not hold change nothing, and no host looks at them: GradScaler
    # hands ``step`` the attributes found_inf and grad_scale.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; ``closure`` recomputes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skipped: Any = getattr(self, "found_inf", None)
        scale: Any = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            options = [group[name] for name in ("lr", "momentum", "weight_decay")]
            for w in group["params"]:
                if w.grad is None:
                    continue
                if BUFFER not in self.state[w]:
                    self.state[w][BUFFER] = torch.zeros_like(w)
                v, g = self.state[w][BUFFER], w.grad if scale is None else w.grad / scale
                before = None if skipped is None else (w.clone(), v.clone())
                RULES["paper"](w, v, g, *options)
                if before is not None:
                    w.copy_(torch.where(skipped > 0, before[0], w))
                    v.copy_(torch.where(skipped > 0, before[1], v))
        return loss


def build_optimizer(
    model: AlexNet,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    rule: str = "torch",
    bias_lr: float | None = None,
    bias_decay: float | None = None,
    bias_schedule: bool = True,
) -> torch.optim.Optimizer:
    """SGD with momentum over ``model``'s parameters, weights and biases as two groups.

    Args:
        model: whole, or one tower of it; its parameters must not be replaced afterwards.
        lr: learning rate of the weights, >= 0.
        momentum: in [0, 1).
        weight_decay: of the weights, >= 0.
        rule: ``"torch"``, v <- m v + g + wd w, w <- w - lr v; ``"paper"``, see ``PaperSGD``.
        bias_lr: rate of the biases as a multiple of ``lr``; None is the variant's.
        bias_decay: decay of the biases as a multiple of ``weight_decay``; None is the variant's.
        bias_schedule: whether ``set_learning_rate`` steers the biases too.

    Returns:
        The optimizer, for ``set_learning_rate`` to steer; its first group holds the weights.

    Raises:
        ValueError: for a negative ``lr`` or ``weight_decay``, a ``momentum`` out of its range, or
            another rule.

    Source: P§5; S:layers/layer-params-145.cfg; BVLC models/bvlc_alexnet/train_val.prototxt.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    if bias_lr is None:
        bias_lr = model.variant.bias_lr_multiplier
    if bias_decay is None:
        bias_decay = float(model.variant.bias_weight_decay)
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in named if not name.endswith("bias")], "lr_multiplier": 1.0},
        {
            "params": [p for name, p in named if name.endswith("bias")],
            "lr_multiplier": bias_lr,
            "weight_decay": bias_decay * weight_decay,
            "fixed_lr": None if bias_schedule else bias_lr * lr,
        },
    ]
    # Fused: one pass over weights, gradients and velocities instead of five.
    kind = PaperSGD if rule == "paper" else partial(torch.optim.SGD, fused=True)
    optimizer = kind(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
    # From zero, not from the first gradient: torch's fused step makes the buffers without filling
    # them, and where the first step overflows in float16 it leaves them like that.
    for parameter in model.parameters():
        optimizer.state[parameter][BUFFER] = torch.zeros_like(parameter)
    set_learning_rate(optimizer, lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Train with ``lr`` from the next step on; biases with their multiple of it, or their own."""
    for group in optimizer.param_groups:
        fixed = group.get("fixed_lr")
        group["lr"] = lr * group["lr_multiplier"] if fixed is None else fixed


class Rates:
    """The rates of an optimizer in device memory, where kernels read them.

    Three float32 for each group: learning rate, momentum, weight decay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._of: dict[torch.Tensor, torch.Tensor] = {}
        self._written: list[list[float]] = []
        for group in optimizer.param_groups:
            rates = torch.full((3,), math.nan, device=group["params"][0].device)
            self._of.update(dict.fromkeys(group["params"], rates))
            self._written.append([math.nan] * 3)

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The rates of a parameter's group; ``follow`` changes them in place."""
        return self._of[parameter]

    def follow(self) -> None:
        """Write what is new in ``param_groups``: a rate that stays costs no launch."""
        for group, written in zip(self._optimizer.param_groups, self._written, strict=True):
            for place, name in enumerate(("lr", "momentum", "weight_decay")):
                if group[name] != written[place]:
                    written[place] = float(group[name])
                    # Filled and not copied: a copy from the host waits for the GPU to be done.
                    self._of[group["params"][0]][place].fill_(written[place])


def update_rule(optimizer: torch.optim.Optimizer) -> str:
    """The rule of ``fastalex_kernels.momentum.RULES`` that an optimizer follows.

    Raises:
        ValueError: where it follows another, or has an option that this one has not.
    """
    if type(optimizer) is PaperSGD:
        return "paper"
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(
            f"optimizer: expected torch.optim.SGD or PaperSGD, got {type(optimizer).__name__}"
        )
    for group in optimizer.param_groups:
        for name in ("dampening", "nesterov", "maximize"):
            if group[name]:
                raise ValueError(f"optimizer: {name}={group[name]} is not what the kernels apply")
    return "torch"


def gradient_norms(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The Euclidean norm of each parameter's ``grad``, float64 scalars.

    torch sums a norm on a CPU one element after the other: in float32 that loses three digits over
    the 38 million of fc6.
    """
    return {
        name: torch.linalg.vector_norm(p.grad, dtype=torch.float64)
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def momentum_buffers(model: AlexNet, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The momentum buffer of each parameter by name, as ``set_momentum_buffers`` takes them."""
    return {name: optimizer.state[p][BUFFER] for name, p in model.named_parameters()}


def set_momentum_buffers(
    model: AlexNet, optimizer: torch.optim.Optimizer, values: dict[str, torch.Tensor]
) -> None:
    """Go on with ``values``, from ``momentum_buffers``, in the memory layout of the parameters."""
    for name, buffer in momentum_buffers(model, optimizer).items():
        buffer.copy_(values[name])
