"""How a run chooses to execute its steps."""

from __future__ import annotations

import pytest

from fastalex.training.config import Settings
from fastalex.training.options import parse_arguments


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ([], "cpu", (False, False)),
        ([], "cuda", (True, True)),
        (["--precision", "fp16"], "cuda", (False, False)),
        (["--no-fused-update"], "cuda", (False, False)),
        (["--no-cuda-graph"], "cuda", (True, False)),
        (["--fused-update"], "cpu", (True, False)),
    ],
)
def test_defaults_follow_the_device(
    options: list[str], device: str, expected: tuple[bool, bool]
) -> None:
    settings = Settings.choose(parse_arguments(options), device)
    assert (settings.fused_update, settings.cuda_graph) == expected


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (["--fused-update", "--precision", "fp16"], "cuda", r"^--fused-update can't .* float16"),
        (["--cuda-graph"], "cpu", r"^--cuda-graph needs a GPU"),
        (["--cuda-graph", "--precision", "fp16"], "cuda", r"^--cuda-graph needs --fused-update"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: list[str], device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.choose(parse_arguments(options), device)
