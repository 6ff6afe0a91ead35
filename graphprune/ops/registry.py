"""One declaration per op: all that is known of it, with one view for each question.

The views are functions that are called with the arguments of the op, where something else stands
in the place of every tensor. A view that an op lacks is ``None``; whoever asks for it refuses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import fx

from graphprune.ops.calls import target_of
from graphprune.ops.samples import Sample

View = Callable[..., Any]


def free(out: object, *args: object, **kwargs: object) -> int:
    """MACs of an op that multiplies nothing with anything: none."""
    return 0


def between(low: float, high: float) -> View:
    """Bounds of an op that do not depend on its arguments."""
    return lambda *args, **kwargs: (low, high)


def zeroes(keep: object, *args: object, **kwargs: object) -> Any:
    """Statistics that are right when what left is zero, as norms are: those of the op itself."""
    return NotImplemented


@dataclass(frozen=True)
class Op:
    """What an op means.

    Attributes:
        channels: ``rule(walk, node, *args)`` with a ``Value`` for every tensor declares ties on
            the walk and returns the layers of the result, or a list of them.
        factors: ``rule(*args)`` with anything for tensors returns the ``Factors`` of a product.
        norm: the same for a ``Norm``, channel by channel.
        macs: ``rule(out, *args)`` with the shapes of tensors counts multiply-accumulates; by
            default those of the factors.
        fact: ``rule(op, *args)`` with a ``Fact`` for every tensor returns a fact, or a list.
        masked: ``rule(keep, *args)`` with tensors computes the op over those positions of the
            first one where ``keep`` is true, for ops that take statistics of channels, whose result
            depends on how many there are. ``NotImplemented``: the op itself says it, on zeroes.
        given: ``rule(graph, node, alive)`` yields the sizes an op was given and those it needs.
        meta: ``rule(*args)`` makes an empty result fast, or returns ``NotImplemented``.
        kernel: computes the op where torch lacks a kernel for double precision.
        sample: arguments to try the op with, as ``samples.of`` makes them.
        refused: arguments for which every channel must stay.
        makes: it makes channels that can be cut even where no input has any.
        linear: zeroes stay zeroes where all operands are zero: it moves values.
        powers: of which exponents of its operands it is the product.
        signs: the signs of its operands in a sum.
        places: the numbers it is given are places of channels: a wrong one has the right shape.
        layer: it belongs to a layer of torch, whose attributes it is given.
        fills: a number it is given becomes the value of a tensor.
        rows: how it chooses rows: ``"picked"`` at places that other arguments name, ``"ordered"``
            by values, ``"written"`` over in their place.
        chooses: it finds the places of the largest of its operand.
        functions: functions of torch that are recorded as this op, whatever they are made of.
        scaled: it takes a scale from a width when it is given none.
        saves: its results but the first are saved for the backward, and hardly ever read.
        activation: it bends the output of a layer, position by position.
        keeps: what its result shares with its first operand: the ``"values"``, or the values in
            the same ``"order"`` under another shape.
        bounds: ``rule(*args)`` returns the interval in which its results lie, whatever it reads.
        clips: values of its first operand within these bounds stay as they are.
        joins: it puts its operands side by side.
        hull: its results lie between the smallest and the largest of its operands and zero.
        any_size: what it does to ids does not depend on sizes of dimensions without ids.
    """

    channels: View | None = None
    factors: View | None = None
    norm: View | None = None
    macs: View | None = None
    fact: View | None = None
    masked: View | None = None
    given: View | None = None
    meta: View | None = None
    kernel: View | None = None
    sample: Sample | None = None
    refused: Sample | None = None
    makes: bool = False
    linear: bool = False
    powers: tuple[float, ...] = ()
    signs: tuple[int, ...] = ()
    places: bool = False
    layer: bool = False
    fills: bool = False
    activation: bool = False
    keeps: str = ""
    bounds: View | None = None
    clips: bool = False
    hull: bool = False
    joins: bool = False
    any_size: bool = False
    rows: str = ""
    chooses: bool = False
    functions: tuple[object, ...] = ()
    scaled: bool = False
    saves: bool = False


UNKNOWN = Op()
REGISTRY: dict[str, Op] = {}  # by name, such as "aten.mm"
WHOLE: dict[object, torch._ops.OpOverload] = {}  # what functions of torch are recorded as
_VIEWS = frozenset(field.name for field in fields(Op))
_POINTWISE = ("pointwise", "pointwise_")  # stand for all ops that torch tags so; in place


def declare(*targets: Any, **views: Any) -> Callable[[View], View]:
    """Declare what ops mean; the decorated function is their rule for channels.

    Args:
        *targets: ``torch.ops.namespace.op``, or what ``torch.library.custom_op`` returned; a text
            ``"namespace.op"`` names one that may be absent.
        **views: fields of :class:`Op` but ``channels``.

    Raises:
        KeyError: an op is declared already.
        TypeError: no such view, no op, or neither ``macs`` nor ``factors``: whether an op
            multiplies is never guessed. ``macs=free`` says that it does not.

    Example:
        >>> from graphprune.ops import declare, forget, free
        >>> from graphprune.ops.samples import of
        >>> @declare("mylib.scale", macs=free, sample=of((2, 3), 0.5))
        ... def scale(walk, node, x, factor):
        ...     return x.layers  # the result has the channels of the input
        >>> forget("mylib.scale")
    """
    unknown = sorted(views.keys() - _VIEWS | views.keys() & {"channels"})
    if unknown:
        known = ", ".join(sorted(_VIEWS - {"channels"}))
        raise TypeError(f"no view {', '.join(unknown)} of an op; there are {known}")
    if views.get("macs") is None and views.get("factors") is None:
        raise TypeError(
            f"{', '.join(map(str, targets))}: declare factors or macs, or macs=free where nothing "
            "is multiplied"
        )
    names = [name_of(target) for target in targets]

    def decorate(rule: View) -> View:
        for name in names:
            if name in REGISTRY:
                raise KeyError(f"{name} is declared already")
            REGISTRY[name] = Op(channels=rule, **views)
        whole = getattr(targets[0], "default", None)
        WHOLE.update(dict.fromkeys(views.get("functions", ()), whole))
        return rule

    return decorate


def forget(*targets: object) -> None:
    """Take back what was declared of ops.

    Raises:
        KeyError: nothing is declared of one.

    Example:
        >>> from graphprune.ops import declare, forget, free
        >>> rule = declare("mylib.twice", macs=free)(lambda walk, node, x: x.layers)
        >>> forget("mylib.twice")
    """
    for name in map(name_of, targets):
        if name not in REGISTRY:
            raise KeyError(f"{name} is not declared")
        del REGISTRY[name]


def name_of(target: object) -> str:
    """The name of an op, ``"namespace.op"``.

    Raises:
        TypeError: it is no op.
    """
    if isinstance(target, str) and (target in _POINTWISE or target.count(".") == 1):
        return target
    overload = getattr(target, "_opoverload", target)  # of torch.library.custom_op
    packet = getattr(overload, "overloadpacket", overload)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise TypeError(
            f"{target!r} is no op: pass torch.ops.namespace.op, or its name 'namespace.op'"
        )
    return _name(packet)


@functools.cache
def _name(packet: object) -> str:
    return str(packet)


def packet_of(node: fx.Node) -> object:
    """The op of a node, whichever overload it is."""
    return getattr(node.target, "overloadpacket", None)


def op_of(target: Any) -> Op:
    """What is declared of an op: of a node, an overload or a packet; ``UNKNOWN`` if nothing.

    Ops that torch tags as pointwise need no declaration of their own.
    """
    target = target.target if isinstance(target, fx.Node) else target
    packet = getattr(target, "overloadpacket", target)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return UNKNOWN
    known = REGISTRY.get(_name(packet))
    if known is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        known = REGISTRY[_POINTWISE[target._schema.is_mutable]]
    return known or UNKNOWN


def op_name(node: fx.Node) -> str:
    """The name of an op or of a custom autograd function, for reports."""
    target = target_of(node)
    if isinstance(target, torch._ops.OpOverload):
        return f"{target} (inside vmap)" if node.meta.get("transformed") else str(target)
    if isinstance(getattr(target, "__self__", None), type):
        return f"{target.__self__.__name__} (autograd function)"
    return getattr(target, "__name__", str(target))
