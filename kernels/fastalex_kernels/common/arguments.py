"""What a public function checks of its arguments, and in which dtype it hands them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the Triton kernels store
FLOATING = (*DTYPES, torch.float64)


def expect(held: bool, name: str, expected: str, *values: object) -> None:
    """Raise a ValueError unless it ``held``; of what was ``expected``, with ``values`` put in."""
    if not held:
        raise ValueError(f"{name}: expected {expected.format(*values)}")


def check_dtype(name: str, dtype: object, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """Raise a TypeError unless ``dtype`` is one of ``dtypes``."""
    if dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {dtype}")


def check_tensor(
    name: str,
    x: object,
    dtypes: Sequence[torch.dtype] = FLOATING,
    device: torch.device | None = None,
    *shapes: tuple[int, ...],
) -> None:
    """Raise unless ``x`` is a tensor of one of the dtypes, and of the device and a shape given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    check_dtype(name, x.dtype, dtypes)
    expect(device in (None, x.device), name, "device {}, got {}", device, x.device)
    shape = tuple(x.shape)
    if shapes and shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {shape}")


def check_int(name: str, value: object, least: int, most: int) -> None:
    """Raise unless ``value`` is an int from ``least`` to ``most``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    expect(least <= value <= most, name, "{} to {}, got {}", least, most, value)


def check_number(name: str, value: object) -> None:
    """Raise a TypeError unless ``value`` is an int or a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_groups(groups: object, channels: int) -> None:
    """Raise unless ``groups`` equal parts make up the channels."""
    divides = isinstance(groups, int) and groups > 0 and channels % groups == 0
    expect(divides, "groups", "a divisor of {} channels, got {!r}", channels, groups)


def aligned(x: Tensor) -> bool:
    """Whether ``x`` starts at a multiple of 16 bytes, as wide loads need."""
    if backend.recorder() is not None:  # it may have no memory, and starts where its storage does
        return x.storage_offset() * x.element_size() % 16 == 0
    return x.data_ptr() % 16 == 0


def interpretable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """bfloat16 tensors as float32 where the kernels are interpreted, anything else as it is.

    The interpreter computes bfloat16 on its raw bits. Kernels sum in float32 anyway, so a result
    that is rounded afterwards is what a GPU gives.
    """
    if not backend.interpreted():
        return tensors
    return tuple(t.float() if t is not None and t.dtype == torch.bfloat16 else t for t in tensors)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors as ``torch.autocast`` wants the operands of a product, where it is enabled."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):  # which raises for "meta"
        return tensors
    dtype = torch.get_autocast_dtype(device)
    cast = lambda t: t.to(dtype) if isinstance(t, Tensor) and t.dtype in DTYPES else t  # noqa: E731
    return tuple(cast(t) for t in tensors)


def placed(results: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients, of which only those needed were made, each in the place of its argument."""
    rest = iter(results)
    return [next(rest) if need else None for need in needs]
