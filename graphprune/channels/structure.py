"""What the slots of a group say of its layers: which groups are alike, which widths they have."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np

from graphprune.channels.analysis import Analysis, Group, Member


def signature(analysis: Analysis, group: Group) -> Hashable:
    """What isomorphic groups have in common: the kinds of their layers, without any width.

    Number and place of the layers do not count, so that residual streams of stages of different
    depth are alike.
    """
    return frozenset(_kind(analysis, member) for member in group.members)


def _kind(analysis: Analysis, member: Member) -> Hashable:
    shape = analysis.shapes[member.slot.tensor][0]
    depthwise = len(shape) > 1 and shape[1] == 1
    return member.slot.dim, len(shape), shape[2:], depthwise, member.reads, member.index.shape[1]


def multiple(group: Group, round_to: int) -> int:
    """Of what the kept count must be a multiple, so that the widths of its layers are.

    A channel of the group may be several positions of a layer: all of a head, or one in every
    head or group of a convolution or half of a chunk. The width that counts is that of a block in
    which the channels lie side by side (one head, one group), unless it was no multiple before:
    then that of the layer.
    """
    found = 1
    if round_to == 1:
        return found
    tensors = [member.slot.tensor for member in group.members]
    for member in group.members:
        channels, positions = member.index.shape
        run = _run(member.index[0])
        if channels * run % round_to == 0:
            found = math.lcm(found, round_to // math.gcd(round_to, run))
        elif tensors.count(member.slot.tensor) == 1 or member.slot.dim == 0:
            found = math.lcm(found, round_to // math.gcd(round_to, positions))
    return found


def _run(places: np.ndarray) -> int:
    """How many positions of a channel lie side by side."""
    places = np.sort(places)
    breaks = np.flatnonzero(np.diff(places) != 1)
    lengths = np.diff(np.concatenate([[0], breaks + 1, [len(places)]]))
    return int(np.gcd.reduce(lengths))
