"""Work that threads of a CPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastalex_kernels.common.backend import backend, chosen
from fastalex_kernels.common.threads import share


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_errors_come_out() -> None:
    assert share(lambda a, b: a + b, range(9), range(1, 10)) == list(range(1, 18, 2))
    with pytest.raises(ZeroDivisionError):
        share(lambda x: 1 // x, (1, 0, 1))


def test_an_operator_of_a_worker_starts_no_threads_and_may_share_too() -> None:
    def work(size: int) -> tuple[int, list[int]]:
        torch.rand(size, 64) @ torch.rand(64, size)  # also after its first operator
        return torch.get_num_threads(), share(int, range(3))

    assert share(work, [300] * 4) == [(1, [0, 1, 2])] * 4
    assert torch.get_num_threads() == 2


def test_a_worker_has_the_backend_of_whoever_shares() -> None:
    with backend("interpreter"):
        assert share(lambda _: chosen(), range(8)) == ["interpreter"] * 8
    assert share(lambda _: chosen(), range(8)) == ["auto"] * 8
