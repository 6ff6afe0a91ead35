"""What a plan is asked for: every option of ``graph.plan`` and ``rebuild``, in one record."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum, auto
from numbers import Real
from typing import Any, Protocol, TypedDict

import numpy as np
from torch import nn

from graphprune.arguments import check_seed, is_int, is_number
from graphprune.criteria import find, name_of
from graphprune.errors import InputError
from graphprune.planning.hints import HINTS
from graphprune.planning.kinds import check_parts, parts_of
from graphprune.planning.targets import Target, targets_of
from graphprune.ranks import Ranks
from graphprune.record.batches import check_loss

COLUMNS = ("aligned", "free")
SCOPES = ("local", "global", "isomorphic")
EXPRESSIBLE = (None, "config")


class Allocation(Protocol):
    """What may stand for ``ratios``: how early every channel of a group leaves."""

    def levels(self, slots: Iterable[tuple[str, int]], size: int) -> np.ndarray | None:
        """Increasing levels at which a group of these slots loses its channels, one by one."""

    def parts(self) -> Mapping[str, float]:
        """What is lost without parts, by their names."""


class Options(TypedDict, total=False):
    """The options of ``graph.plan`` and ``rebuild``."""

    # Types for checkers; what the options mean, and their defaults, is said once in Request.
    criterion: Any
    scope: str
    keep: str | nn.Module | Iterable[str | nn.Module]
    ratios: Mapping[str, float] | Mapping[nn.Module, float] | Allocation
    target: Mapping[str, float | str]
    min_kept: float | Mapping[str, float]
    max_kept: float | Mapping[str, float]
    round_to: int | None
    uniform: bool
    aggregate: str | None
    normalise: str | None
    data: Any
    loss: Callable[..., Any] | None
    seed: int
    exact_only: bool
    columns: str
    expressible: str | None
    parts: str | Iterable[str]
    threads: int | None
    progress: bool
    process_group: Any


class Told(Enum):
    """Whether a plan says of an option how it was set."""

    ALWAYS = auto()
    CHANGED = auto()  # when it is not the default
    NEVER = auto()


def option(doc: str, short: str = "", told: Told = Told.CHANGED) -> dict[str, object]:
    """What is said of an option.

    Args:
        doc: what it means.
        short: the same in a line, for the command line.
        told: whether plans say how it was set.
    """
    return {"doc": doc, "short": short, "told": told}


@dataclass(frozen=True)
class Request:
    """Checked options: their defaults, what they mean and how they are told are said here."""

    ratio: float | None = None
    allocation: Allocation | None = None
    standing_in: str = ""  # what the plan says of the criterion, where another one was asked for
    criterion: Any = field(
        default="l2",
        metadata=option(
            'how channels are scored: the name of a registered criterion (``"l2"``, see '
            '``graphprune.criteria``) or a callable. ``"auto"``: for a repair, by ``data`` without '
            "labels.",
            short="How channels are scored, from weights alone: l1, l2, lamp, ...",
            told=Told.NEVER,
        ),
    )
    scope: str | None = field(
        default=None,
        metadata=option(
            'among which channels scores are compared. ``"local"``: within each group, every group '
            'loses the same fraction. ``"global"``: all channels. ``"isomorphic"``: groups of the '
            'same structure, every structure loses the same fraction (Fang et al., "Isomorphic '
            'Pruning for Vision Models", ECCV 2024). With a target of latency and no scope, groups '
            "lose channels first where that saves most time for the MACs it costs.",
            short="local: of every group; global: over all; isomorphic: of a kind.",
            told=Told.ALWAYS,
        ),
    )
    keep: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "glob patterns of layers, or modules, whose output channels all stay.",
            short="Layers that keep all channels (glob).",
        ),
    )
    ratios: Mapping[str, float] = field(
        default_factory=dict,
        metadata=option(
            'fractions to remove by glob pattern of layers (``{"layer3.*": 0.6}``), module or '
            "name of a group; the last pattern that fits counts. Such groups do not take part in a "
            "search for a target. Or the result of ``graph.sensitivity``, by which the channels "
            "leave first from where that costs least. 1 lets the part around a layer leave, with "
            "such ``parts``.",
            short="Of some layers: 'layer3.*=0.6'.",
        ),
    )
    target: Mapping[str, Target] = field(
        default_factory=dict,
        metadata=option(
            'what the small model may cost at most, any of ``"macs"``, ``"params"``, ``"bytes"`` '
            '(of parameters and buffers), ``"memory"`` (peak bytes of activations) and '
            '``"latency"`` (milliseconds, on the device of the model). A number up to 1 is a '
            'fraction of the original\'s, a larger one absolute; texts such as ``"1.2G"``, ``"40 '
            'MB"``, ``"50%"`` or ``"0.8 ms"`` are understood.',
            short="What it may cost: macs=0.5, params=2M, bytes, memory, latency=8ms.",
            told=Told.NEVER,
        ),
    )
    min_kept: Mapping[str, float] = field(
        default_factory=dict,
        metadata=option(
            "the smallest fraction of channels that every group keeps, or fractions by glob. The "
            "last one leaves only with a part around it, and not where this is above zero.",
            short="Smallest fraction a group keeps.",
        ),
    )
    max_kept: Mapping[str, float] = field(
        default_factory=dict,
        metadata=option(
            "the largest fraction of channels that a group keeps, or fractions by glob.",
            short="Largest fraction a group keeps.",
        ),
    )
    round_to: int | None = field(
        default=None,
        metadata=option(
            "widths of layers, and widths inside heads and groups of convolutions, become "
            "multiples of this; groups that have no such width stay whole. By default 1; with a "
            "target of latency 8 (what kernels do at once), and 4 or 2 in narrow groups.",
            short="Widths become multiples of this; for a latency 8 by default.",
        ),
    )
    uniform: bool = field(
        default=False,
        metadata=option(
            "groups of the same structure and size keep equally many channels.",
            short="Repeated blocks keep equal widths.",
        ),
    )
    aggregate: str | None = field(
        default=None,
        metadata=option(
            'how scores of the slots of a group become one: ``"sum"``, ``"mean"``, ``"max"``, '
            '``"product"``, ``"norm"`` or ``"root"``; by default as the criterion says.',
        ),
    )
    normalise: str | None = field(
        default=None,
        metadata=option(
            'how scores of a group are made comparable with those of others: ``"none"``, '
            '``"mean"``, ``"max"``, ``"standard"`` or ``"macs"``; by default ``"mean"``, and '
            '``"none"`` for criteria whose scores are on one scale.',
        ),
    )
    data: Any = field(
        default=None,
        metadata=option(
            "batches for criteria that need gradients or activations.",
            told=Told.NEVER,
        ),
    )
    loss: Callable[..., Any] | None = field(
        default=None,
        metadata=option(
            "``loss(model, batch)`` for criteria that need gradients.",
            told=Told.NEVER,
        ),
    )
    seed: int = field(
        default=0,
        metadata=option(
            "for criteria that draw random numbers.",
            short="For random weights and random criteria.",
            told=Told.ALWAYS,
        ),
    )
    exact_only: bool = field(
        default=False,
        metadata=option(
            "take statistics as the model with zeroed channels does: LayerNorm, GroupNorm, softmax "
            "and mean go on counting what left as zeroes, weight and eps of RMSNorm are rescaled, "
            "and groups under other statistics over channels stay whole.",
            told=Told.ALWAYS,
        ),
    )
    columns: str = field(
        default="aligned",
        metadata=option(
            "where groups of a convolution, parts of a split or heads must keep equally many "
            'channels: ``"aligned"`` removes the same ones from all of them, ``"free"`` chooses in '
            "each, where nothing else ties them, and checks the result on the example inputs.",
            told=Told.ALWAYS,
        ),
    )
    expressible: str | None = field(
        default=None,
        metadata=option(
            '``"config"``: only widths that the config of the model says, so that '
            "``save_pretrained`` writes a folder that plain ``from_pretrained`` reads. Groups that "
            "one field sizes keep equal shares, of sizes that the class accepts; what no field "
            "says stays whole. The small model is compared with one built from its config.",
            short="'config': only widths that the model's config can say.",
        ),
    )
    parts: tuple[str, ...] = field(
        default=("channels",),
        metadata=option(
            'what may leave, any of ``"channels"``, ``"branches"`` (what is added to a stream), '
            '``"blocks"`` (modules that then hand on what they are given) and ``"experts"`` (of '
            "mixtures). A ratio is the fraction of each, and of the experts of every mixture; a "
            "target is met by all together, with the smallest change of the outputs on ``data``, "
            "or else on the example inputs. Parts leave in the order of their influence (Men et "
            'al., "ShortGPT", 2024), experts of what they add where they are chosen (Lasby et al., '
            '"REAP the Experts", 2025), or of the criteria ``"taylor"``, ``"reconstruction"``, '
            '``"random"``; experts of ``"geometric_median"`` by their likeness as well.',
            short="What may leave: channels, branches, blocks, experts.",
        ),
    )
    threads: int | None = field(
        default=None,
        metadata=option(
            "CPU threads when a latency is measured; torch's current setting by default.",
            short="CPU threads for latencies.",
        ),
    )
    progress: bool = field(
        default=False,
        metadata=option(
            "show a progress bar while data is gone through.",
            told=Told.NEVER,
        ),
    )
    process_group: Any = field(
        default=None,
        metadata=option(
            "of ``torch.distributed``: where ``data`` is given, every rank passes its own batches, "
            "and all get the same plan; the default group when it is initialised. ``False``: this "
            "process plans on its own.",
            told=Told.NEVER,
        ),
    )

    @classmethod
    def of(cls, ratio: float | None, options: Mapping[str, Any]) -> Request:
        """Check a ratio and options.

        Raises:
            InputError: an unknown option or a wrong value; names what is valid.
        """
        given = dict(options)
        _check_names(given)
        for name in ("min_kept", "max_kept"):
            if name in given:
                given[name] = _fractions(name, given[name])
        if "keep" in given:
            given["keep"] = _patterns(given["keep"])
        if "parts" in given:
            given["parts"] = parts_of(given["parts"])
        if hasattr(given.get("ratios"), "levels"):
            given["allocation"] = given.pop("ratios")
        elif "ratios" in given:
            given["ratios"] = _ratios(given["ratios"])
        if "target" in given:
            given["target"] = targets_of(given["target"])
        request = cls(None if ratio is None else check_ratio(ratio), **given)
        request._check_values()
        request._check_amount()
        request._check_ratios()
        check_parts(request, cls())
        return request._advised()

    def _advised(self) -> Request:
        """With what the criterion says of itself where the user does not."""
        entry = find(self.criterion)
        if self.data is None and entry.without_data is not None:
            named = f"{entry.name}: {entry.without_data}, for want of data"
            return replace(self, criterion=entry.without_data, standing_in=named)
        own = None if "latency" in self.target or self.allocation else entry.scope
        normalise = self.normalise or entry.normalise
        found = replace(self, scope=self.scope or own, normalise=normalise)
        if entry.variants is not None and self.parts != ("channels",):  # many plans are made then
            return replace(found, criterion="reconstruction", standing_in=entry.name)
        return found

    @property
    def named(self) -> str:
        """The criterion, for plans."""
        return self.standing_in or name_of(self.criterion)

    @property
    def told(self) -> dict[str, Any]:
        """All that is said of it: what several processes must have alike."""
        return {**self.said(), "criterion": self.named}

    @property
    def vector(self) -> int:
        """Of what widths become multiples where they can and nothing was named."""
        return 8 if "latency" in self.target else 1  # channels that kernels work on at once

    @property
    def ranks(self) -> Ranks:
        """The processes that plan together."""
        return ranks_of({"data": self.data, "process_group": self.process_group})

    def _check_values(self) -> None:
        if self.scope is not None and self.scope not in SCOPES:
            raise InputError(f"unknown scope {self.scope!r}; choose one of {', '.join(SCOPES)}")
        if self.columns not in COLUMNS:
            raise InputError(f"columns must be one of {', '.join(COLUMNS)}, not {self.columns!r}")
        if self.expressible not in EXPRESSIBLE:
            raise InputError(f"expressible must be 'config' or None, not {self.expressible!r}")
        if self.round_to is not None and not is_int(self.round_to, 1):
            raise InputError(f"round_to must be a positive int such as 8, not {self.round_to!r}")
        check_seed(self.seed)
        for name in ("uniform", "exact_only", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        check_loss(self.loss)
        Ranks(self.process_group)
        if self.threads is not None and not is_int(self.threads, 1):
            raise InputError(f"threads must be a positive int, got {self.threads!r}")

    def _check_amount(self) -> None:
        """Raise unless exactly one thing says how much to remove."""
        if self.ratio is not None and self.target:
            raise InputError(
                f"both a ratio ({self.ratio}) and a target ({', '.join(self.target)}) were given: "
                "a target finds the ratio itself, leave the ratio out"
            )
        if self.allocation is not None and not self.target and self.ratio is None:
            raise InputError(
                "a sensitivity as ratios says where channels leave first, not how many: pass a "
                "target or a ratio too, or ratios=sensitivity.allocation(max_drop)"
            )
        some = self.target or self.ratios or self.max_kept
        if self.ratio is None and not some:
            raise InputError(
                "nothing says how much to remove: ratio must be a number in [0, 1), or pass "
                'target={"macs": 0.5}, ratios or max_kept instead'
            )

    def _check_ratios(self) -> None:
        """Raise where all channels are to leave without the part around them."""
        if not {"branches", "blocks"} & {*self.parts}:
            for pattern in (pattern for pattern, ratio in self.ratios.items() if ratio == 1):
                raise InputError(
                    f"ratios[{pattern!r}] must be in [0, 1), the fraction to remove: got 1; all "
                    'channels of a layer leave with the branch around it, with parts=("channels", '
                    '"branches")'
                )

    def said(self) -> dict[str, Any]:
        """What a plan says of how it was made, as plain data."""
        told: dict[str, Any] = {"ratio": self.ratio}
        for item in OPTIONS.values():
            value, how = getattr(self, item.name), item.metadata["told"]
            changed = value != getattr(_DEFAULT, item.name) and how is Told.CHANGED
            if changed or how is Told.ALWAYS:
                told[item.name] = list(value) if isinstance(value, tuple) else value
        told["scope"] = self.scope or "local"
        if self.allocation is not None:
            told["ratios"] = type(self.allocation).__name__
        if self.target:
            told["target"] = {name: target.amount for name, target in self.target.items()}
        return told


_DEFAULT = Request()
OPTIONS = {item.name: item for item in fields(Request) if item.metadata}
_NAMES = tuple(OPTIONS)


def ranks_of(options: Mapping[str, Any]) -> Ranks:
    """The processes that plan together: those that are given data, as weights are the same."""
    return Ranks(False if options.get("data") is None else options.get("process_group"))


def short(name: str) -> str:
    """What an option means, in a line."""
    text: str = OPTIONS[name].metadata["short"]
    return text


def _described() -> str:
    """What the options mean, as the docstring of ``Options``."""
    lines = [Options.__doc__ or "", "", "    Attributes:"]
    for name, item in OPTIONS.items():
        text = f"{name}: {item.metadata['doc']}"
        lines += textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
    return "\n".join(lines) + _EXAMPLE


_EXAMPLE = """

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 2))
        >>> options: graphprune.Options = {"target": {"params": 0.6}, "round_to": 8}
        >>> graphprune.rebuild(net, **options)[0].out_features
        32
    """
Options.__doc__ = _described()


def check_ratio(ratio: object, name: str = "ratio", other: str = " or a Plan") -> float:
    """A ratio in [0, 1) as a float.

    Raises:
        InputError: not a number, or outside the range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        found = repr(ratio) if isinstance(ratio, str | bool | None) else type(ratio).__name__
        raise InputError(f"{name} must be a number in [0, 1){other}, not {found}")
    number = float(ratio)
    if not 0 <= number < 1:
        raise InputError(f"{name} must be in [0, 1), the fraction to remove: got {ratio}")
    return number


def _check_names(options: Mapping[str, object]) -> None:
    for name in options:
        if name in HINTS:
            raise InputError(f"unknown option {name!r}: {HINTS[name]}")
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"unknown option {name!r}{hint} Options: {', '.join(_NAMES)}")


def _patterns(given: Any) -> tuple[str, ...]:
    several = isinstance(given, Iterable) and not isinstance(given, str)
    patterns = tuple(given) if several else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            'keep must be a glob pattern of layers such as "layer1.*", a module, or several; got '
            f"{given!r}"
        )
    return patterns


def _ratios(given: object) -> dict[str, float]:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(
            'ratios must map glob patterns of layers to fractions, such as {"layer3.*": 0.6}, '
            f"or be a sensitivity; not {given!r}"
        )
    return {
        pattern: 1.0 if is_number(ratio, 1, 1) else check_ratio(ratio, f"ratios[{pattern!r}]", "")
        for pattern, ratio in given.items()
    }


def _fractions(name: str, given: Any) -> dict[str, float]:
    by_glob = given if isinstance(given, Mapping) else {"*": given}
    for pattern, value in by_glob.items():
        if not isinstance(pattern, str) or not is_number(value, 0, 1):
            raise InputError(
                f"{name} must be a fraction of the channels in [0, 1], or such fractions by glob "
                f"pattern of layers; got {value!r} for {pattern!r}"
            )
    return {pattern: float(value) for pattern, value in by_glob.items()}


assert tuple(Options.__annotations__) == _NAMES
