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


def least(analysis: Analysis) -> dict[str, int]:
    """How many channels groups keep at least, by name, where that is more than one.

    A norm over a single channel passes nothing on: its variance is zero, whatever the input. The
    state of an LSTM stays wider than its projection may be. Code that was seen to take another way
    for a single one keeps two.
    """
    owner = np.zeros(len(analysis.units.frozen), np.int64)  # 0: always stays
    for number, group in enumerate(analysis.groups):
        owner[group.units] = number + 1
    fewest = {
        group.name: analysis.shapes[member.slot.tensor][0][0] + 1
        for group in analysis.groups
        for member in group.members
        if group.limit and member.slot.dim == 1
    }
    marks = analysis.marks
    norms = [ids for ids, _, node in marks.statistics if node is not None]
    for ids in analysis.later.several:
        labels = np.unique(analysis.units.labels[ids.flatten().numpy()])
        for number in np.unique(owner[labels]):
            if number and analysis.groups[number - 1].size > 1:
                fewest[analysis.groups[number - 1].name] = 2
    for ids in (*norms, *marks.alone):
        labels, places = np.unique(analysis.units.labels[ids.numpy()], return_counts=True)
        groups = np.unique(owner[labels])
        if len(groups) > 1 or not groups[0]:
            continue  # statistics over what always stays as well
        group = analysis.groups[groups[0] - 1]
        if places.min() == 1 < group.size:
            fewest[group.name] = max(fewest.get(group.name, 1), 2)
    return fewest


def multiple(group: Group, round_to: int) -> int:
    """Of what the kept count must be a multiple, so that the widths of its layers are.

    A channel of the group may be several positions of a layer: all of a head, or one in every
    head or group of a convolution or half of a chunk. The width that counts is that of a block in
    which the channels lie side by side (one head, one group), unless it was no multiple before:
    then that of the layer.
    """
    step = 1
    if round_to == 1:
        return step
    tensors = [member.slot.tensor for member in group.members]
    for member in group.members:
        channels, positions = member.index.shape
        run = _run(member.index[0])
        if channels * run % round_to == 0:
            step = math.lcm(step, round_to // math.gcd(round_to, run))
        elif tensors.count(member.slot.tensor) == 1 or member.slot.dim == 0:
            step = math.lcm(step, round_to // math.gcd(round_to, positions))
    return step


def _run(places: np.ndarray) -> int:
    """How many positions of a channel lie side by side."""
    places = np.sort(places)
    breaks = np.flatnonzero(np.diff(places) != 1)
    lengths = np.diff(np.concatenate([[0], breaks + 1, [len(places)]]))
    return int(np.gcd.reduce(lengths))
