"""Augmentation: which crop, mirror and colour an image gets, and a batch that got them.

Crop, mirror and colour of an image are functions of (seed, epoch, index) alone. ``augment`` applies
them to a whole batch, and draws nothing itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

AUGMENTATIONS = {
    "none": "the centre crop",
    "crop": "a random crop, mirrored half the time (P§4.1)",
    "full": "crop, mirror and the colour noise of P§4.1",
}

# Of the pixels of the ILSVRC-2012 training images, 0 to 255: the square roots of the covariance's
# eigenvalues, and its eigenvectors as columns. Source: C2:make-data/input_meta.
_COLOR_STD = np.array([19.7208, 37.0939, 121.7801])
_COLOR_VECTORS = np.array(
    [[0.41796, -0.71258, -0.56351], [-0.81698, -0.02354, -0.57618], [0.39731, 0.70120, -0.59200]]
)
_COLOR_SHARE = 0.1  # deviation of alpha, P§4.1

# With colour noise the authors divide the zero-mean image by this, so that what the net sees in
# training has the scale of what it sees in validation. Source: S:convdata_jpeg.py.
COLOR_SCALE = 1 + _COLOR_SHARE


def augment(
    images: torch.Tensor,
    tops: torch.Tensor,
    lefts: torch.Tensor,
    mirrors: torch.Tensor,
    color: torch.Tensor | None,
    mean: torch.Tensor,
    std: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """Crop, mirror, shift the colour of and normalise each image of a batch.

        y = (crop + color - mean) / std, mirrored where asked

    Args:
        images: uint8 [N, H, W, 3], on any device.
        tops, lefts: int64 [N], the first row and column of each crop; the crop lies inside.
        mirrors: bool [N], which crops are mirrored left to right.
        color: float32 [N, 3], added to every pixel of an image, on the scale 0 to 255; or None.
        mean: float32 [3], or [size, size, 3] for a mean image, which is not mirrored.
        std: float32 [3].
        size: side in pixels of the crops.

    Returns:
        float32 [N, 3, size, size], stored channels last.

    Source: P§2, P§4.1.
    """
    line = torch.arange(size, device=images.device)
    rows = tops[:, None] + line
    columns = lefts[:, None] + torch.where(mirrors[:, None], size - 1 - line, line)
    batch = torch.arange(len(images), device=images.device)
    pixels = images[batch[:, None, None], rows[:, :, None], columns[:, None, :]].float()
    if color is not None:
        pixels += color[:, None, None]
    return pixels.sub_(mean).div_(std).permute(0, 3, 1, 2)


def color_noise(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """float32 [N, 3]: what P§4.1 adds to the pixels of each image, from four random words each.

    sum over i of alpha_i s_i p_i, alpha normal of deviation .1, s the square root of an eigenvalue
    of the covariance of the pixels and p its eigenvector. The paper prints the eigenvalue itself;
    its authors' program takes the root, as here.

    Args:
        words: [N, 4], any 64 bits each.

    Source: P§4.1; S:convdata_jpeg.py.
    """
    uniforms = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # never 0
    radius, angle = np.sqrt(-2 * np.log(uniforms[:, :2])), 2 * np.pi * uniforms[:, 2:]
    normals = np.stack([radius[:, 0], radius[:, 0], radius[:, 1]], 1) * np.stack(
        [np.cos(angle[:, 0]), np.sin(angle[:, 0]), np.cos(angle[:, 1])], 1
    )
    noise: npt.NDArray[np.float64] = (_COLOR_SHARE * normals * _COLOR_STD) @ _COLOR_VECTORS.T
    return noise.astype(np.float32)
