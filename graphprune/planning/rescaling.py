"""Statistics over channels that can be made those of the masked model.

LayerNorm and GroupNorm, as modules of torch, go on counting what left as zeroes
(:mod:`graphprune.record.norms`). Root mean squares have a weight and an eps that make up for it:
with k of n channels left, the mean over the kept ones is n/k times the mean of the masked values.
Behind ``x * rsqrt(mean(x ** 2) + eps) * weight`` this is undone by ``weight * sqrt(n/k)`` and
``eps * n/k``, however the norm is spelled (RMSNorm: Zhang and Sennrich, NeurIPS 2019). The factor
is followed through the recorded graph until a weight absorbs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphprune.channels.analysis import Analysis, Group
from graphprune.ops.calls import args_of
from graphprune.ops.registry import op_of, packet_of, zeroes
from graphprune.plan.plan import LiteralChange, NormChange, Rescale
from graphprune.planning.plain import Plain
from graphprune.planning.settle import changed_literal
from graphprune.record.norms import counted, counts_in_code
from graphprune.record.sites import OF, Site
from graphprune.record.sizes import Literal

aten = torch.ops.aten
_SHARES = (aten._softmax, aten._log_softmax, aten.mean)


@dataclass(frozen=True)
class RootMeanSquare:
    """A norm over channels that can be rescaled.

    With s the fraction of channels that stay, its weight is multiplied by ``s ** power`` and its
    eps, an attribute of ``module``, by ``1 / s``.
    """

    source: fx.Node  # what the mean is taken of
    dims: tuple[int, ...]
    weight: str
    power: float
    module: str = ""
    attribute: str = ""
    eps: float = 0.0

    def key(self, graph: Analysis) -> Any:
        """Equal for norms that change alike."""
        layers = graph.values[self.source].layers
        channels = tuple(graph.units.labels[layer.numpy()].tobytes() for layer in layers)
        return channels, self.power, self.module, self.attribute, self.eps

    def fraction(self, graph: Analysis, alive: np.ndarray) -> float:
        """How much of what the mean is taken of stays."""
        shape, small = self.source.meta["shape"], graph.shape(self.source, alive)
        return math.prod(small[d] for d in self.dims) / math.prod(shape[d] for d in self.dims)

    def change(self, graph: Analysis, alive: np.ndarray) -> Rescale:
        """What a plan changes."""
        s = self.fraction(graph, alive)
        attribute = self.module, self.attribute, self.eps, self.eps / s
        return Rescale(self.weight, s**self.power, *attribute)


@dataclass(frozen=True)
class Counting:
    """A LayerNorm, GroupNorm, softmax or mean that can go on counting what left.

    Attributes:
        source: what the statistics are taken of.
        module: the norm.
        site: the call in its code; ``None`` for a module of torch itself.
        groups: into how many groups channels are divided; 0 for all but a GroupNorm.
        dims: over which others take their statistics.
    """

    source: fx.Node
    module: str
    site: Site | None
    groups: int = 0
    dims: tuple[int, ...] = ()

    @classmethod
    def of(cls, node: fx.Node) -> Counting | None:
        """That of an op; ``None`` for other ops."""
        packet, args = packet_of(node), args_of(node)
        place = str(node.meta["module"]), node.meta.get("site")
        if packet is aten.native_group_norm:
            return cls(args[0], *place, groups=int(args[6]))
        if packet is aten.native_layer_norm:
            ndim = len(args[0].meta["shape"])
            return cls(args[0], *place, dims=tuple(range(ndim - len(args[1]), ndim)))
        if packet in _SHARES:
            ndim, given = len(args[0].meta["shape"]), args[1] if len(args) > 1 else ()
            dims = given if isinstance(given, list | tuple) else (given,)
            return cls(args[0], *place, dims=(dims[0] % ndim,)) if len(dims) == 1 else None
        return None

    @property
    def now(self) -> int:
        """How many numbers, or channels of a group, the statistics are over."""
        return self.count(self.source.meta["shape"], self.groups)

    def count(self, shape: Sequence[int], groups: int) -> int:
        """How many numbers, or channels of a group, the statistics are over."""
        if self.groups:
            return shape[1] // max(groups, 1)
        return math.prod(shape[dim] for dim in self.dims)

    def change(self, graph: Analysis, alive: np.ndarray) -> NormChange | LiteralChange | None:
        """What a plan changes, if anything leaves."""
        groups = self.groups
        if groups:
            stays = graph.positions(self.source, 1, alive).reshape(groups, -1)
            groups = int(stays.any(1).sum())
        left = self.count(graph.shape(self.source, alive), groups)
        if left == self.now:
            return None
        if self.site is None:
            return NormChange(self.module, self.now)
        return changed_literal(Literal(self.module, self.site, (OF,), self.now), self.now)


@dataclass(frozen=True)
class Rescaling:
    """The statistics of a model that can be made the masked ones, by the op that takes them.

    Attributes:
        graph: the analysed model.
        norms: root mean squares, which can be rescaled.
        counting: others, which can count what left.
        plain: what zeroed parameters zero of what ops sum up.
    """

    graph: Analysis
    norms: dict[fx.Node | None, RootMeanSquare]
    counting: dict[fx.Node | None, Counting]
    plain: Plain

    @classmethod
    def of(cls, graph: Analysis, model: nn.Module) -> Rescaling:
        """Find them."""
        norms, plain = _norms(graph, model), Plain(graph)
        return cls(graph, norms, _counting(graph, model, norms, plain.zero), plain)

    def covers(self, group: Group) -> bool:
        """Whether all statistics that change with the channels of a group can be made up for."""
        mine = np.zeros(len(self.graph.units.frozen), bool)
        mine[group.units] = True
        labels = self.graph.units.labels
        return all(
            self._made_up(node) or not mine[labels[ids.numpy()]].any()
            for ids, _, node in self.graph.marks.statistics
        )

    def _made_up(self, node: fx.Node | None) -> bool:
        """Whether statistics can be those with zeroes; some are, as norms of vectors."""
        zeroed = node is not None and op_of(node).masked is zeroes
        return zeroed or node in self.norms or node in self.counting

    def counts(self, alive: np.ndarray) -> tuple[tuple[NormChange, ...], tuple[LiteralChange, ...]]:
        """The norms that go on counting what leaves: modules, and calls in code."""
        changes = (norm.change(self.graph, alive) for norm in self.counting.values())
        found = sorted(dict.fromkeys(c for c in changes if c is not None), key=lambda c: c.module)
        return (
            tuple(change for change in found if isinstance(change, NormChange)),
            tuple(change for change in found if isinstance(change, LiteralChange)),
        )

    def changes(self, alive: np.ndarray) -> tuple[Rescale, ...]:
        """The weights and eps that make statistics those of the masked model."""
        found = {norm.change(self.graph, alive) for norm in self.norms.values()}
        return tuple(sorted((c for c in found if c.factor != 1), key=lambda c: c.tensor))


def _norms(graph: Analysis, model: nn.Module) -> dict[fx.Node | None, RootMeanSquare]:
    """The norms by their mean; a weight that anything else reads, too, absorbs nothing."""
    found: dict[fx.Node | None, RootMeanSquare] = {}
    nodes = dict.fromkeys(node for _, _, node in graph.marks.statistics if node is not None)
    for node in nodes:
        norm = _fused(node, model) if packet_of(node) is aten._fused_rms_norm else None
        norm = _Following(model).norm(node) if packet_of(node) is aten.mean else norm
        if norm is not None:
            found[node] = norm
    by_weight: dict[str, list[object]] = {}
    for norm in found.values():
        by_weight.setdefault(norm.weight, []).append(norm.key(graph))
    uses = _uses(graph)
    whole = {n for n, keys in by_weight.items() if len(keys) == uses[n] and len(set(keys)) == 1}
    return {node: norm for node, norm in found.items() if norm.weight in whole}


def _counting(
    graph: Analysis, model: nn.Module, norms: Mapping[fx.Node | None, object], zero: set[fx.Node]
) -> dict[fx.Node | None, Counting]:
    """Statistics that a module of torch takes, or that code calls by their name.

    A place in the code serves all that it runs for, when these count equally many. A mean is that
    of the masked model where what left is zero in it: of the squares in a LayerNorm that is spelled
    out, it is not.
    """
    every = {n: norm for record in graph.records for n in record.ops if (norm := Counting.of(n))}
    by_place: dict[tuple[str, Site | None], set[int]] = {}
    for norm in every.values():
        by_place.setdefault((norm.module, norm.site), set()).add(norm.now)
    found: dict[fx.Node | None, Counting] = {}
    for node in dict.fromkeys(node for _, _, node in graph.marks.statistics):
        if node is None or node not in every or node in norms:
            continue
        norm = every[node]
        module = model.get_submodule(norm.module)
        kind = norm.site is None and counted(module) > 0
        kind = kind or (norm.site is not None and counts_in_code(module, norm.site))
        alone = len(by_place[norm.module, norm.site]) == 1
        if kind and alone and (packet_of(node) is not aten.mean or node.args[0] in zero):
            found[node] = norm
    return found


def _uses(graph: Analysis) -> dict[str, int]:
    """How often every parameter is read."""
    uses: dict[str, int] = {}
    for record in graph.records:
        for node in record.graph.nodes:
            if node.op == "get_attr":
                uses[str(node.target)] = uses.get(str(node.target), 0) + len(node.users)
    return uses


def _fused(node: fx.Node, model: nn.Module) -> RootMeanSquare | None:
    args = args_of(node)
    source, shape, weight, eps = (*args, None, None)[:4]
    module = str(node.meta["module"])
    attribute = "" if eps is None else _attribute(model, module, eps)
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or attribute is None:
        return None
    ndim = len(source.meta["shape"])
    dims = tuple(range(ndim - len(shape), ndim))
    return RootMeanSquare(source, dims, str(weight.target), -0.5, module, attribute, eps or 0.0)


def _attribute(model: nn.Module, module: str, value: float) -> str | None:
    """The only attribute of a module that holds a float."""
    state = vars(model.get_submodule(module))
    names = [name for name, held in state.items() if type(held) is float and _same(held, value)]
    return names[0] if len(names) == 1 else None


def _same(held: float, given: float) -> bool:
    """Whether an op was given a number, which it may have rounded."""
    return math.isclose(held, given, rel_tol=1e-6)


def _least(eps: float) -> bool:
    """Whether eps is the rounding error of a type: nothing that needs to change."""
    types = torch.float16, torch.bfloat16, torch.float32, torch.float64
    return eps in {torch.finfo(dtype).eps for dtype in types}


class _Following:
    """Follows a factor from a mean to the weight that absorbs it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.powers: dict[fx.Node, float] = {}  # of the factor by which a value is off
        self.weights: set[tuple[str, float]] = set()
        self.eps: set[tuple[str, str, float]] = set()

    def norm(self, mean: fx.Node) -> RootMeanSquare | None:
        """The norm that a mean belongs to."""
        args = args_of(mean)
        if len(args) < 2:
            return None
        source, ndim = args[0], len(args[0].meta["shape"])
        self.powers[mean] = 1.0
        nodes: Iterator[fx.Node] = iter(mean.graph.nodes)
        if not all(self._step(node) for node in nodes if self.powers.keys() & _inputs(node)):
            return None
        if len(self.weights) != 1 or len(self.eps) > 1:
            return None
        ((weight, power),) = self.weights
        dims = tuple(d % ndim for d in args[1])
        return RootMeanSquare(source, dims, weight, power, *next(iter(self.eps), ("", "", 0.0)))

    def _step(self, node: fx.Node) -> bool:
        op = op_of(node)
        args: list[Any] = list(node.args)
        if op.signs:
            return op.signs == (1, 1) and self._add(node, args)
        if len(op.powers) == 2:
            return self._product(node, args, op.powers[1])
        if op.linear and len(node.all_input_nodes) == 1 and "shape" in node.meta:
            self.powers[node] = self.powers[node.all_input_nodes[0]]
        elif op.powers:
            self.powers[node] = self.powers[args[0]] * op.powers[0]
        elif packet_of(node) is aten.pow and isinstance(args[1], int | float):
            self.powers[node] = self.powers[args[0]] * args[1]
        else:
            return False
        return True

    def _add(self, node: fx.Node, args: list[Any]) -> bool:
        """Only eps, an attribute of the module, may be added, and only to the mean itself."""
        module = str(node.meta["module"])
        if isinstance(args[1], fx.Node) or self.powers.get(args[0]) != 1:
            return False
        attribute = _attribute(self.model, module, args[1])
        if attribute is None and not _least(args[1]):
            return False
        if attribute is not None:
            value = getattr(self.model.get_submodule(module), attribute)
            self.eps.add((module, attribute, value))
        self.powers[node] = 1.0
        return True

    def _product(self, node: fx.Node, args: list[Any], sign: float) -> bool:
        """Factors multiply, and a weight absorbs them."""
        left, right = (self.powers.get(arg, 0.0) if _is_node(arg) else 0.0 for arg in args[:2])
        power = left + sign * right
        weights = [_parameter(arg) for arg in args[:2] if _is_node(arg)]
        weight = next((name for name in weights if name), None)
        if weight is not None and sign == 1:
            self.weights.add((weight, power))
        elif power:
            self.powers[node] = power
        return True


def _inputs(node: fx.Node) -> set[fx.Node]:
    return set(node.all_input_nodes)


def _is_node(value: object) -> bool:
    return isinstance(value, fx.Node)


def _parameter(node: fx.Node) -> str | None:
    """The name of the parameter that a value is, cast or not."""
    while packet_of(node) is aten._to_copy:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else None
