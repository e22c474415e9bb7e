"""A wrong argument is named in one line, with what came."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fastalex_kernels as fk

IMAGE = torch.zeros(2, 6, 8, 9)
WEIGHT = torch.zeros(4, 6, 3, 3)
BIAS = torch.zeros(4)
ROWS = torch.zeros(3, 5)
MATRIX = torch.zeros(7, 5)
RNG = torch.tensor([1, 2])
LABELS = torch.tensor([4, 0, 2])
BYTES = torch.zeros(2, 14, 15, 3, dtype=torch.uint8)
CROPS = fk.Crops(torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([True, False]))
CALLS: dict[str, dict[str, Any]] = {
    "conv2d_relu": {"input": IMAGE, "weight": WEIGHT, "bias": BIAS},
    "lrn_max_pool2d": {"input": IMAGE},
    "max_pool2d": {"input": IMAGE},
    "linear_relu_dropout": {"input": ROWS, "weight": MATRIX, "bias": torch.zeros(7)},
    "dropout": {"input": ROWS},
    "cross_entropy": {"input": ROWS, "target": LABELS},
    "augment": {
        "images": BYTES,
        "crops": CROPS,
        "colors": torch.zeros(2, 3),
        "norm": fk.PixelNorm(torch.zeros(3), torch.ones(3)),
        "size": 12,
    },
}

# (function, the wrong argument, its value, the error, what the message says came)
WRONG: list[tuple[str, str, Any, type[Exception], str]] = [
    ("conv2d_relu", "input", None, TypeError, "NoneType"),
    ("conv2d_relu", "input", [1.0], TypeError, "list"),
    ("conv2d_relu", "input", IMAGE.long(), TypeError, "torch.int64"),
    ("conv2d_relu", "input", IMAGE[0], ValueError, "(6, 8, 9)"),
    ("conv2d_relu", "input", IMAGE[:, :5], ValueError, "5"),
    ("conv2d_relu", "input", IMAGE[:, :, :2], ValueError, "2"),
    ("conv2d_relu", "input", IMAGE[:, :, :, :1], ValueError, "1"),
    ("conv2d_relu", "weight", None, TypeError, "NoneType"),
    ("conv2d_relu", "weight", WEIGHT.double(), TypeError, "torch.float64"),
    ("conv2d_relu", "weight", WEIGHT.to("meta"), ValueError, "meta"),
    ("conv2d_relu", "weight", WEIGHT[0], ValueError, "(6, 3, 3)"),
    ("conv2d_relu", "weight", WEIGHT[:, :, :, :0], ValueError, "(4, 6, 3, 0)"),
    ("conv2d_relu", "bias", 0.0, TypeError, "float"),
    ("conv2d_relu", "bias", BIAS.half(), TypeError, "torch.float16"),
    ("conv2d_relu", "bias", BIAS[:3], ValueError, "(3,)"),
    ("conv2d_relu", "bias", BIAS.to("meta"), ValueError, "meta"),
    ("conv2d_relu", "stride", 0, ValueError, "0"),
    ("conv2d_relu", "stride", (1, -2), ValueError, "(1, -2)"),
    ("conv2d_relu", "stride", 1.5, TypeError, "1.5"),
    ("conv2d_relu", "stride", (1, 2, 3), TypeError, "(1, 2, 3)"),
    ("conv2d_relu", "stride", True, TypeError, "True"),
    ("conv2d_relu", "padding", -1, ValueError, "-1"),
    ("conv2d_relu", "padding", ((0, 0), (-1, 3)), ValueError, "((0, 0), (-1, 3))"),
    ("conv2d_relu", "padding", "same", TypeError, "'same'"),
    ("conv2d_relu", "padding", (1, 2, 3, 4), TypeError, "(1, 2, 3, 4)"),
    ("conv2d_relu", "padding", ((1, 2), (3,)), TypeError, "((1, 2), (3,))"),
    ("conv2d_relu", "padding", (1.0, 2), TypeError, "(1.0, 2)"),
    ("conv2d_relu", "groups", 0, ValueError, "0"),
    ("conv2d_relu", "groups", 3, ValueError, "3"),
    ("conv2d_relu", "groups", -2, ValueError, "-2"),
    ("conv2d_relu", "groups", 2.0, (TypeError, ValueError), "2.0"),
    *[
        wrong
        for name in ("lrn_max_pool2d", "max_pool2d")
        for wrong in [
            (name, "input", None, TypeError, "NoneType"),
            (name, "input", IMAGE.to(torch.uint8), TypeError, "torch.uint8"),
            (name, "input", IMAGE[0, 0], ValueError, "(8, 9)"),
            (name, "input", IMAGE[:, :0], ValueError, "(2, 0, 8, 9)"),
            (name, "input", IMAGE[:, :, :2], ValueError, "2 x 9"),
            (name, "kernel_size", 0, ValueError, "0"),
            (name, "kernel_size", 16, ValueError, "16"),
            (name, "kernel_size", (3, 3), TypeError, "(3, 3)"),
            (name, "kernel_size", 2.0, TypeError, "2.0"),
            (name, "kernel_size", True, TypeError, "True"),
            (name, "stride", 0, ValueError, "0"),
            (name, "stride", -1, ValueError, "-1"),
            (name, "stride", None, TypeError, "None"),
        ]
    ],
    ("lrn_max_pool2d", "size", 0, ValueError, "0"),
    ("lrn_max_pool2d", "size", -5, ValueError, "-5"),
    ("lrn_max_pool2d", "size", 2.5, (TypeError, ValueError), "2.5"),
    ("lrn_max_pool2d", "size", True, (TypeError, ValueError), "True"),
    ("lrn_max_pool2d", "k", 0.0, ValueError, "0.0"),
    ("lrn_max_pool2d", "k", -1, ValueError, "-1"),
    ("lrn_max_pool2d", "k", float("nan"), ValueError, "nan"),
    ("lrn_max_pool2d", "k", "2", TypeError, "'2'"),
    ("lrn_max_pool2d", "alpha", "1e-4", TypeError, "'1e-4'"),
    ("lrn_max_pool2d", "alpha", None, TypeError, "None"),
    ("lrn_max_pool2d", "alpha", float("inf"), ValueError, "inf"),
    ("lrn_max_pool2d", "beta", float("nan"), ValueError, "nan"),
    ("lrn_max_pool2d", "beta", None, TypeError, "None"),
    ("lrn_max_pool2d", "groups", 0, ValueError, "0"),
    ("lrn_max_pool2d", "groups", 4, ValueError, "4"),
    ("lrn_max_pool2d", "groups", 1.0, (TypeError, ValueError), "1.0"),
    ("lrn_max_pool2d", "ceil_mode", "no", TypeError, "'no'"),
    ("max_pool2d", "ceil_mode", 2, TypeError, "2"),
    ("linear_relu_dropout", "input", 3, TypeError, "int"),
    ("linear_relu_dropout", "input", ROWS.int(), TypeError, "torch.int32"),
    ("linear_relu_dropout", "input", ROWS[0], ValueError, "(5,)"),
    ("linear_relu_dropout", "weight", None, TypeError, "NoneType"),
    ("linear_relu_dropout", "weight", MATRIX.bfloat16(), TypeError, "torch.bfloat16"),
    ("linear_relu_dropout", "weight", MATRIX.t(), ValueError, "(5, 7)"),
    ("linear_relu_dropout", "weight", MATRIX[0], ValueError, "(5,)"),
    ("linear_relu_dropout", "weight", MATRIX.to("meta"), ValueError, "meta"),
    ("linear_relu_dropout", "bias", torch.zeros(5), ValueError, "(5,)"),
    ("linear_relu_dropout", "bias", "no", TypeError, "str"),
    *[
        wrong
        for name in ("linear_relu_dropout", "dropout")
        for wrong in [
            (name, "p", 1.0, ValueError, "1.0"),
            (name, "p", 1, ValueError, "1"),
            (name, "p", -0.1, ValueError, "-0.1"),
            (name, "p", float("nan"), ValueError, "nan"),
            (name, "p", "0.5", TypeError, "'0.5'"),
            (name, "p", None, TypeError, "None"),
            (name, "rng", 7, TypeError, "int"),
            (name, "rng", RNG.float(), TypeError, "torch.float32"),
            (name, "rng", RNG[:1], ValueError, "(1,)"),
            (name, "rng", RNG.to("meta"), ValueError, "meta"),
            (name, "row_offset", -1, ValueError, "-1"),
            (name, "row_offset", 0.5, TypeError, "0.5"),
            (name, "row_offset", 2**31 - 2, ValueError, "2147483646"),
            (name, "feature_offset", -3, ValueError, "-3"),
            (name, "feature_offset", 2**31 - 2, ValueError, "2147483646"),
        ]
    ],
    ("dropout", "input", ROWS.long(), TypeError, "torch.int64"),
    ("cross_entropy", "input", None, TypeError, "NoneType"),
    ("cross_entropy", "input", ROWS.long(), TypeError, "torch.int64"),
    ("cross_entropy", "input", ROWS[0], ValueError, "(5,)"),
    ("cross_entropy", "input", ROWS[:, :0], ValueError, "(3, 0)"),
    ("cross_entropy", "target", [4, 0, 2], TypeError, "list"),
    ("cross_entropy", "target", LABELS.int(), TypeError, "torch.int32"),
    ("cross_entropy", "target", ROWS, TypeError, "torch.float32"),
    ("cross_entropy", "target", LABELS[:2], ValueError, "(2,)"),
    ("cross_entropy", "target", LABELS.to("meta"), ValueError, "meta"),
    ("augment", "images", None, TypeError, "NoneType"),
    ("augment", "images", BYTES.float(), TypeError, "torch.float32"),
    ("augment", "images", BYTES[0], ValueError, "(14, 15, 3)"),
    ("augment", "images", BYTES.permute(0, 3, 1, 2), ValueError, "(2, 3, 14, 15)"),
    ("augment", "images", BYTES[:1, :1, :1].expand(1, 2**15, 2**15, 3), ValueError, "(1, 32768"),
    ("augment", "tops", 3, TypeError, "int"),
    ("augment", "tops", torch.zeros(2), TypeError, "torch.float32"),
    ("augment", "tops", RNG[:1], ValueError, "(1,)"),
    ("augment", "lefts", RNG.to("meta"), ValueError, "meta"),
    ("augment", "lefts", RNG.short(), TypeError, "torch.int16"),
    ("augment", "mirrors", RNG, TypeError, "torch.int64"),
    ("augment", "mirrors", None, TypeError, "NoneType"),
    ("augment", "colors", torch.zeros(2, 3).double(), TypeError, "torch.float64"),
    ("augment", "colors", torch.zeros(3), ValueError, "(3,)"),
    ("augment", "mean", 127.0, TypeError, "float"),
    ("augment", "mean", torch.zeros(3, dtype=torch.uint8), TypeError, "torch.uint8"),
    ("augment", "mean", torch.zeros(3, 14, 15), ValueError, "(3, 14, 15)"),
    ("augment", "scale", torch.ones(1), ValueError, "(1,)"),
    ("augment", "scale", torch.ones(3).half(), TypeError, "torch.float16"),
    ("augment", "size", 15, ValueError, "15"),
    ("augment", "size", 0, ValueError, "0"),
    ("augment", "size", (12, 12), TypeError, "(12, 12)"),
    ("augment", "dtype", torch.uint8, TypeError, "torch.uint8"),
    ("dropout", "input", IMAGE, ValueError, "(2, 6, 8, 9)"),
]


@pytest.mark.parametrize(
    ("function", "argument", "value", "error", "came"),
    WRONG,
    ids=[f"{w[0]}-{w[1]}-{i}" for i, w in enumerate(WRONG)],
)
def test_a_wrong_argument(
    function: str, argument: str, value: Any, error: type[Exception], came: str
) -> None:
    arguments = dict(CALLS[function])
    for name, group in arguments.items():  # what travels together
        if argument in getattr(group, "_fields", ()):
            arguments[name] = group._replace(**{argument: value})
            break
    else:
        arguments[argument] = value
    with pytest.raises(error) as caught:
        getattr(fk, function)(**arguments)
    message = str(caught.value)
    assert re.match(rf"{argument}: ", message), message
    assert came in message
    assert "\n" not in message


@pytest.mark.parametrize("function", list(CALLS))
def test_the_right_arguments(function: str) -> None:
    assert getattr(fk, function)(**CALLS[function]).isfinite().all()


@pytest.mark.parametrize("padding", [1, (1, 1), [1, 1], ((1, 1), (1, 1)), (1, (1, 1)), [[1, 1], 1]])
def test_forms_of_padding(padding: Any) -> None:
    x, w = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 3, 3)
    expected = torch.relu(torch.nn.functional.conv2d(x, w, padding=1))
    torch.testing.assert_close(fk.conv2d_relu(x, w, padding=padding), expected)


def test_arguments_are_checked_whatever_the_batch() -> None:
    with pytest.raises(ValueError, match=r"^input: expected 6 channels"):
        fk.conv2d_relu(torch.zeros(0, 5, 8, 8), WEIGHT)
    with pytest.raises(ValueError, match=r"^rng: "):
        fk.linear_relu_dropout(torch.zeros(0, 5), MATRIX, rng=torch.zeros(3, dtype=torch.int64))
