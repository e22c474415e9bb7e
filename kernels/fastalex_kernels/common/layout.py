"""The HWNC memory layout: row, column, image, channel, the channel innermost.

A tensor [N, C, H, W] held this way has strides (C, 1, W*N*C, N*C). To its user it is an ordinary
NCHW tensor. To a kernel, one output pixel of all images is a contiguous block [N, C], and the next
column's block follows it, so that a tap of a convolution is a shift of the first row: no im2col,
no halo.
"""

from __future__ import annotations

from torch import Tensor


def as_hwnc(x: Tensor) -> Tensor:
    """View ``x`` [N, C, H, W] as a contiguous [H, W, N, C], a copy if its memory differs."""
    return x.permute(2, 3, 0, 1).contiguous()


def as_nchw(x: Tensor) -> Tensor:
    """View ``x`` [H, W, N, C] as [N, C, H, W], without a copy."""
    return x.permute(2, 3, 0, 1)


def hwnc_strided(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] itself where its memory is HWNC, else a copy of which that is true.

    This is what a function saves for backward, as a view of its input would hide from autograd's
    message what was changed in place.
    """
    hwnc = x.permute(2, 3, 0, 1)
    return x if hwnc.is_contiguous() else as_nchw(hwnc.contiguous())


def empty_nchw(like: Tensor, size: tuple[int, int, int, int]) -> Tensor:
    """Allocate [N, C, H, W] with HWNC memory, of the dtype and on the device of ``like``.

    The allocation itself and not a view of one: autograd refuses to change a view that a custom
    function returned in place.
    """
    N, C, _, W = size
    return like.new_empty_strided(size, (C, 1, W * N * C, N * C))
