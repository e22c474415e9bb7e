"""What is changed between two steps counts in the next, and a batch of another form is judged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastalex import AlexNet
from fastalex.data import Normalization
from fastalex.data.augment import Augment
from fastalex.model.layers import Linear
from fastalex.training import TrainStep
from tests._nets import narrow

SIZE = 67


def _parts() -> tuple[AlexNet, torch.optim.SGD, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = AlexNet(7, dropout=0.0, variant=narrow("paper"))
    model.init_parameters("he")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    return model, optimizer, torch.randn(2, 3, SIZE, SIZE), torch.tensor([3, 5])


def _move(model: AlexNet, optimizer: torch.optim.SGD) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 0.9


def _forget(model: AlexNet, optimizer: torch.optim.SGD) -> None:
    optimizer.state.clear()


def _replace_buffers(model: AlexNet, optimizer: torch.optim.SGD) -> None:
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, 0.01)


def _replace_layer(model: AlexNet, optimizer: torch.optim.SGD) -> None:
    torch.manual_seed(1)
    old, new = model.classifier[6], Linear(64, 7)
    model.classifier[6] = new
    optimizer.param_groups[0]["params"][-2:] = list(new.parameters())
    for parameter in old.parameters():
        optimizer.state.pop(parameter)


@pytest.mark.parametrize("change", [_move, _forget, _replace_buffers, _replace_layer])
def test_a_step_takes_over_what_was_changed(
    change: Callable[[AlexNet, torch.optim.SGD], None],
) -> None:
    """The oracle is autograd with torch.optim.SGD, which looks everything up at each step."""
    model, optimizer, images, labels = _parts()
    theirs, their_optimizer, *_ = _parts()
    step = TrainStep(model, optimizer)
    for turn in range(4):
        if turn == 2:
            change(model, optimizer)
            change(theirs, their_optimizer)
        loss = step(images, labels)
        expected = F.cross_entropy(theirs(images), labels)
        their_optimizer.zero_grad()
        expected.backward()
        their_optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([1, 2, 3]), "labels: expected int64 [2], got torch.int64 [3]"),
        (
            torch.tensor([1, 2], dtype=torch.int32),
            "labels: expected int64 [2], got torch.int32 [2]",
        ),
        (torch.empty(2, dtype=torch.int64, device="meta"), "labels: expected device cpu, got meta"),
    ],
)
def test_labels_of_another_form_are_refused(labels: torch.Tensor, message: str) -> None:
    model, optimizer, images, right = _parts()
    step = TrainStep(model, optimizer)
    step(images, right)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError) as error:
        step(images, labels)
    assert message in str(error.value)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_bytes_of_another_form_are_refused_after_good_ones() -> None:
    model, optimizer, _, labels = _parts()
    plain = Normalization((0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
    step = TrainStep(model, optimizer, augment=Augment(plain, SIZE, torch.device("cpu")))
    place = torch.zeros(2, dtype=torch.int32)
    pixels = torch.zeros(2, 70, 70, 3, dtype=torch.uint8)
    step((pixels, place, place, place.bool()), labels)
    with pytest.raises((TypeError, ValueError), match="mirrors: expected"):
        step((pixels, place, place, place), labels)
    with pytest.raises((TypeError, ValueError), match="images: expected"):
        step((pixels.float(), place, place, place.bool()), labels)
    with pytest.raises(TypeError, match="images: expected a tensor or bytes, got NoneType"):
        step(None, labels)
