"""Find what scores experts, in a recorded graph: weights that meet what the model is given.

Either what they make is ranked, or it weighs what experts make, each of which then takes part. How
many experts there are the module around tells: it holds a module or a slice of a tensor for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from graphprune.ops.fact import arguments
from graphprune.ops.registry import op_of
from graphprune.parts.find import Finder
from graphprune.parts.stream import covers
from graphprune.record.tensors import held_tensors, named_modules

aten = torch.ops.aten

LISTS = nn.ModuleList | nn.ModuleDict | nn.Sequential
Lists = dict[str, tuple[str, ...]]  # of modules, by name, with their keys
Routers = dict[str, int]  # weights, with the dimension of what they score
_WAYS = 4  # of taking the sides of routers, where several are as large
_WEIGHTS = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # how many dimensions they have


@dataclass
class Candidate:
    """What may be a mixture.

    Attributes:
        name: the module that chooses among experts.
        size: how many there are.
        held: for how many of them, the first ones, there is a module or a slice of a tensor.
        least: how many are chosen at once.
        lists: of a module for each, by name, with their keys.
        sides: its routers, with the dimensions that may be of experts.
        kernels: tensors with a row for every expert that a convolution takes a mixture of.
    """

    name: str
    size: int
    held: int
    lists: Lists
    least: int = 1
    sides: dict[str, list[int]] = field(default_factory=dict)
    kernels: set[str] = field(default_factory=set)

    @property
    def ways(self) -> list[Routers]:
        """The routers: several, where two sides of one are equal."""
        found = itertools.product(*self.sides.values())
        return [dict(zip(self.sides, way)) for way in itertools.islice(found, _WAYS)]


class Scoring:
    """The weights that score experts in a recorded graph."""

    def __init__(self, finder: Finder, model: nn.Module) -> None:
        self.finder = finder
        self.tensors = dict(held_tensors(model))

    @cached_property
    def candidates(self) -> list[Candidate]:
        """What may be mixtures, in the order in which they run."""
        found: dict[tuple[str, int], Candidate] = {}
        for node in self.finder.nodes:
            for router in self._meeting(node):
                for name, size, held in self._around(router, node):
                    lists = self._weighed(name, held, router, node)
                    each = found.setdefault((name, size), Candidate(name, size, held, lists))
                    if any(covers(f"{name}.{key}".strip("."), router) for key in each.lists):
                        continue
                    each.sides[router] = self._sides(router, size)
                    each.kernels |= self._kernels_of(name, held)
                    ranks = (_least(rank, size) for rank in self._ranked(node))
                    each.least = max([each.least, *ranks])
        for each in found.values():
            stacks = self._stacks(each.name, each.held)
            rest = {router: dims for router, dims in each.sides.items() if router not in stacks}
            each.sides = rest or each.sides  # else what weighs experts looks like one of them
        return [*found.values()]

    # --- weights that meet what the model is given --------------------------------------------

    def _meeting(self, node: fx.Node) -> list[str]:
        """The weights that an op brings together with what the model is given."""
        inputs = node.all_input_nodes if node.op == "call_function" else []
        if all(each in self._made_of for each in inputs):
            return []
        names = (self._made_of[each] for each in inputs if each in self._made_of)
        return [n for n in sorted(set().union(*names)) if self.tensors[n].dim() > 1]

    @cached_property
    def _made_of(self) -> dict[fx.Node, frozenset[str]]:
        """Values that are made of tensors of the model alone, and of which."""
        found: dict[fx.Node, frozenset[str]] = {}
        for node in self.finder.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr":
                name = str(node.target)
                found[node] = frozenset({name} if name in self.tensors else ())
            elif node.op == "call_function" and all(each in found for each in inputs):
                found[node] = frozenset().union(*(found[each] for each in inputs))
        return found

    def _sides(self, router: str, size: int) -> list[int]:
        """The dimensions of a router along which experts may lie."""
        shape = self.tensors[router].shape
        if isinstance(self.finder.modules.get(router.rpartition(".")[0]), tuple(_WEIGHTS)):
            return [0]
        exact = [dim for dim, side in enumerate(shape) if side == size]
        return exact or [dim for dim, side in enumerate(shape) if side % size == 0]

    # --- mixtures around them -----------------------------------------------------------------

    def _around(self, router: str, node: fx.Node) -> Iterator[tuple[str, int, int]]:
        """The smallest modules around a router with what it may score: how many, of how many."""
        made = node.meta.get("shape", ())
        sides = {n for n in self.tensors[router].shape[:3] if any(m % n == 0 for m in made)} - {1}
        known = set[int]()
        for name in _outwards(router.rpartition(".")[0]):
            if name and not self.finder.calls.get(name):
                continue
            for held in sorted(self._sizes[name], key=lambda n: (n not in sides, n)):
                for side in (held,) if held in sides else sorted(sides):
                    size = held if side % held == 0 else side
                    if {size, held}.isdisjoint(known) and self._scores(
                        router, node, name, held, side
                    ):
                        known.add(size)
                        yield name, size, held
            known |= self._sizes_around(name, router)  # what lies in an expert scores no others

    def _sizes_around(self, name: str, router: str) -> set[int]:
        """How many modules the lists in a module have that a weight lies in."""
        around = {each for each in _outwards(router.rpartition(".")[0]) if not self._in_row(each)}
        lists = [each for each in around if not name or covers(name, each)]
        return {len(keys) for each in lists for keys in _keys(self.finder.modules[each])}

    def _in_row(self, name: str) -> bool:
        """Whether a module is layers one after the other."""
        found = self.finder.modules.get(name)  # under its first name, if it has several
        return isinstance(found, nn.Sequential) and name in self.finder.calls

    @cached_property
    def _sizes(self) -> dict[str, set[int]]:
        """How many experts every module may hold: as lists have modules, and stacks slices."""
        found: dict[str, set[int]] = {name: set() for name in ("", *self.finder.modules)}
        for name, module in self.finder.modules.items():
            own = {t.shape[0] for n, t in held_here(module) if is_stack(module, t)}
            own |= {self.tensors[n].shape[0] for n in self._kernels if n.rpartition(".")[0] == name}
            own |= {len(keys) for keys in _keys(module)}
            for outer in _outwards(name):
                found[outer] |= own - {0, 1}
        return found

    def _scores(self, router: str, node: fx.Node, name: str, held: int, side: int) -> bool:
        """Whether a router scores the experts that a module holds so many of.

        It has so many scores: as many, or several for each of them, or some for others besides.
        """
        if not held <= side < 2 * held and side % held:
            return False
        experts = self._experts(name, held, router)
        if not experts or node in experts:
            return False
        ranked = any(True for _ in self._ranked(node))
        if side == held:
            return ranked or self._weighs(node, experts)
        if side % held:
            return ranked
        slots = held, side // held
        shapes = (each.meta.get("shape", ()) for each in self._near(node))
        unfolded = any(slots in itertools.pairwise(shape) for shape in shapes)
        return unfolded and self._weighs(node, experts)

    def _stacks(self, name: str, held: int) -> set[str]:
        """The tensors in a module with so many slices."""
        names = stacked(self.finder.modules[name], held)
        return {f"{name}.{each}".strip(".") for each in names} | self._kernels_of(name, held)

    def _lists(self, name: str, held: int, router: str) -> Lists:
        """The lists of experts in a module: they hold no router, nor are they layers in a row."""
        found: Lists = {}
        for each, part in named_modules(self.finder.modules[name]):
            full = f"{name}.{each}".strip(".")
            if not covers(full, router) and not self._in_row(full):
                found.update((each, keys) for keys in _keys(part) if len(keys) == held)
        return found

    def _weighed(self, name: str, held: int, router: str, node: fx.Node) -> Lists:
        """The lists in a module whose experts a router scores: some may be as long by chance."""
        lists = self._lists(name, held, router)
        if len(lists) < 2 or any(True for _ in self._ranked(node)):
            return lists
        values = {each: self._values(name, [each], lists, set()) for each in lists}
        return {each: lists[each] for each in lists if self._weighs(node, values[each])} or lists

    def _experts(self, name: str, held: int, router: str) -> set[fx.Node]:
        """All values that the experts of a module make, or that are computed by these."""
        lists = self._lists(name, held, router)
        return self._values(name, lists, lists, self._stacks(name, held) - {router})

    def _values(
        self, name: str, names: Iterable[str], lists: Lists, stacks: set[str]
    ) -> set[fx.Node]:
        """All values that modules in lists and slices of stacks make, and those below."""
        key = tuple(names), name, tuple(sorted(stacks))
        if key not in self._known_experts:
            parts = [
                ".".join(filter(None, (name, each, k))) for each in key[0] for k in lists[each]
            ]
            runs = [run for part in parts for run in self.finder.calls.get(part, ())]
            inside = (n for run in runs for n in self.finder.nodes[run.begin : run.end])
            starts = [node for node in inside if node not in self._made_of]
            starts += [node for node, made in self._made_of.items() if made & stacks]
            self._known_experts[key] = {*starts} | self._below(starts)
        return self._known_experts[key]

    @cached_property
    def _known_experts(self) -> dict[object, set[fx.Node]]:
        return {}

    # --- what scores are for ------------------------------------------------------------------

    def _ranked(self, node: fx.Node) -> Iterator[fx.Node]:
        """The ops that rank what an op makes, without a product in between."""
        return (each for each in self._near(node) if op_of(each).chooses)

    def _near(self, node: fx.Node) -> list[fx.Node]:
        """What is computed from a value, without a product in between, or another weight."""
        found, waiting = {node: None}, [node]
        while waiting:
            users = waiting.pop().users
            new = [each for each in users if each not in found and not self._ends(each)]
            found.update(dict.fromkeys(new))
            waiting += new
        return [*found]

    def _ends(self, node: fx.Node) -> bool:
        """Whether a value is multiplied, or meets a weight."""
        if node not in self._known_ends:
            self._known_ends[node] = bool(self.finder.macs.get(node) or self._meeting(node))
        return self._known_ends[node]

    @cached_property
    def _known_ends(self) -> dict[fx.Node, bool]:
        return {}

    def _weighs(self, node: fx.Node, experts: set[fx.Node]) -> bool:
        """Whether something made of scores alone multiplies what experts make."""
        for score in self._near(node):
            for each in score.users if score not in experts else ():
                product = self.finder.macs.get(each) or len(op_of(each).powers) > 1
                if product and any(other in experts for other in each.all_input_nodes):
                    return True
        return False

    def _kernels_of(self, name: str, held: int) -> set[str]:
        """The mixed kernels in a module."""
        return {n for n in self._kernels if covers(name, n) and self.tensors[n].shape[0] == held}

    @cached_property
    def _kernels(self) -> set[str]:
        """The tensors of rows of which something makes a mixture that is a kernel."""
        found: set[str] = set()
        for node in self.finder.nodes:
            given = node.all_input_nodes[1:] if node.target is aten.convolution.default else ()
            for each in given:
                while len(each.all_input_nodes) == 1:
                    each = each.all_input_nodes[0]
                if each not in self._made_of and self.finder.macs.get(each):
                    parts = (self._made_of.get(i, frozenset()) for i in each.all_input_nodes)
                    found |= frozenset().union(*parts)
        return found

    def _below(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """What is computed from values, also by what is written into others."""
        found: set[fx.Node] = set()
        waiting = [*nodes]
        while waiting:
            node = waiting.pop()
            new = {user for user in node.users if user not in found}
            root = self.finder.roots.get(node)
            if root is not None and node in self.finder.writes.get(root, ()):
                new |= {each for each in self._sharing[root] if each not in found}
            found |= new
            waiting += new
        return found

    @cached_property
    def _sharing(self) -> dict[fx.Node, list[fx.Node]]:
        """The values in each storage that something is written into."""
        found: dict[fx.Node, list[fx.Node]] = {root: [] for root in self.finder.writes}
        for node, root in self.finder.roots.items():
            if root in found:
                found[root].append(node)
        return found


def _least(node: fx.Node, size: int) -> int:
    """How many of so many experts a ranking needs; one where it ranks other things."""
    given = arguments(node.target, node.args, node.kwargs)
    shape, dim = node.all_input_nodes[0].meta["shape"], given.get("dim", -1)
    count, wide = given.get("k", 1), shape[dim] if shape and dim is not None else size
    whole = isinstance(count, int) and wide and size % wide == 0
    return count * (size // wide) if whole else 1


def _outwards(name: str) -> Iterator[str]:
    """The names of a module and of all around it."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def held_here(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module itself."""
    for held in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in held.items() if tensor is not None)


def is_stack(module: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor has more dimensions than what a layer holds: a slice for each of several."""
    own = next((dims for kind, dims in _WEIGHTS.items() if isinstance(module, kind)), None)
    if own is None and type(module).__module__.startswith("torch.nn."):
        return False
    return tensor.dim() > (own or 2) and tensor.numel() > max(tensor.shape)


def stacked(module: nn.Module, size: int) -> Iterator[str]:
    """The names of tensors in a module that hold so many slices."""
    for name, part in named_modules(module):
        for own, tensor in held_here(part):
            if is_stack(part, tensor) and tensor.shape[0] == size:
                yield f"{name}.{own}".strip(".")


def _keys(module: nn.Module) -> Iterator[tuple[str, ...]]:
    """The keys of modules in a list, with or without those that have no parameters."""
    if not isinstance(module, LISTS):
        return
    held = {key: [*part.parameters()] for key, part in module._modules.items() if part is not None}
    own = [key for key, parameters in held.items() if parameters]
    if len({id(p) for key in own for p in held[key]}) == sum(map(len, held.values())):
        yield from dict.fromkeys(tuple(keys) for keys in (own, held) if own)
