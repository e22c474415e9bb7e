"""The four published AlexNets, as data.

| name | what it is | source |
|---|---|---|
| paper | the net as the paper prints it | Krizhevsky et al., NIPS 2012 |
| source2012 | the authors' net 145, which logged the paper's errors | S:layers/layers-145.cfg |
| caffe | the widely copied single-GPU net, LRN across groups | BVLC models/bvlc_alexnet |
| owt | "one weird trick": one tower, no LRN, as in torchvision | torchvision models/alexnet.py |

P§n is a section of the paper, S:file a file of the authors' 2012 program
(computerhistory/AlexNet-Source-Code).
"""

from __future__ import annotations

from fastalex.model.ablations import edit, split_name
from fastalex.model.specification import Convolution, FullyConnected, ResponseNorm, Variant


def _two_towers(
    *,
    norm: ResponseNorm,
    ceil_mode: bool,
    bias: float = 1.0,
    late_std: float = 0.01,
    hidden_std: float = 0.01,
    relu_after_pool: bool = False,
    spatial_norm: ResponseNorm | None = None,
) -> tuple[tuple[Convolution, ...], tuple[FullyConnected, ...]]:
    """The layers of P§3.5, with what the published copies change."""
    convolutions = (
        Convolution(
            96,
            11,
            stride=4,
            ceil_mode=ceil_mode,
            norm=norm,
            pool=True,
            relu_after_pool=relu_after_pool,
        ),
        Convolution(
            256, 5, padding=2, groups=2, bias=bias, norm=norm, spatial_norm=spatial_norm, pool=True
        ),
        Convolution(384, 3, padding=1, weight_std=late_std),
        Convolution(384, 3, padding=1, groups=2, weight_std=late_std, bias=bias),
        Convolution(256, 3, padding=1, groups=2, weight_std=late_std, bias=bias, pool=True),
    )
    hidden = FullyConnected(4096, weight_std=hidden_std, bias=bias)
    return convolutions, (hidden, hidden, FullyConnected(None))


_PAPER = _two_towers(norm=ResponseNorm(k=2.0, alpha=5e-4, groups=2), ceil_mode=True)
_SOURCE2012 = _two_towers(
    norm=ResponseNorm(k=2.0, alpha=1e-4, groups=2),
    ceil_mode=True,
    late_std=0.03,
    relu_after_pool=True,
    spatial_norm=ResponseNorm(k=1.0, alpha=1e-3),
)
_CAFFE = _two_towers(
    norm=ResponseNorm(k=1.0, alpha=1e-4), ceil_mode=False, bias=0.1, hidden_std=0.005
)
_OWT = (
    (
        Convolution(64, 11, stride=4, padding=2, weight_std=None, pool=True),
        Convolution(192, 5, padding=2, weight_std=None, pool=True),
        Convolution(384, 3, padding=1, weight_std=None),
        Convolution(256, 3, padding=1, weight_std=None),
        Convolution(256, 3, padding=1, weight_std=None, pool=True),
    ),
    (FullyConnected(4096, None), FullyConnected(4096, None), FullyConnected(None, None)),
)

VARIANTS: dict[str, Variant] = {
    # P§3.3 prints alpha = 1e-4 undivided, which is 5e-4 before a division by the window's 5.
    "paper": Variant("paper", *_PAPER, towers=2),
    "source2012": Variant(
        "source2012", *_SOURCE2012, towers=2, bias_lr_multiplier=2.0, bias_weight_decay=False
    ),
    "caffe": Variant(
        "caffe", *_CAFFE, image_size=227, bias_lr_multiplier=2.0, bias_weight_decay=False
    ),
    "owt": Variant("owt", *_OWT, pool_ceil_mode=False, dropout_on_input=True),
}


def get_variant(variant: str | Variant) -> Variant:
    """The variant of a name; one that is given stays as it is.

    Args:
        variant: one of ``VARIANTS``, alone or with what ``ablations.edited_name`` adds to it, as in
            ``"paper-without-lrn"``.

    Raises:
        ValueError: for an unknown name, listing the known ones, and for an edit that this variant
            can't have.
    """
    if isinstance(variant, Variant):
        return variant
    base, without, half = split_name(variant) if isinstance(variant, str) else (variant, (), False)
    if base not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    return edit(VARIANTS[base], without, half)
