"""What a public function checks of its tensors, and in which dtype it hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastalex_kernels.common import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels store


def check_floating(name: str, x: object) -> None:
    """Raise a TypeError unless ``x`` is a tensor of a dtype this package computes in."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_like(name: str, x: object, like: torch.Tensor) -> None:
    """Raise unless ``x`` is a tensor of the dtype and on the device of ``like``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected dtype {like.dtype} as the input's, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as the input's, got {x.device}")


def aligned(x: torch.Tensor) -> bool:
    """Whether ``x`` starts at a multiple of 16 bytes, as wide loads need."""
    if backend.recorder() is not None:  # it may have no memory, and starts where its storage does
        return x.storage_offset() * x.element_size() % 16 == 0
    return x.data_ptr() % 16 == 0


def interpretable(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """bfloat16 tensors as float32 where the kernels are interpreted, anything else as it is.

    The interpreter computes bfloat16 on its raw bits. Kernels sum in float32 anyway, so a result
    that is rounded afterwards is what a GPU gives.
    """
    if not backend.interpreted():
        return tensors
    return tuple(t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in tensors)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as ``torch.autocast`` wants the operands of a product, where it is enabled."""
    device = tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu"
    available = torch.amp.autocast_mode.is_autocast_available(device)
    if not available or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    cast = lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in DTYPES else t  # noqa: E731
    return tuple(cast(t) for t in tensors)


def placed(results: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """Gradients, of which only those needed were made, each in the place of its argument."""
    rest = iter(results)
    return [next(rest) if need else None for need in needs]
