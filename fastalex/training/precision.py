"""Mixed precision: products in a narrow type, weights and sums in float32."""

from __future__ import annotations

import torch

from fastalex.distributed.context import ParallelContext

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A context in which a net computes in ``precision``, one of ``config.PRECISIONS``."""
    narrow = _NARROW.get(precision)
    return torch.autocast(device.type, narrow or torch.bfloat16, enabled=narrow is not None)


class LossScaler(torch.amp.GradScaler):
    """Dynamic loss scaling on which all processes agree; does nothing unless ``enabled``.

    Two towers hold different gradients of one net, and exchange some of them: where one overflows,
    both leave the step out, and both go on with the same scale.
    """

    def __init__(self, parallel: ParallelContext, enabled: bool) -> None:
        super().__init__(parallel.device.type, enabled=enabled)
        self._parallel = parallel

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and look for one that is not finite, everywhere."""
        super().unscale_(optimizer)
        if self.is_enabled():
            for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                self._parallel.all_reduce_max(found)
