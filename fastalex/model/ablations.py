"""The paper's ablations: edits of a variant's data, and what each was published to cost.

A name says what was edited, ``"paper-without-lrn+conv4"`` or ``"paper-half"``, so that settings,
weights files and ``fastalex.AlexNet`` need nothing more to make the same net again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastalex.model.variants import FOREIGN, VARIANTS, Convolution, ResponseNorm, Variant

_WITHOUT, _HALF = "-without-", "-half"


def _lrn(variant: Variant) -> Variant:
    """No response normalisation, across maps or within one."""
    if not any(c.norm for c in variant.convolutions):
        raise ValueError(f"--without lrn: variant {variant.name} has none")
    # Max-pooling and ReLU can change places where no norm stands between.
    return _map(variant, lambda c: replace(c, norm=None, spatial_norm=None, relu_after_pool=False))


def _overlap(variant: Variant) -> Variant:
    """Pooling of 2 x 2 with stride 2; rounded down, as many outputs as overlapping ones have."""
    edited = _map(variant, lambda c: replace(c, pool_size=2))
    return replace(edited, pool_ceil_mode=False)


def _convolution(number: int) -> Callable[[Variant], Variant]:
    def remove(variant: Variant) -> Variant:
        """A convolution and its ReLU; a pooling after it stays."""
        layers = list(variant.convolutions)
        layers[number - 1] = replace(layers[number - 1], removed=True)
        return replace(variant, convolutions=tuple(layers))

    return remove


def _hidden(index: int) -> Callable[[Variant], Variant]:
    def remove(variant: Variant) -> Variant:
        """A fully connected layer with its ReLU and dropout."""
        layers = list(variant.fully_connected)
        layers[index] = replace(layers[index], removed=True)
        return replace(variant, fully_connected=tuple(layers))

    return remove


def _tower_traffic(variant: Variant) -> Variant:
    """Two towers that meet in the last layer alone: groups in conv3, fc6 and fc7, and in LRN."""
    if variant.convolutions[1].groups != 2:
        raise ValueError(f"--without tower-traffic: {variant.name} has one tower")

    def apart(convolution: Convolution) -> Convolution:
        return replace(convolution, groups=2, norm=_grouped(convolution.norm, 2))

    first, *rest = variant.convolutions
    convolutions = (replace(first, norm=_grouped(first.norm, 2)), *map(apart, rest))
    hidden = tuple(replace(layer, groups=2) for layer in variant.fully_connected[:-1])
    return replace(
        variant,
        convolutions=convolutions,
        fully_connected=(*hidden, variant.fully_connected[-1]),
    )


def _halve(variant: Variant) -> Variant:
    """One tower with half the kernels but for the last convolution (P§3.2, footnote)."""
    *front, last = variant.convolutions

    def whole(convolution: Convolution, channels: int) -> Convolution:
        norm = _grouped(convolution.norm, 1)
        return replace(convolution, channels=channels, groups=1, norm=norm)

    convolutions = (*(whole(c, c.channels // 2) for c in front), whole(last, last.channels))
    return replace(variant, convolutions=convolutions, towers=1)


def _map(variant: Variant, change: Callable[[Convolution], Convolution]) -> Variant:
    return replace(variant, convolutions=tuple(map(change, variant.convolutions)))


def _grouped(norm: ResponseNorm | None, groups: int) -> ResponseNorm | None:
    return None if norm is None else replace(norm, groups=groups)


_EDITS: dict[str, Callable[[Variant], Variant]] = {
    "lrn": _lrn,
    "overlap": _overlap,
    "conv3": _convolution(3),
    "conv4": _convolution(4),
    "conv5": _convolution(5),
    "fc6": _hidden(0),
    "fc7": _hidden(1),
    "tower-traffic": _tower_traffic,
}
# Changes of how a net is trained, by the option of fastalex.train.
_SETTINGS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.0},
    "augmentation": {"augmentation": "none"},
}
ABLATIONS = (*_EDITS, *_SETTINGS)


@dataclass(frozen=True)
class Loss:
    """What an ablation was published to cost, in percentage points of error.

    Attributes:
        top1, top5: None where no number is printed.
        source: where it is printed.
        note: what differs from the edit here.
    """

    top1: float | None
    top5: float | None
    source: str
    note: str = ""


_MIDDLE = Loss(2.0, None, "P§7", "about 2, for any of the middle layers")
LOSSES: dict[str, Loss] = {
    "lrn": Loss(1.4, 1.2, "P§3.3"),
    "overlap": Loss(0.4, 0.3, "P§3.4"),
    "half": Loss(1.7, 1.2, "P§3.2"),
    "tower-traffic": Loss(
        1.2,
        1.1,
        "S:layers/layer-params-150.cfg",
        "net 150 has 320 maps in conv2, 8192 units in fc6",
    ),
    "conv3": _MIDDLE,
    "conv4": _MIDDLE,
    "conv5": _MIDDLE,
}


def edit(variant: Variant, without: Sequence[str] = (), half: bool = False) -> Variant:
    """``variant`` with parts taken out.

    Args:
        variant: one of the published ones.
        without: names among ``ABLATIONS``; those that change only the training change nothing here.
        half: one tower with half the kernels.

    Returns:
        The edited variant, called as ``edited_name`` says; with no edit, ``variant`` itself.

    Raises:
        ValueError: for an unknown name, and where the variant lacks what is to be taken out.

    Source: P§3.2, P§3.3, P§3.4, P§7; S:layers/layers-150.cfg, layers-145-half.cfg.
    """
    for name in without:
        if name not in ABLATIONS:
            raise ValueError(f"--without: expected {', '.join(ABLATIONS)}, got {name!r}")
    if half and "tower-traffic" in without:
        raise ValueError("--without tower-traffic: a net cut to half has one tower")
    edited = _halve(variant) if half else variant
    for name in ABLATIONS:
        if name in without and name in _EDITS:
            edited = _EDITS[name](edited)
    if edited is variant:
        return variant
    return replace(edited, name=edited_name(variant.name, without, half))


def edited_name(variant: str, without: Sequence[str] = (), half: bool = False) -> str:
    """The name of an edited variant: ``paper-half-without-lrn+conv4``."""
    edits = [name for name in _EDITS if name in without]
    return variant + (_HALF if half else "") + (_WITHOUT + "+".join(edits) if edits else "")


def split_name(name: str) -> tuple[str, tuple[str, ...], bool]:
    """The variant, what it is without, and whether it is half: undoes ``edited_name``."""
    base, _, edits = name.partition(_WITHOUT)
    return base.removesuffix(_HALF), tuple(filter(None, edits.split("+"))), base.endswith(_HALF)


def get_variant(variant: str | Variant) -> Variant:
    """The variant of a name; one that is given stays as it is.

    Args:
        variant: one of ``VARIANTS`` or ``FOREIGN``, alone or with what ``edited_name`` adds to it,
            as in ``"paper-without-lrn"``.

    Raises:
        ValueError: for an unknown name, listing the known ones, and for an edit that this variant
            can't have.
    """
    if isinstance(variant, Variant):
        return variant
    base, without, half = split_name(variant) if isinstance(variant, str) else (variant, (), False)
    known = VARIANTS | FOREIGN
    if base not in known:
        raise ValueError(f"variant: expected one of {', '.join(known)}, got {variant!r}")
    return edit(known[base], without, half)


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """The options ``--without`` and ``--half`` of a command line."""
    group.add_argument(
        "--without",
        nargs="+",
        choices=ABLATIONS,
        default=[],
        metavar="PART",
        help=f"take parts out of the net or its training: {', '.join(ABLATIONS)}",
    )
    group.add_argument(
        "--half", action="store_true", help="one tower with half the kernels (P§3.2)"
    )


def apply_arguments(options: dict[str, Any], variant: str) -> dict[str, Any]:
    """``options`` with ``--without`` and ``--half`` turned into the options they change.

    Args:
        options: of a command line that has ``add_arguments``.
        variant: the one chosen, or the default.
    """
    without, half = options["without"], options["half"]
    changed = dict(options)
    if without or half:
        changed["variant"] = edited_name(variant, without, half)
    for name in without:
        changed.update(_SETTINGS.get(name, {}))
    return changed
