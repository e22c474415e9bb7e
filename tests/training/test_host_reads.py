"""Where a run reads numbers from the device: on a GPU the host waits for each of them."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex.training import trainer
from fastalex.training.options import parse_arguments
from fastalex.training.prepare import prepare
from fastalex.training.trainer import Trainer

OPTIONS = ["--image-size", "64", "--batch-size", "4", "--epochs", "1", "--log-every", "4"]
OPTIONS += ["--workers", "1", "--keep-checkpoints", "0"]


class Reads(TorchDispatchMode):
    """Counts numbers and whole tensors that the main thread takes out of torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []  # after which step of the run, and how
        self.at = "start"
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(name))

    def _counted(self, name: str) -> Any:
        real = getattr(torch.Tensor, name)

        def read(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            where = sys._getframe(1).f_globals["__name__"]
            # Momentum reads its rates where the parameter is on the CPU, and there alone.
            here = threading.current_thread() is threading.main_thread()
            if here and where != "fastalex_kernels.momentum":
                self.seen.append((self.at, name))
            return real(x, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.seen.append((self.at, func.__name__))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("option", ["--fused-update", "--no-fused-update"])
def test_numbers_are_read_where_a_record_is_due_and_nowhere_else(
    here: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    run = parse_arguments([*OPTIONS, option, "--output", str(here / "run")])
    folder, config = prepare(run)
    assert config is not None
    reads = Reads(monkeypatch)
    init, train_step, evaluate = Trainer.__init__, Trainer._train_step, trainer.evaluate

    def as_on_a_gpu(self: Trainer, *args: Any) -> None:
        init(self, *args)
        self.read_every = self.settings.log_every

    def stepped(self: Trainer, batch: Any) -> None:
        reads.at = f"in step {self.step + 1}"
        train_step(self, batch)
        reads.at = f"after step {self.step}"

    def evaluated(model: Any, batches: Any, parallel: Any, on_batch: Any) -> Any:
        def note(number: int) -> None:
            reads.at = f"before batch {number}"
            on_batch(number)
            reads.at = f"in batch {number}"

        result = evaluate(model, batches, parallel, note)
        reads.at = "after the epoch"
        return result

    monkeypatch.setattr(Trainer, "__init__", as_on_a_gpu)
    monkeypatch.setattr(Trainer, "_train_step", stepped)
    monkeypatch.setattr(trainer, "evaluate", evaluated)
    with reads:
        trainer.train(config)
    folder.release()
    steps = {"after step 4", "after step 8", "after step 10"}  # 40 images in batches of 4
    batches = {"before batch 0", "in batch 2"}  # a signal is looked for, and the sums are read
    assert {at for at, _ in reads.seen} == {"start", *steps, *batches, "after the epoch"}
