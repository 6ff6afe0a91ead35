"""Lists of modules of which entries left: counted anew, as a model made with fewer would be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graphprune.execute.emptied import Emptied
from graphprune.record.copying import copy_module
from graphprune.record.tensors import held_tensors, named_modules, named_tensors

Key = tuple[str, str]  # a module, and what is meant in it


class Shortened(nn.ModuleList):
    """A list without the entries that left: those that stay keep their names.

    Places count what is there, so that code sees a list that was made shorter.

    Example:
        >>> from torch import nn
        >>> from graphprune.execute.numbering import Shortened
        >>> layers = Shortened([nn.Linear(1, 1), nn.Identity(), nn.ReLU()])
        >>> del layers._modules["1"]
        >>> [*layers._modules], type(layers[1]).__name__, len(layers)
        (['0', '2'], 'ReLU', 2)
    """

    def _get_abs_string_index(self, idx: Any) -> str:
        return list(self._modules)[range(len(self._modules))[idx]]

    def append(self, module: nn.Module) -> Shortened:
        """Add a module at the end."""
        self.add_module(str(max((int(key) for key in self._modules), default=-1) + 1), module)
        return self

    def extend(self, modules: Any) -> Shortened:
        """Add modules at the end."""
        for module in modules:
            self.append(module)
        return self

    def insert(self, index: int, module: nn.Module) -> None:
        """Put a module in front of another one; all are then numbered one after the other."""
        modules = list(self._modules.values())
        modules.insert(index, module)
        self._modules = _numbered(modules)


@dataclass
class Entries:
    """A list of modules of which some entries left.

    Attributes:
        name: what the list is called in the model without what left.
        held: its entries, as they are.
        kept: the places of those that stay.
    """

    module: nn.Module
    held: dict[str, Any]
    kept: tuple[int, ...]
    name: str = ""

    def put(self, places: Iterable[int]) -> None:
        """Let the list hold the entries at some places, numbered one after the other."""
        modules = list(self.held.values())
        self.module._modules = _numbered([modules[place] for place in places])


@dataclass
class Numbering:
    """All lists of a model of which entries left, and what its modules are called without these.

    ``apply`` numbers the entries that stay one after the other, ``undo`` puts all back, ``keep``
    leaves the others out and gives those that stay the names that they had.

    Attributes:
        names: the new names of modules, by those that they have.
        counted: the same, by the names that they have where all entries are counted.
        gone: what left, by such names.
    """

    model: nn.Module
    lists: list[Entries] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    counted: dict[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Numbering:
        """The lists of a model whose entries have left, now or in an earlier round."""
        found = cls(model)
        for _, module in named_modules(model):
            held = module._modules
            if not _is_list(module) or not all(map(str.isdigit, held)):
                continue
            kept = tuple(place for place, each in enumerate(held.values()) if not _left(each))
            if kept and (len(kept) < len(held) or list(held) != list(_numbered(held))):
                found.lists.append(Entries(module, held, kept))
        return found

    def apply(self) -> None:
        """Number the entries that stay one after the other, in place, without those that left."""
        now = _names(self.model)
        for each in self.lists:
            each.put(range(len(each.held)))
        counted = _names(self.model)
        lists = {id(each.module): each for each in self.lists}
        self.gone = tuple(
            f"{counted[key]}.{place}".lstrip(".")
            for key, each in lists.items()
            for place in range(len(each.held))
            if place not in each.kept
        )
        for each in self.lists:
            each.put(each.kept)
        new = _names(self.model)
        for key, each in lists.items():
            each.name = new.get(key, "")
        self.names = {now[key]: name for key, name in new.items()}
        self.counted = {counted[key]: name for key, name in new.items()}

    def now(self, items: Mapping[Key, Any]) -> dict[Key, Any]:
        """What is known by names of modules and of something in each, by the new names."""
        return {(self.names[o], key): v for (o, key), v in items.items() if o in self.names}

    def renamed(self, items: Mapping[Key, Any]) -> dict[Key, Any]:
        """The same, of a model where all entries are counted."""
        return {(self.counted[o], key): v for (o, key), v in items.items() if o in self.counted}

    def new_name(self, name: str) -> str:
        """The new name of a module that only a model where all entries are counted has."""
        return _renamed(name, self.counted)

    def undo(self) -> None:
        """Put back what left."""
        for each in self.lists:
            each.module._modules = each.held

    def keep(self) -> None:
        """Leave out what left; names are those that modules had."""
        for each in self.lists:
            items = list(each.held.items())
            each.module._modules = dict(items[place] for place in each.kept)
            if type(each.module) is nn.ModuleList:
                each.module.__class__ = Shortened


class Counted:
    """Takes the place of ``save_pretrained`` where lists are shorter than their names say.

    What is written has the names of a model that was made with as many entries.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save a copy, of the same tensors, whose entries are numbered one after the other."""
        twin = copy_module(
            self.module, {id(tensor): tensor for _, tensor in held_tensors(self.module)}
        )
        numbering = Numbering.of(twin)
        numbering.apply()
        for _, module in named_modules(twin):
            if isinstance(vars(module).get("save_pretrained"), Counted):
                del vars(module)["save_pretrained"]
            if isinstance(module, Shortened):
                object.__setattr__(module, "__class__", nn.ModuleList)
        if options.get("state_dict") is not None:
            named = options["state_dict"].items()
            options["state_dict"] = {_renamed(name, numbering.names): t for name, t in named}
        save: Any = twin.save_pretrained
        return save(*args, **options)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The new name of a tensor."""
    owner, _, leaf = name.rpartition(".")
    return ".".join(filter(None, (names.get(owner, owner), leaf)))


def _is_list(module: nn.Module) -> bool:
    """Whether code counts the children of a module, and does not name them."""
    return type(module) in (nn.ModuleList, Shortened) or isinstance(module, nn.Sequential)


def _numbered(modules: Iterable[Any]) -> dict[str, Any]:
    return {str(place): module for place, module in enumerate(modules)}


def _left(entry: nn.Module | None) -> bool:
    """Whether an entry left, as a whole or with all that it held."""
    parts = [] if entry is None else [part for _, part in named_modules(entry)]
    emptied = any(isinstance(part, Emptied) for part in parts)
    return emptied and entry is not None and not any(True for _ in named_tensors(entry))


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in named_modules(model)}
