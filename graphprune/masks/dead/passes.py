"""One recorded pass of a model with its weights: the readers of its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphprune.channels.analysis import Analysis
from graphprune.masks.dead.affine import Affine, parts_of
from graphprune.masks.dead.readers import (
    AffineReader,
    GroupReader,
    OtherReader,
    ProductReader,
    Reader,
    StatisticsReader,
)
from graphprune.masks.dead.relations import NORMS, Relation, aligned, norm_before, relation
from graphprune.masks.dead.sinks import Matrix, Sink, needed, sink_of, stored_matrix
from graphprune.masks.interpret import Interpreter, real_tensors
from graphprune.ops.calls import args_of
from graphprune.ops.fact import Fact
from graphprune.ops.ids import varying
from graphprune.ops.registry import op_of, packet_of
from graphprune.ops.values import Value
from graphprune.ops.views import factors_of, matrix_of, norm_of
from graphprune.record.inputs import Call
from graphprune.record.recording import record_values

aten = torch.ops.aten
_GROUPS: dict[object, int] = {aten.native_group_norm: 6, torch.ops.graphprune.group_norm: 1}


class Pass:
    """The readers of one recorded pass in eval mode, and which outputs of layers are constant.

    Args:
        model: with the weights, masks applied by hooks; it is not touched.
        call: inputs of any values.
        attention: as for ``trace``.
        fold: as for ``Plan.from_masks``.

    Raises:
        TraceError: the model does not run on these inputs.
    """

    def __init__(self, model: nn.Module, call: Call, attention: str, fold: str) -> None:
        rec = record_values(model, call)
        self.model, self.call, self.fold = model, call, fold
        self.analysis = Analysis.build(model, [rec], attention)
        tensors = real_tensors(model)
        self.vectors = {name: t.clone() for name, t in tensors.items() if t.dim() == 1}
        self.counts = {  # of numbers other than zero, by tensor and dimension
            (name, dim): _count(tensor, dim)
            for name, tensor in tensors.items()
            for dim in range(tensor.dim() if tensor.dim() > 1 else 0)
        }
        self.inside = Interpreter(rec, tensors)
        self.readers: list[Reader] = []
        self.sinks: dict[AffineReader, Sink] = {}
        self.matrices: dict[AffineReader, Matrix] = {}
        self.relations: dict[fx.Node, Relation | None] = {}  # behind LayerNorms
        self.dead: list[tuple[str, np.ndarray]] = []  # constant outputs of a layer: their ids
        for node, known in self.inside.run():
            self._note_dead(node, known)
            if packet_of(node) in NORMS:
                self.relations[node] = relation(node, known)
            if self.analysis.marks.sums(node):
                self._read(node, known)
        del self.inside
        self.first = self.analysis.own
        self.labels = self.analysis.units.labels
        self.own = self.labels[: self.first]  # the units of the slices of parameters
        self.free = np.ones(len(self.analysis.units.frozen), bool)
        self.free[self.own] = False
        self.order = np.argsort(self.own, kind="stable")
        self.starts = np.searchsorted(self.own[self.order], np.arange(len(self.free) + 1))

    def alive(self, slots: np.ndarray) -> np.ndarray:
        """For every id whether it stays, given that for the ids of parameters."""
        alive = self.free.copy()  # what belongs to no parameter leaves with the last tied to it
        alive[self.own[slots]] = True
        by_id: np.ndarray = alive[self.labels]
        return by_id

    def slots_of(self, index: int) -> np.ndarray:
        """The ids of parameters that an id stands for."""
        unit = self.labels[index]
        found: np.ndarray = self.order[self.starts[unit] : self.starts[unit + 1]]
        return found

    def _read(self, node: fx.Node, known: Mapping[fx.Node, object]) -> None:
        self.readers.append(
            self._affine(node, known)
            or self._product(node, known)
            or self._statistics(node, known)
            or OtherReader(node, self._factors(node, known))
        )

    def _factors(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> list[tuple[Value, Fact]]:
        values = self.analysis.values
        return [(values[n], known[n]) for n in node.all_input_nodes if isinstance(known[n], Fact)]

    def _affine(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> AffineReader | None:
        parts = parts_of(node)
        if parts is None or node.kwargs or not isinstance(parts[0], fx.Node):
            return None
        x, weight, _, turned, how = parts
        value, matrix = known[x], known[weight]
        if (
            not matrix.constant
            or matrix.value.dim() < 2
            or (how is None and matrix.value.dim() > 2)
        ):
            return None
        if turned:
            matrix = Fact(matrix.value.T, matrix.unknown.T)
        ids = [
            _along(self.analysis.values[source], dim, size)
            for source, dim, size in (
                (x, 1 if how else -1, value.value.shape[1 if how else -1]),
                (node, 1 if how else -1, node.meta["shape"][1 if how else -1]),
            )
        ]
        outputs = node.meta["shape"][1 if how else -1]
        sink = sink_of(node, self.model, self.inside)
        related = self._related(x, ids[0], how, matrix) if sink is not None else None
        affine = Affine(node, value, matrix, how, needed(node, outputs, self.inside), related)
        affine.settle(self.fold, sink is not None)
        reader = AffineReader(node, affine, *ids)
        if sink is not None:
            self.sinks[reader] = sink
        matrix_name = stored_matrix(node)
        if matrix_name is None:
            affine.unrelate()
        if matrix_name is not None:
            self.matrices[reader] = matrix_name
        return reader

    def _related(
        self, x: fx.Node, inputs: np.ndarray, how: tuple[Any, ...] | None, weight: Fact
    ) -> Relation | None:
        """What holds of the inputs of a layer that reads a LayerNorm, place by place."""
        norm = norm_before(x)
        if norm is None or self.fold == "none" or not (how is None or _by_place(how, weight)):
            return None
        first = norm.meta["items"][0]
        outputs = _along(self.analysis.values[first], -1, first.meta["shape"][-1])
        return self.relations[norm] if aligned(inputs, outputs) else None

    def _product(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> ProductReader | None:
        product = factors_of(node)
        if product is None or any(isinstance(value, fx.Node) for value in product.needs):
            return None
        factors = [(self.analysis.values[n], known[n]) for n in product.operands]
        return ProductReader(node, product.product, factors, self.analysis.values[node])

    def _statistics(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Reader | None:
        if op_of(node).masked is None:
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        place = _GROUPS.get(packet_of(node))
        if place is not None:
            groups = int(args_of(node)[place])
            return GroupReader(node, self.analysis.values[source], known[source], groups)
        ids = self.analysis.marks.masked_ids(node)
        return StatisticsReader(node, self.analysis.values[source], known[source], ids)

    def _note_dead(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> None:
        """Outputs of convolutions, linear layers and BatchNorms that are constant."""
        norm, layer = norm_of(node), matrix_of(node)
        if norm is None and layer is None:
            return
        fact = known[node] if norm is None else known[node][0]
        result = node if norm is None else node.meta["items"][0]
        dim = 1 if layer is None else layer.dim % fact.unknown.dim()
        unknown = fact.unknown.movedim(dim, 0).reshape(fact.unknown.shape[dim], -1).any(1)
        if bool(unknown.all()):
            return
        ids = _along(self.analysis.values[result], dim, len(unknown))
        self.dead.append((str(node.meta.get("module", "")), ids[:, ~unknown.numpy()]))


def _by_place(how: tuple[Any, ...], weight: Fact) -> bool:
    """Whether a convolution looks at one place at a time, and at no padding."""
    _, padding, _, transposed, _, groups = how
    return not any(padding) and not transposed and groups == 1 and weight.value[0, 0].numel() == 1


def _count(tensor: Tensor, dim: int) -> np.ndarray:
    others = [d for d in range(tensor.dim()) if d != dim]
    return (tensor != 0).sum(others).numpy()


def _along(value: Value, dim: int, size: int) -> np.ndarray:
    """The ids of a value along one dimension alone, [layers, positions]."""
    dim %= max(value.ndim, 1)
    rows = [layer.flatten().numpy() for layer in value.layers if varying(layer) == {dim}]
    return np.stack(rows) if rows else np.zeros((1, size), np.int64)
