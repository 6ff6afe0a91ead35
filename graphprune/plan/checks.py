"""What a plan may change: looked at before anything moves, as if a stranger had written it.

A plan names tensors, attributes and numbers in code. It may cut the former, set the latter to other
sizes, and nothing else: no attribute that is no size, no number that is not there, nothing that
would take more memory than the model.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from graphprune.arguments import is_int
from graphprune.errors import PlanError
from graphprune.plan.changes import (
    FREE,
    BiasChange,
    Cut,
    ExpertsPlan,
    IndexChange,
    LiteralChange,
    MergeChange,
    NormChange,
    Rescale,
    SizeChange,
    SlotPlan,
    StandIn,
)
from graphprune.plan.leaving import left_of
from graphprune.plan.vocabulary import problems
from graphprune.record.attention import is_attention
from graphprune.record.norms import counted, counts_in_code
from graphprune.record.sites import (
    INNER_SIZES,
    OF,
    TIMES,
    defined,
    digest,
    follow,
    forward_of,
    holders,
    is_literal,
    lacks,
    spans_of,
    start,
)
from graphprune.record.sizes import CONTAINERS, Attribute, plain
from graphprune.record.tensors import held_tensors, named_modules

Shape = tuple[int, ...]
MASK = "_mask"
_DEFAULTS = {(name,) for name in ("scale", OF, *INNER_SIZES)}
_WAY = r"(args\.\d{1,4}|kwargs\.\w{1,100})(\.\w{1,100}){0,8}"
_GIVES = re.compile(rf"none|zero|empty|(zeros |none of )?{_WAY}( in \d(,\d){{0,8}})?", re.ASCII)
_BOOKKEEPING = frozenset(vars(nn.Module()))
_CHANGES = ("slots", "sizes", "literals", "indices", "scales", "norms", "biases", "cuts",
            "stand_ins", "vocabularies", "experts")  # fmt: skip
# The sizes that torch's own layers remember: its other numbers (a stride, a kernel) are no widths.
SIZES = frozenset({
    "in_channels", "out_channels", "groups", "in_features", "out_features", "in1_features",
    "in2_features", "num_features", "num_channels", "num_groups", "normalized_shape",
    "embedding_dim", "num_embeddings", "hidden_size", "input_size", "proj_size", "embed_dim",
    "kdim", "vdim", "num_heads", "nhead", "head_dim", "value_dim", "d_model", "unflattened_size",
    "num_parameters",
})  # fmt: skip


def check_alone(plan: object, name: str = "the plan") -> None:
    """Raise unless the parts of a plan fit together, whatever model it is for.

    Raises:
        PlanError: says what does not fit.
    """
    for problem in _problems(plan):
        raise PlanError(f"{name} is damaged: {problem}")


def _problems(plan: Any) -> Iterator[str]:
    for field in _CHANGES:
        counts = Counter(change.key for change in getattr(plan, field))
        yield from (f"two {field} for {key}" for key, count in counts.items() if count > 1)
    for slot in (*plan.slots, *plan.zeroed):
        where = f"dimension {slot.dim} of {slot.tensor!r}"
        if slot.dim < 0 or slot.size < 1 or slot.blocks < 1 or len(slot.kept) % slot.blocks:
            yield f"{where} cannot have {slot.size} indices in {slot.blocks} blocks"
        elif not all(_increasing(part, slot.size) for part in slot.by_block):
            yield f"the indices of {where} are not in order, or too large"
    for change in plan.experts:
        if not change.kept or not _increasing(change.kept, change.size):
            yield f"the experts of {change.mixture!r} are not in order, or too many"
    for group in plan.groups:
        if not _increasing(group.kept, group.size):
            yield f"the channels of group {group.name!r} are not in order, or too large"
    yield from _wrong_values(plan)
    yield from problems(plan)
    request = plan.request
    while request:
        if not isinstance(request, Mapping):
            yield "what was asked for before is no object"
            return
        request = request.get("after")


def _wrong_values(plan: Any) -> Iterator[str]:
    for index in plan.indices:
        largest = max(index.values, default=-1)
        known = min(index.values, default=-1) >= 0 and index.kept
        if not known or not _increasing(index.kept, largest + 1):
            yield f"the channels that {index.tensor!r} numbers"
    for scale in plan.scales:
        if scale.factor <= 0 or scale.new < 0:
            yield f"the factor of {scale.tensor!r} is not positive"
    for merge in plan.merges:
        targets = [merge.into, *merge.spread]
        alone = len({*targets, *merge.sources}) == len(targets) + len(merge.sources)
        shares = len(merge.shares or (1,)) == len(targets)
        if not (alone and shares and len(merge.sources) == len(merge.factors)):
            yield f"the slices of {merge.tensor!r} that are added"
    if min(*vars(plan.before).values(), *vars(plan.after).values()) < 0:
        yield "a cost is negative"


def _increasing(kept: tuple[int, ...], size: int) -> bool:
    inside = not kept or (kept[0] >= 0 and kept[-1] < size)
    return inside and all(map(operator.lt, kept, kept[1:]))


def check_on(plan: object, model: nn.Module) -> None:
    """Raise unless a plan changes nothing of a model but what a plan for it can change.

    Args:
        plan: one that :func:`check_alone` accepts, of the architecture of the model.
        model: it is not touched.

    Raises:
        PlanError: names what the plan must not change, or what is not there.
    """
    Check(plan, model).run()


class Check:
    """A plan and the model that it would change."""

    def __init__(self, plan: Any, model: nn.Module) -> None:
        self.plan, self.model = plan, model
        self.modules = dict(named_modules(model))
        self.tensors = dict(held_tensors(model))
        sides = (side for tensor in self.tensors.values() for side in tensor.shape)
        self.largest = max(sides, default=1)
        self.widths = {slot.key: slot.width for slot in plan.slots}

    def run(self) -> None:
        """Look at every change."""
        for cut in self.plan.cuts:
            self.cut(cut)
        for stand_in in self.plan.stand_ins:
            self.stand_in(stand_in)
        for change in self.plan.experts:
            self.experts(change)
        for slot in (*self.plan.slots, *self.plan.zeroed):
            self.slot(slot)
        for size in self.plan.sizes:
            self.size(size)
        for literal in self.plan.literals:
            self.literal(literal)
        for index in self.plan.indices:
            self.index(index)
        for scale in self.plan.scales:
            self.scale(scale)
        for norm in self.plan.norms:
            self.norm(norm)
        for bias in self.plan.biases:
            self.bias(bias)
        for merge in self.plan.merges:
            self.merge(merge)
        self.layers()
        self.report()

    def need(self, holds: bool, what: str) -> None:
        """Raise unless something holds."""
        if not holds:
            raise PlanError(f"the plan does not fit the model: {what}; trace this model anew")

    def tensor(self, name: str, dim: int = 0) -> Tensor:
        """A parameter or buffer that has a dimension."""
        found = self.tensors.get(name)
        self.need(found is not None, f"it has no tensor {name!r}")
        assert found is not None
        self.need(0 <= dim < max(found.dim(), 1), f"{name!r} has no dimension {dim}")
        return found

    def module(self, name: str) -> nn.Module:
        """A module by its first name."""
        self.need(name in self.modules, f"it has no module {name!r}")
        return self.modules[name]

    def cut(self, cut: Cut) -> None:
        """A sum in the code of a module that is there."""
        self.module(cut.module)
        self.need(cut.place >= 0 and cut.side in (0, 1), f"{cut.module!r} has no such sum")

    def stand_in(self, stand_in: StandIn) -> None:
        """A module that is not the whole model, and what may take its place."""
        self.module(stand_in.module)
        self.need(bool(stand_in.module), "the whole model cannot leave")
        missing = self.plan.cuts or not all(slot.kept for slot in self.plan.slots)
        self.need(bool(missing), "modules leave although nothing counts as zero")
        known = stand_in.holder in ("", "tuple", "list")
        one = len(stand_in.gives) == 1 or (stand_in.holder and stand_in.gives)
        fits = known and one and all(_GIVES.fullmatch(text) for text in stand_in.gives)
        self.need(bool(fits), f"nothing can take the place of {stand_in.module!r} like that")

    def experts(self, change: ExpertsPlan) -> None:
        """A mixture of so many experts, all slices of which are cut alike."""
        where = f"the experts of {change.mixture!r}"
        self.module(change.mixture)
        cut = {slot.key: slot for slot in self.plan.slots}
        for name, dim in change.slices:
            slot = cut.get((name, dim))
            fits = slot and change.fits(slot.size) and slot.kept == change.kept_of(slot.size)
            self.need(bool(fits) or not change.gone, f"{name!r} is not cut as {where} are")
        sliced = {name for name, _ in change.slices}
        scores = {*change.routers, *change.added} <= sliced and change.routers
        self.need(bool(scores), f"{where} have no such scores")
        for name in change.added:
            vector = self.tensor(name)
            fits = change.fits(vector.numel()) and vector.is_floating_point()
            self.need(fits, f"{name!r} is no vector of scores")
        for container in change.containers:
            held = self.module(container.name)
            kind = isinstance(held, nn.ModuleList | nn.ModuleDict | nn.Sequential)
            known = {key for key, part in held._modules.items() if part is not None}
            same = kind and {*container.keys} <= known
            count = len({*container.keys})
            fits = count == len(container.keys) <= change.size and change.fits(count)
            self.need(same and fits, f"{container.name!r} does not hold {where}")

    def slot(self, slot: SlotPlan) -> None:
        """A dimension of the right size, in blocks of rows that are there."""
        shape = tuple(self.tensor(slot.tensor, slot.dim).shape)
        self.need(
            bool(shape) and shape[slot.dim] == slot.size,
            f"{slot.tensor!r} is {list(shape)}, not {slot.size} in dimension {slot.dim}",
        )
        rows = slot.blocks == 1 or (slot.dim > 0 and shape[0] % slot.blocks == 0)
        self.need(rows, f"{slot.tensor!r} has no {slot.blocks} blocks of rows")

    def size(self, change: SizeChange) -> None:
        """An attribute that is a size, with the value that it has, and a new one in range."""
        module, where = self.module(change.module), f"{change.module}.{change.name}".lstrip(".")
        value = _remembered(module, change.name)
        self.need(may_be_size(module, change.name), f"{where} is no size that a plan can change")
        for key in change.path:
            named = isinstance(value, dict) and key in value
            placed = type(value) in CONTAINERS and type(key) is int and 0 <= key < len(value)
            self.need(named or placed, f"{where} has no such place")
            value = value[key]
        self.need(is_int(value), f"{where} is no int")
        self.need(plain(value) == change.old, f"{where} is {plain(value)!r}, not {change.old}")
        self.range(change.new, change.old, where)

    def range(self, new: float, old: float, where: str) -> None:
        """No size grows beyond what the model has."""
        most = max(abs(old), self.largest)
        self.need(abs(new) <= most, f"{new} is out of range for {where}, which was {old}")

    def literal(self, change: LiteralChange) -> None:
        """A number in code that the forward of a module runs, in the source that it had."""
        module = self.module(change.module)
        where = f"a number in the code of {change.module!r}"
        function = forward_of(module)
        for step in change.site.steps:
            self.need(_calls(function, step[1]), f"{where} is not there ({step[1]!r})")
            try:
                function = follow(function, step, module)
            except (KeyError, AttributeError, TypeError):
                function = None
        self.need(isinstance(function, types.FunctionType), f"{where} is not there")
        if digest(function.__code__) != change.digest:
            raise PlanError(
                f"the source of {function.__qualname__} is not the one that the plan changes: "
                "make a new plan for this version"
            )
        self.need(bool(change.path), f"{where} has no place")
        old, new = plain(change.old), plain(change.new)
        self.need(type(new) is type(old) or isinstance(old, float), f"{where} is of another kind")
        if change.path == (OF,):
            most = max((tensor.numel() for tensor in self.tensors.values()), default=0)
            fair = 0 < new == old <= most and counts_in_code(module, change.site)
            self.need(fair, f"{where} does not count {new} numbers")
        self.range(new, old, where)
        known = {(e.site, e.path): e.new for e in getattr(vars(module).get("forward"), "edits", ())}
        found = known.get((change.site, change.path), _written(function, change))
        if found is not None and change.path[-1] == TIMES:  # a factor for whatever stands there
            self.need(change.old > 0 and change.new > 0, f"{where} would not be a size")
            return
        self.need(found is not None, f"{where} is not there")
        self.need(isinstance(found, str) or plain(found) == old, f"{where} is {found}, not {old}")

    def index(self, change: IndexChange) -> None:
        """A buffer of channel numbers, with the numbers that it has."""
        buffer = self.tensor(change.tensor)
        kind = buffer.dtype == torch.int64 and buffer.dim() == 1
        self.need(
            kind and len(buffer) == len(change.values) and max(change.values) < self.largest,
            f"{change.tensor!r} does not number channels",
        )
        if not buffer.is_meta and tuple(buffer.tolist()) != change.values:
            raise PlanError(
                f"buffer {change.tensor!r} permutes channels in another order than in the model "
                "that the plan was made for: make a new plan"
            )

    def scale(self, change: Rescale) -> None:
        """A weight, and the float that its norm adds."""
        weight = self.tensor(change.tensor)
        self.need(weight.is_floating_point(), f"{change.tensor!r} is no weight")
        value = vars(self.module(change.module)).get(change.attribute) if change.attribute else 0.0
        where = f"{change.module}.{change.attribute}".lstrip(".")
        if change.attribute:
            self.need(type(value) is float, f"{where} is no eps that a plan can change")
            self.need(value == change.old, f"{where} is {value!r}, not {change.old}")
            self.need(0 <= change.new <= 1, f"{change.new} is out of range for {where}")
        fair = 1 / self.largest <= change.factor <= self.largest
        self.need(fair, f"the factor {change.factor} of {change.tensor!r} is out of range")

    def norm(self, change: NormChange) -> None:
        """A norm of torch, which counts no more than it does now, and no fewer than are left."""
        most = max((tensor.numel() for tensor in self.tensors.values()), default=0)
        now = min(counted(self.module(change.module)), most)
        self.need(now > 0, f"{change.module!r} is no norm or softmax of torch")
        left = self.counted_after(change.module)
        fair = left <= change.of <= now
        self.need(fair, f"{change.module!r} counts from {left} to {now} numbers, not {change.of}")

    def counted_after(self, name: str) -> int:
        """How many numbers a norm, or a group of one, is given by the small model."""
        module, sizes = self.module(name), {size.key: size.new for size in self.plan.sizes}
        weight = f"{name}.weight".lstrip(".")
        if isinstance(module, nn.GroupNorm):
            groups = sizes.get(Attribute(name, "num_groups"), module.num_groups)
            return self.shape(weight)[0] // max(groups, 1) if weight in self.tensors else 1
        if weight in self.tensors:
            return math.prod(self.shape(weight))
        if not isinstance(module, nn.LayerNorm):
            return 1
        return math.prod(
            sizes.get(Attribute(name, "normalized_shape", (place,)), side)
            for place, side in enumerate(module.normalized_shape)
        )

    def bias(self, change: BiasChange) -> None:
        """A vector of the right length, or the place for a new one."""
        if change.like is None or change.tensor in self.tensors:
            vector = self.tensor(change.tensor)
            fits = vector.dim() == 1 and vector.is_floating_point()
            size = len(vector) if fits else -1
        else:
            owner, _, leaf = change.tensor.rpartition(".")
            places = self.module(owner)._parameters
            fits = leaf in places and places[leaf] is None
            size = self.tensor(*change.like).shape[change.like[1]]
        self.need(fits, f"{change.tensor!r} is no vector, nor the place of one")
        self.need(size == len(change.values), f"{change.tensor!r} has {size} entries")

    def merge(self, change: MergeChange) -> None:
        """Slices that are there, and a mask of the same shape."""
        weight = self.tensor(change.tensor, change.dim)
        size = weight.shape[change.dim] if weight.dim() else 0
        slices = (change.into, *change.spread, *change.sources)
        self.need(0 <= min(slices) <= max(slices) < size, f"{change.tensor!r} has no such slices")
        if change.mask is not None:
            mask = self.tensor(change.mask)
            fits = change.mask == change.tensor.removesuffix("_orig") + MASK
            self.need(fits and mask.shape == weight.shape, f"{change.mask!r} masks something else")

    def shape(self, name: str) -> Shape:
        """That of a tensor after the plan."""
        sides = self.tensors[name].shape
        return tuple(self.widths.get((name, dim), side) for dim, side in enumerate(sides))

    def layers(self) -> None:
        """The tensors of torch's own layers still fit each other."""
        for owner in dict.fromkeys(slot.tensor.rpartition(".")[0] for slot in self.plan.slots):
            layer = self.modules.get(owner)
            shapes = {
                leaf: self.shape(name)
                for leaf in (*_own(layer, "_parameters"), *_own(layer, "_buffers"))
                for name in [f"{owner}.{leaf}".lstrip(".")]
                if name in self.tensors
            }
            known = isinstance(layer, nn.Linear | _ConvNd) and {"weight", "bias"} <= shapes.keys()
            if known and len(shapes["weight"]) == _dims(layer):
                turned = isinstance(layer, _ConvNd) and layer.transposed
                out = shapes["bias"][0] if turned else shapes["weight"][0]
                self.need(
                    shapes["bias"] == (out,), f"{owner!r} would have a bias of another length"
                )
            for leaf in [leaf for leaf in shapes if leaf.endswith(MASK)]:
                masked = shapes.get(f"{leaf.removesuffix(MASK)}_orig", shapes[leaf])
                self.need(masked == shapes[leaf], f"the mask of {owner!r} would have another shape")
            if isinstance(layer, _NormBase):
                vectors = {shape for shape in shapes.values() if len(shape) == 1}
                self.need(len(vectors) <= 1, f"{owner!r} would have vectors of different lengths")

    def report(self) -> None:
        """What the plan says of itself is what it does."""
        touched = {slot.tensor for slot in self.plan.slots}
        touched |= {name.rpartition(".")[0] for name in touched}
        for group in self.plan.groups:
            if len(group.kept) < group.size:
                missing = next((name for name in group.layers if name not in touched), None)
                self.need(missing is None, f"it leaves {missing!r} out of group {group.name}")
        if self.plan.before == self.plan.after == FREE:
            return
        parameters = {id(parameter) for parameter in self.model.parameters()}
        left = left_of(self.model, self.plan)[1]
        count = sum(
            math.prod(self.shape(name))
            for name, tensor in self.tensors.items()
            if id(tensor) in parameters and name in left
        )
        for change in self.plan.biases:
            if change.like is not None and change.tensor not in self.tensors:
                count += self.widths.get(change.like, len(change.values))
        told = self.plan.after.params
        self.need(count == told, f"it leaves {count} parameters where it says {told}")


def _dims(layer: Any) -> int:
    """Of the weight of a linear layer or convolution of torch; classes derived may have more."""
    return 2 + len(getattr(layer, "kernel_size", ()))


def _own(layer: nn.Module | None, members: str) -> Iterable[str]:
    return () if layer is None else vars(layer)[members]


def _remembered(module: nn.Module, name: str) -> Any:
    """An attribute; those that torch's attention gets when it is cut are in its sizes."""
    if name in ("head_dim", "value_dim") and is_attention(module):
        layer: Any = module
        return layer.embed_dim // layer.num_heads
    return vars(module).get(name)


def may_be_size(module: nn.Module, name: str) -> bool:
    """Whether a number of a module may be a width: of torch's own layers some are not."""
    kind = type(module)
    if name in SIZES or name in vars(kind).get("SIZES", ()):  # a class that is there for them
        return True
    if name in _BOOKKEEPING or kind.__module__.startswith(("torch.nn", "graphprune.")):
        return False
    bases = (base for base in kind.__mro__ if base.__module__.startswith("torch.nn"))
    return not any(name in vars(base).get("__constants__", ()) for base in bases)


def _calls(function: object, name: str) -> bool:
    """Whether a function may call something by a name."""
    code = getattr(function, "__code__", None)
    return isinstance(code, types.CodeType) and name in {*_names(code), *code.co_freevars}


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {*code.co_names, *(name for part in inner for name in _names(part))}


def _written(function: Any, change: LiteralChange) -> Any:
    """The number that stands in the source; text for an expression or a default; else ``None``."""
    site = replace(change.site, first=start(function.__code__))
    definition = defined(function.__code__)
    for node in ast.walk(definition) if definition is not None else ():
        if site.absolute not in spans_of(node):
            continue
        try:
            holder = next(holders(node, site, change.path), None)
            if holder is not None:
                expression: Any = holder.expression
                plain_number = not holder.rest and is_literal(expression)
                return ast.literal_eval(expression) if plain_number else "an expression"
            if isinstance(node, ast.Call) and lacks(node, site, change.path):
                return "a default" if change.path in _DEFAULTS else None
        except (AttributeError, IndexError, KeyError, TypeError):  # a place that is not there
            return None
    return None
