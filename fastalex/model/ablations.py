"""The paper's ablations: edits of a variant's data, and what each was published to cost.

A name says what was edited, ``"paper-without-lrn+conv4"`` or ``"paper-half"``, so that settings,
weights files and ``fastalex.AlexNet`` need nothing more to make the same net again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fastalex.model.variants import FOREIGN, VARIANTS, Convolution, Variant

_WITHOUT, _HALF = "-without-", "-half"


def _map(variant: Variant, change: Callable[[Convolution], Convolution]) -> Variant:
    return replace(variant, convolutions=tuple(map(change, variant.convolutions)))


def _grouped(c: Convolution, groups: int, norm_groups: int) -> Convolution:
    norm = None if c.norm is None else replace(c.norm, groups=norm_groups)
    return replace(c, groups=groups, norm=norm)


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


def _layer(kind: str, index: int) -> Callable[[Variant], Variant]:
    def remove(variant: Variant) -> Variant:
        """A layer with its ReLU and dropout; a pooling after it stays."""
        layers = list(getattr(variant, kind))
        layers[index] = replace(layers[index], removed=True)
        changed: dict[str, Any] = {kind: tuple(layers)}
        return replace(variant, **changed)

    return remove


def _tower_traffic(variant: Variant) -> Variant:
    """Two towers that meet in the last layer alone: groups in conv3, fc6 and fc7, and in LRN."""
    if variant.convolutions[1].groups != 2:
        raise ValueError(f"--without tower-traffic: {variant.name} has one tower")
    first = variant.convolutions[0]
    edited = _map(variant, lambda c: _grouped(c, 1 if c is first else 2, 2))
    *hidden, last = variant.fully_connected
    return replace(edited, fully_connected=(*(replace(fc, groups=2) for fc in hidden), last))


def _halve(variant: Variant) -> Variant:
    """One tower with half the kernels but for the last convolution (P§3.2, footnote)."""
    last = variant.convolutions[-1]

    def halve(c: Convolution) -> Convolution:
        return replace(_grouped(c, 1, 1), channels=c.channels if c is last else c.channels // 2)

    return replace(_map(variant, halve), towers=1)


_EDITS: dict[str, Callable[[Variant], Variant]] = {
    "lrn": _lrn,
    "overlap": _overlap,
    **{f"conv{i + 1}": _layer("convolutions", i) for i in (2, 3, 4)},
    **{f"fc{i + 6}": _layer("fully_connected", i) for i in (0, 1)},
    "tower-traffic": _tower_traffic,
}
# Changes of how a net is trained, by the option of fastalex.train.
_SETTINGS: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.0},
    "augmentation": {"augmentation": "none"},
}
ABLATIONS = (*_EDITS, *_SETTINGS)


class Loss(NamedTuple):
    """What an ablation was published to cost, in percentage points of error."""

    top1: float | None  # None where no number is printed
    top5: float | None
    source: str  # where it is printed
    note: str = ""  # what differs from the edit here


_MIDDLE = Loss(2.0, None, "P§7", "about 2, for any of the middle layers")
_NET_150 = "net 150 has 320 maps in conv2, 8192 units in fc6"
LOSSES: dict[str, Loss] = {
    "lrn": Loss(1.4, 1.2, "P§3.3"),
    "overlap": Loss(0.4, 0.3, "P§3.4"),
    "half": Loss(1.7, 1.2, "P§3.2"),
    "tower-traffic": Loss(1.2, 1.1, "S:layers/layer-params-150.cfg", _NET_150),
    **dict.fromkeys(("conv3", "conv4", "conv5"), _MIDDLE),
}


def edit(variant: Variant, without: Sequence[str] = (), half: bool = False) -> Variant:
    """``variant`` with parts taken out, called as ``edited_name`` says.

    Args:
        variant: one of the published ones.
        without: names among ``ABLATIONS``; those that change only the training change nothing here.
        half: one tower with half the kernels.

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
    for name in _EDITS:
        if name in without:
            edited = _EDITS[name](edited)
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
    """The variant of a name, edited as in ``"paper-without-lrn"``; a Variant stays as it is.

    Raises:
        ValueError: for a name that is not of ``VARIANTS`` or ``FOREIGN``, and for an edit that this
            variant can't have.
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
    parts = f"take parts out of the net or its training: {', '.join(ABLATIONS)}"
    group.add_argument(
        "--without", nargs="+", choices=ABLATIONS, default=[], metavar="PART", help=parts
    )
    half = "one tower with half the kernels (P§3.2)"
    group.add_argument("--half", action="store_true", help=half)


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
