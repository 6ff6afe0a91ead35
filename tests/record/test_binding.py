"""Numbers are bound to arguments of ops by name and place, never by their value."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import graphprune
from graphprune.ops.given import Given, numbers_for
from graphprune.record.binding import numbers_given

CONSTANTS = torch.tensor([0, 1])
MASK = torch.ones(31, 29, dtype=torch.bool)
CALLS = {  # all numbers of a call differ: their values say where they belong
    "view": (torch.Tensor.view, ((31, 29), 29, 31), {}),
    "view, a list": (torch.Tensor.view, ((31, 29), (29, 31)), {}),
    "reshape": (torch.reshape, ((31, 29), (29, 31)), {}),
    "reshape by name": (torch.Tensor.reshape, ((31, 29),), {"shape": (29, 31)}),
    "unflatten": (torch.Tensor.unflatten, ((31, 28), -1, (4, 7)), {}),
    "unflatten by name": (torch.unflatten, ((31, 28),), {"dim": 1, "sizes": (4, 7)}),
    "expand": (torch.Tensor.expand, ((1, 1), 31, 29), {}),
    "zeros": (torch.zeros, (31, 29), {}),
    "zeros, a list": (torch.zeros, ([31, 29],), {}),
    "full": (torch.full, ((31, 29), 0.5), {}),
    "new_zeros": (torch.Tensor.new_zeros, ((2, 3), 31, 29), {}),
    "new": (torch.Tensor.new, ((2, 3), 31, 29), {}),
    "numbers of numpy": (torch.Tensor.view, ((31, 29), np.int64(29), np.int32(31)), {}),
    "split": (torch.Tensor.split, ((31, 29), 17, -1), {}),
    "split in sizes": (torch.split, ((31, 29), [18, 13]), {}),
    "narrow": (torch.narrow, ((31, 29), -1, 3, 7), {}),
    "narrow by name": (torch.Tensor.narrow, ((31, 29),), {"length": 7, "start": 3, "dim": 0}),
    "select": (torch.select, ((31, 29), 1, 7), {}),
    "pad": (F.pad, ((31, 29), (2, 3, 4, 5)), {}),
    "conv": (F.conv2d, ((1, 14, 9, 9), (21, 2, 1, 1), None, 3, 4, 5, 7), {}),
    "conv by name": (F.conv1d, ((1, 14, 9), (21, 2, 1)), {"groups": 7, "stride": 3}),
    "transposed": (F.conv_transpose1d, ((1, 14, 9), (14, 3, 1), None, 6, 4, 5, 7), {}),
    "group_norm": (F.group_norm, ((2, 14, 3), 7), {}),
    "layer_norm": (F.layer_norm, ((2, 14, 13), (14, 13)), {}),
    "index": (torch.Tensor.__getitem__, ((31, 29), (slice(3, 9), 7)), {}),
    "a place": (torch.Tensor.__getitem__, ((31, 29), 7), {}),
    "a slice": (torch.Tensor.__getitem__, ((31, 29), slice(3, 9)), {}),
    "the end": (torch.Tensor.__getitem__, ((31, 29), (..., slice(3, 9))), {}),
    "between": (torch.Tensor.__getitem__, ((31, 29, 23), (slice(8), ..., slice(3, 9))), {}),
    "new ones": (torch.Tensor.__getitem__, ((31, 29), (None, 7, None, slice(3, 9))), {}),
    "mask": (torch.Tensor.__getitem__, ((31, 29, 23, 19), (MASK, slice(3, 9), 7)), {}),
    "places": (torch.Tensor.__getitem__, ((31, 29, 23), (CONSTANTS, slice(3, 9), 7)), {}),
    "one place": (torch.Tensor.__getitem__, ((31, 29), (CONSTANTS[1], slice(3, 9))), {}),
    "a list of places": (torch.Tensor.__getitem__, ((31, 29, 23), ([0, 1], slice(3, 9), 7)), {}),
    "a flag": (torch.Tensor.__getitem__, ((31, 29), (True, slice(3, 9), 7)), {}),
}  # fmt: skip
ASKED = {
    "size",
    "split_size",
    "start",
    "end",
    "index",
    "pad",
    "groups",
    "group",
    "normalized_shape",
}
AXES = {"start", "end", "index"}  # along the dimension that an op is given


class Ops(TorchDispatchMode):
    """What ops are given: the value of every argument, by name and place."""

    def __init__(self):
        super().__init__()
        self.given = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names = [argument.name for argument in func._schema.arguments]
        values = {**dict(zip(names, args)), **(kwargs or {})}
        for name, value in values.items():
            name = "split_size" if name == "split_sizes" else name
            if name in AXES:
                dim = values.get("dim", 0) % args[0].dim()
                self.given.setdefault((name, dim), set()).add(value)
            elif isinstance(value, list | tuple):
                for place, item in enumerate(value):
                    if isinstance(item, int):
                        self.given.setdefault((name, place), set()).add(item)
            elif isinstance(value, int):
                self.given.setdefault((name, 0), set()).add(value)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CALLS)
def test_the_op_is_given_the_number(name):
    function, args, kwargs = CALLS[name]
    factory = function in (torch.zeros, torch.full)
    first = 0 if factory else 1
    count = 2 if "conv" in name or name == "transposed" else first
    args = (*(torch.ones(shape) for shape in args[:count]), *args[count:])
    numbers = numbers_given(function, args, kwargs)
    try:
        with Ops() as ops:
            function(*args, **kwargs)
    except IndexError:
        pytest.skip("this version of torch refuses the call")
    bound = {(number.argument, number.place): number.value for number in numbers}
    for key, values in ops.given.items():
        if key in bound and key[0] in ASKED:
            assert bound.pop(key) in values
        elif key[0] in ASKED and key[0] != "end":
            assert values.isdisjoint(number.value for number in numbers)
    left = [key for key in bound if key[0] in ASKED]
    assert not left  # an op is told every number that is said to be for it


@pytest.mark.parametrize("function", [torch.Tensor.tensor_split, torch.tensor_split])
def test_what_follows_a_list_is_no_part_of_it(function):
    numbers = numbers_given(function, (torch.ones(2, 31, 29), (3, 7), -2), {})
    told = [(number.argument, number.place, number.value) for number in numbers]
    assert told == [("indices", 0, 3), ("indices", 1, 7), ("dim", 0, -2)]


@pytest.mark.parametrize("channels_first", [True, False])
def test_two_ends_of_one_value(channels_first):
    """Behind an ellipsis, the dimension tells which of two equal numbers is meant."""

    class Cropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = self.time = 8
            self.make, self.read = nn.Conv2d(3, 12, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            x = self.make(x).movedim(1, 2 if channels_first else 3)
            if channels_first:
                return self.read(x[..., : self.width, : self.time].movedim(2, 1))
            return self.read(x[..., : self.time, : self.width].movedim(3, 1))

    model, x = Cropped(), torch.randn(2, 3, 5, 10)
    plan = graphprune.trace(model, x).plan(0.5)
    small = graphprune.rebuild(model, plan)
    assert small.make.out_channels == 6
    assert (small.width, small.time) == (small.read.in_channels, 8)
    torch.testing.assert_close(small(x), graphprune.mask(model, plan)(x))


def test_a_place_counted_from_the_end_is_no_size_to_be_inferred():
    class Last(nn.Linear):
        def forward(self, x):
            return super().forward(x).narrow(-1, -1, 1)

    graph = graphprune.trace(Last(3, 2), torch.randn(4, 3))
    (node,) = (n for n in graph.analysis.records[0].ops if n.target is torch.ops.aten.slice.Tensor)
    assert [number.argument for number in node.meta["numbers"]] == ["dim", "start", "length"]
    assert numbers_for(node, Given([1], [0], "start", 1)) == {}
    assert [*numbers_for(node, Given([1], [0], "length", 1))] == [0]
