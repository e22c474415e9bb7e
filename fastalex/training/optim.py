"""The optimizers of a run: stochastic gradient descent by the papers' rule and by torch's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastalex.distributed.towers import first_elements
from fastalex.model.alexnet import AlexNet
from fastalex_kernels.momentum import RULES, round_stochastically

BUFFER = "momentum_buffer"  # where both rules keep it, as torch does
BUFFERS = {"float32": torch.float32, "bf16": torch.bfloat16}  # dtypes, as options name them


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
        momentum_dtype: of the velocities of matrices, to which bfloat16 rounds stochastically; the
            sums, and all other velocities, are float32.
        seed: of the rounding, which is a function of seed, step, the parameter's number and the
            element's place. A group may have ``places`` of its parameters: row and column in the
            larger matrices that they are parts of. ``step`` counts in each group.

    Raises:
        ValueError: for another ``momentum_dtype``.

    Source: P§5; S:src/weights.cu.
    """

    # Gradients that float16 could not hold change nothing, and no host looks at them: GradScaler
    # hands ``step`` the attributes found_inf and grad_scale.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        momentum_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        rounds = {"momentum_dtype": momentum_dtype, "seed": seed, "step": 0, "places": ()}
        super().__init__(params, rates | rounds)
        for group in self.param_groups:
            _check_dtype(group["momentum_dtype"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            for w in group["params"]:
                if BUFFER in self.state[w]:  # to which torch gave the weight's dtype
                    self.state[w][BUFFER] = self.state[w][BUFFER].to(buffer_dtype(group, w))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; ``closure`` recomputes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skipped: Any = getattr(self, "found_inf", None)
        scale: Any = getattr(self, "grad_scale", None)
        count_step(self)
        held = rounding(self)
        rows = itertools.repeat(None) if held is None else iter(held)
        for group in self.param_groups:
            options = [group[name] for name in ("lr", "momentum", "weight_decay")]
            for w, rng in zip(group["params"], rows, strict=False):
                if w.grad is None:
                    continue
                if BUFFER not in self.state[w]:
                    self.state[w][BUFFER] = torch.zeros_like(w, dtype=buffer_dtype(group, w))
                v, g = self.state[w][BUFFER], w.grad if scale is None else w.grad / scale
                before = None if skipped is None else (w.clone(), v.clone())
                wide = v.float()
                RULES["paper"](w, wide, g, *options)
                if rng is not None and v is not wide:
                    round_stochastically(wide, rng, v)
                if before is not None:
                    w.copy_(torch.where(skipped > 0, before[0], w))
                    v.copy_(torch.where(skipped > 0, before[1], v))
        return loss


def _check_dtype(momentum_dtype: torch.dtype) -> None:
    if momentum_dtype not in BUFFERS.values():
        raise ValueError(
            f"momentum_dtype: expected torch.float32 or torch.bfloat16, got {momentum_dtype}"
        )


def build_optimizer(
    model: AlexNet,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    rule: str = "torch",
    bias_lr: float | None = None,
    bias_decay: float | None = None,
    bias_schedule: bool = True,
    momentum_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    step: int = 0,
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
        momentum_dtype: of the fully connected weights' momentum buffers: float32 or, with the rule
            ``"paper"``, bfloat16, see ``PaperSGD``. Two towers round as one process does.
        seed: of the rounding.
        step: after which the run goes on.

    Returns:
        The optimizer, for ``set_learning_rate`` to steer; its first group holds the weights.

    Raises:
        ValueError: for a negative ``lr`` or ``weight_decay``, a ``momentum`` out of its range,
            another rule or dtype, or bf16 by torch's rule.

    Source: P§5; S:layers/layer-params-145.cfg; BVLC models/bvlc_alexnet/train_val.prototxt.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    _check_dtype(momentum_dtype)
    if momentum_dtype != torch.float32 and rule != "paper":
        raise ValueError(f"momentum_dtype: {momentum_dtype} needs the rule 'paper', got {rule!r}")
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
    kind: Any = partial(torch.optim.SGD, fused=True)
    if rule == "paper":
        kind = partial(PaperSGD, momentum_dtype=momentum_dtype, seed=seed)
        first = first_elements(model)
        for group in groups:
            group |= {"step": step, "places": [first.get(p, (0, 0)) for p in group["params"]]}
    optimizer: torch.optim.Optimizer = kind(
        groups, lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    # From zero, not from the first gradient: torch's fused step makes the buffers without filling
    # them, and where the first step overflows in float16 it leaves them like that.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            dtype = buffer_dtype(group, parameter)
            optimizer.state[parameter][BUFFER] = torch.zeros_like(parameter, dtype=dtype)
    set_learning_rate(optimizer, lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Train with ``lr`` from the next step on; biases with their multiple of it, or their own."""
    for group in optimizer.param_groups:
        fixed = group.get("fixed_lr")
        group["lr"] = lr * group["lr_multiplier"] if fixed is None else fixed


def count_step(optimizer: torch.optim.Optimizer) -> None:
    """Another step begins, in which ``PaperSGD`` rounds anew; torch's optimizers don't count."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] += 1


def buffer_dtype(group: dict[str, Any], parameter: torch.Tensor) -> torch.dtype:
    """Of the momentum buffer of a parameter in a group of an optimizer."""
    narrow = group.get("momentum_dtype") == torch.bfloat16 and parameter.dim() == 2
    return torch.bfloat16 if narrow else torch.float32


def rounding(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    """What rounds its momentum buffers now: int64 [parameters, 5], as ``random_bits`` takes a row.

    On the parameters' device, in the order of the groups; None where all buffers are float32.
    """
    groups, rows = optimizer.param_groups, list[tuple[int, ...]]()
    if all(group.get("momentum_dtype") != torch.bfloat16 for group in groups):
        return None
    for group in groups:
        places = group["places"] or [(0, 0)] * len(group["params"])
        rows += [(group["seed"], group["step"], len(rows) + i, *at) for i, at in enumerate(places)]
    return torch.tensor(rows, device=groups[0]["params"][0].device)


class Rates:
    """The rates of an optimizer, and its rounding, in device memory, where kernels read them.

    Three float32 for each group: learning rate, momentum, weight decay.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self._rounding = optimizer, rounding(optimizer)
        self._of: dict[torch.Tensor, torch.Tensor] = {}
        self._written: list[list[float]] = []
        for group in optimizer.param_groups:
            rates = torch.full((3,), math.nan, device=group["params"][0].device)
            self._of.update(dict.fromkeys(group["params"], rates))
            self._written.append([math.nan] * 3)
        dtypes = [buffer_dtype(g, p) for g in optimizer.param_groups for p in g["params"]]
        held = zip(self._of, dtypes, () if self._rounding is None else self._rounding, strict=False)
        self._rngs = {p: row for p, dtype, row in held if dtype == torch.bfloat16}
        self._seed = optimizer.param_groups[0].get("seed")

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The rates of a parameter's group; ``follow`` changes them in place."""
        return self._of[parameter]

    def rng(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """What rounds a parameter's momentum buffer; None where it is float32."""
        return self._rngs.get(parameter)

    def follow(self) -> None:
        """Write what is new in ``param_groups``: a rate that stays costs no launch."""
        if self._rounding is not None:  # filled, as below
            first = self._optimizer.param_groups[0]
            if first["seed"] != self._seed:
                self._seed = first["seed"]
                self._rounding[:, 0].fill_(self._seed)
            self._rounding[:, 1].fill_(first["step"])
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
