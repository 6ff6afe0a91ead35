"""What is made on ``meta`` in the place of torch's results has their shape, dtype and strides."""

import pytest
import torch

from graphprune.ops import made

LAYOUTS = {
    "plain": torch.zeros(2, 4, 3, 5),
    "one channel": torch.zeros(2, 1, 3, 5),
    "one place": torch.zeros(2, 4, 1, 1),
    "a row": torch.zeros(5),
    "a single number": torch.zeros(()),
    "channels last": torch.zeros(2, 4, 3, 5).to(memory_format=torch.channels_last),
    "turned": torch.zeros(2, 4, 5, 3).transpose(2, 3),
    "a part": torch.zeros(2, 8, 3, 5)[:, 4:],
    "a part of the last": torch.zeros(2, 4, 3, 10)[..., :5],
    "every second": torch.zeros(2, 4, 3, 10)[..., ::2],
    "expanded": torch.zeros(2, 1, 3, 5).expand(2, 4, 3, 5),
    "another dtype": torch.zeros(2, 4, 3, 5, dtype=torch.float64),
    "whole numbers": torch.zeros(2, 4, 3, 5, dtype=torch.int64),
    "none": torch.zeros(2, 0, 3, 5),
}
FORMS = [*LAYOUTS.values()]


def told(tensor):
    """Strides as far as steps are taken."""
    steps = [step if size > 1 else 0 for size, step in zip(tensor.shape, tensor.stride())]
    return tuple(tensor.shape), tensor.dtype, tuple(steps)


def on_meta(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@pytest.mark.parametrize("x", FORMS, ids=LAYOUTS)
def test_of_one_operand(x):
    found = made.unary_meta(on_meta(x))
    for function in (torch.relu, torch.neg, torch.exp, torch.rsqrt):
        assert found is NotImplemented or told(found) == told(function(x))


@pytest.mark.parametrize("x", FORMS, ids=LAYOUTS)
def test_of_a_softmax(x):
    for options in ((False,), (None,), (torch.float64,)):
        found = made.softmax_meta(on_meta(x), 0, *options)
        assert found is NotImplemented or told(found) == told(x.softmax(0, options[0] or None))
    assert made.softmax_meta(on_meta(x), 0, dtype=torch.float64) is NotImplemented


@pytest.mark.parametrize("x", FORMS, ids=LAYOUTS)
def test_of_two_operands(x):
    for y in (*FORMS, 2.0, 3):
        given = on_meta(y) if isinstance(y, torch.Tensor) else y
        found = made.binary_meta(on_meta(x), given)
        try:
            wanted = x * y, x - y, x / y
        except RuntimeError:
            assert found is NotImplemented
            continue
        assert found is NotImplemented or {told(found)} == {*map(told, wanted)}, y


@pytest.mark.parametrize("x", FORMS, ids=LAYOUTS)
def test_in_place(x):
    for y in (*FORMS, 2.0):
        place, given = on_meta(x), on_meta(y) if isinstance(y, torch.Tensor) else y
        found = made.binary_in_place_meta(place, given)
        if found is not NotImplemented:
            assert found is place
            assert x.clone().mul_(y).shape == x.shape


def test_the_usual_is_made():
    x = torch.zeros(2, 4, 3, 5, device="meta")
    for y in (x, x[:, :1], x[0], 2.0, x.repeat(1, 2, 1, 1).chunk(2, 1)[0]):
        assert made.binary_meta(x, y) is not NotImplemented
        assert made.binary_in_place_meta(x, y) is x
    assert made.unary_meta(x) is not NotImplemented
    assert made.softmax_meta(x, 1, False) is not NotImplemented
