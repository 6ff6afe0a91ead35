"""What a plan is asked for: every option of ``graph.plan`` and ``rebuild``, in one record."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Protocol, TypedDict

import numpy as np

from graphprune.errors import InputError
from graphprune.record.batches import check_loss

COLUMNS = ("aligned", "free")
SCOPES = ("local", "global", "isomorphic")
QUANTITIES = ("macs", "params", "bytes", "memory", "latency")
_UNITS = {"": 1.0, "%": 0.01, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12,
          "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "us": 1e-3, "ms": 1.0, "s": 1e3}  # fmt: skip
_AMOUNT = r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)"
_SECONDS = ("us", "ms", "s")


class Allocation(Protocol):
    """What may stand for ``ratios``: how early every channel of a group leaves."""

    def levels(self, slots: Iterable[tuple[str, int]], size: int) -> np.ndarray | None:
        """Increasing levels at which a group of these slots loses its channels, one by one."""


class Options(TypedDict, total=False):
    """The options of ``graph.plan`` and ``rebuild``.

    Attributes:
        criterion: how channels are scored: the name of a registered criterion (``"l2"``, see
            ``graphprune.criteria``) or a callable.
        scope: among which channels scores are compared. ``"local"``: within each group, every
            group loses the same fraction. ``"global"``: all channels. ``"isomorphic"``: groups of
            the same structure, every structure loses the same fraction (Fang et al., "Isomorphic
            Pruning for Vision Models", ECCV 2024). With a target of latency and no scope, groups
            lose channels first where that saves most time for the MACs it costs.
        keep: glob patterns of layers whose output channels all stay.
        ratios: fractions to remove by glob pattern of layers (``{"layer3.*": 0.6}``) or name of
            a group; the last pattern that fits counts. Such groups do not take part in a search
            for a target. Or the result of ``graph.sensitivity``, by which the channels leave
            first from where that costs least.
        target: what the small model may cost at most, any of ``"macs"``, ``"params"``,
            ``"bytes"`` (of parameters and buffers), ``"memory"`` (peak bytes of activations) and
            ``"latency"`` (milliseconds, on the device of the model). A number up to 1 is a
            fraction of the original's, a larger one absolute; texts such as ``"1.2G"``,
            ``"40 MB"``, ``"50%"`` or ``"0.8 ms"`` are understood.
        min_kept: the smallest fraction of channels that every group keeps, or fractions by glob.
            No group ever loses its last channel.
        max_kept: the largest fraction of channels that a group keeps, or fractions by glob.
        round_to: widths of layers, and widths inside heads and groups of convolutions, become
            multiples of this; groups that have no such width stay whole.
        uniform: groups of the same structure and size keep equally many channels.
        aggregate: how scores of the slots of a group become one: ``"sum"``, ``"mean"``,
            ``"max"``, ``"product"``, ``"norm"`` or ``"root"``; by default as the criterion says.
        normalise: how scores of a group are made comparable with those of others: ``"none"``,
            ``"mean"``, ``"max"``, ``"standard"`` or ``"macs"``; by default ``"mean"``, and
            ``"none"`` for criteria whose scores are on one scale.
        data: batches for criteria that need gradients or activations.
        loss: ``loss(model, batch)`` for criteria that need gradients.
        seed: for criteria that draw random numbers.
        exact_only: take statistics as the masked model does: weight and eps of RMSNorm are
            rescaled, groups under other norms over channels stay whole.
        columns: where groups of a convolution, parts of a split or heads must keep equally many
            channels: ``"aligned"`` removes the same ones from all of them, ``"free"`` chooses in
            each, where nothing else ties them, and checks the result on the example inputs.
        threads: CPU threads when a latency is measured; torch's current setting by default.
        progress: show a progress bar while data is gone through.

    Example:
        >>> import torch, graphprune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 2))
        >>> options: graphprune.Options = {"target": {"params": 0.6}, "round_to": 8}
        >>> graphprune.rebuild(net, **options)[0].out_features
        32
    """

    criterion: Any
    scope: str
    keep: str | Iterable[str]
    ratios: Mapping[str, float] | Allocation
    target: Mapping[str, float | str]
    min_kept: float | Mapping[str, float]
    max_kept: float | Mapping[str, float]
    round_to: int
    uniform: bool
    aggregate: str | None
    normalise: str | None
    data: Any
    loss: Callable[..., Any] | None
    seed: int
    exact_only: bool
    columns: str
    threads: int | None
    progress: bool


@dataclass(frozen=True)
class Target:
    """A limit: ``fraction`` of the original's, or an absolute ``amount``."""

    amount: float
    fraction: bool

    def of(self, before: float) -> float:
        """The limit as an amount."""
        return self.amount * before if self.fraction else self.amount


@dataclass(frozen=True)
class Request:
    """Checked options; the defaults of all of them are here."""

    ratio: float | None = None
    criterion: Any = "l2"
    scope: str | None = None
    keep: tuple[str, ...] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    allocation: Allocation | None = None
    target: Mapping[str, Target] = field(default_factory=dict)
    min_kept: Mapping[str, float] = field(default_factory=dict)
    max_kept: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 1
    uniform: bool = False
    aggregate: str | None = None
    normalise: str | None = None
    data: Any = None
    loss: Callable[..., Any] | None = None
    seed: int = 0
    exact_only: bool = False
    columns: str = "aligned"
    threads: int | None = None
    progress: bool = False

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
        if hasattr(given.get("ratios"), "levels"):
            given["allocation"] = given.pop("ratios")
        elif "ratios" in given:
            given["ratios"] = _ratios(given["ratios"])
        if "target" in given:
            given["target"] = _targets(given["target"])
        request = cls(None if ratio is None else check_ratio(ratio), **given)
        request._check_values()
        request._check_amount()
        return request

    def _check_values(self) -> None:
        if self.scope is not None and self.scope not in SCOPES:
            raise InputError(f"unknown scope {self.scope!r}; choose one of {', '.join(SCOPES)}")
        if self.columns not in COLUMNS:
            raise InputError(f"columns must be one of {', '.join(COLUMNS)}, not {self.columns!r}")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int):
            raise InputError(f"round_to must be a positive int such as 8, not {self.round_to!r}")
        if self.round_to < 1:
            raise InputError(f"round_to must be a positive int such as 8, got {self.round_to}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"seed must be an int, not {self.seed!r}")
        for name in ("uniform", "exact_only", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        check_loss(self.loss)
        if self.threads is not None and (not isinstance(self.threads, int) or self.threads < 1):
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

    def said(self) -> dict[str, Any]:
        """What a plan says of how it was made, as plain data."""
        told: dict[str, Any] = {
            "ratio": self.ratio,
            "scope": self.scope or "local",
            "seed": self.seed,
            "exact_only": self.exact_only,
            "columns": self.columns,
        }
        for name in ("keep", "ratios", "min_kept", "max_kept", "round_to", "uniform", "aggregate",
                     "normalise", "threads"):  # fmt: skip
            value = getattr(self, name)
            if value != getattr(_DEFAULT, name):
                told[name] = list(value) if isinstance(value, tuple) else value
        if self.allocation is not None:
            told["ratios"] = type(self.allocation).__name__
        if self.target:
            told["target"] = {name: target.amount for name, target in self.target.items()}
        return told


_DEFAULT = Request()
_NAMES = tuple(Options.__annotations__)


def check_ratio(ratio: Any, name: str = "ratio", other: str = " or a Plan") -> float:
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


_AMOUNT_HINT = "pass the ratio by place, rebuild(model, 0.5) or graph.plan(0.5)"
_KEEP_HINT = (
    'keep takes glob patterns of layers whose channels stay, such as keep=["head", "stem.*"]'
)
_HINTS = {  # what other libraries call it, and our command line
    **dict.fromkeys(("ratio", "amount", "sparsity", "pruning_ratio", "prune_ratio"), _AMOUNT_HINT),
    **dict.fromkeys(("ignored_layers", "ignore", "exclude", "skip", "excluded"), _KEEP_HINT),
    **dict.fromkeys(("importance", "metric", "method"), "criterion says how channels are scored"),
    "global_pruning": 'scope="global" compares scores of all channels',
    "isomorphic": 'scope="isomorphic" compares scores of alike groups',
    "pruning_ratio_dict": 'ratios takes fractions by layer, such as {"layer3.*": 0.6}',
    "max_pruning_ratio": "min_kept is the smallest fraction that every group keeps",
    "flops": 'pass target={"macs": 0.5}',
}


def _check_names(options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _HINTS:
            raise InputError(f"unknown option {name!r}: {_HINTS[name]}")
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"unknown option {name!r}{hint} Options: {', '.join(_NAMES)}")


def _patterns(given: Any) -> tuple[str, ...]:
    several = isinstance(given, Iterable) and not isinstance(given, str)
    patterns = tuple(given) if several else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(
            f'keep must be a glob pattern of layers such as "layer1.*", or several; got {given!r}'
        )
    return patterns


def _ratios(given: Any) -> dict[str, float]:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise InputError(
            'ratios must map glob patterns of layers to fractions, such as {"layer3.*": 0.6}, '
            f"or be a sensitivity; not {given!r}"
        )
    return {
        pattern: check_ratio(ratio, f"ratios[{pattern!r}]", "") for pattern, ratio in given.items()
    }


def _fractions(name: str, given: Any) -> dict[str, float]:
    by_glob = given if isinstance(given, Mapping) else {"*": given}
    for pattern, value in by_glob.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not isinstance(pattern, str) or not number or not 0 <= value <= 1:
            raise InputError(
                f"{name} must be a fraction of the channels in [0, 1], or such fractions by glob "
                f"pattern of layers; got {value!r} for {pattern!r}"
            )
    return {pattern: float(value) for pattern, value in by_glob.items()}


def _targets(given: Any) -> dict[str, Target]:
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            'target must map quantities to limits, such as {"macs": 0.5}; '
            f"quantities: {', '.join(QUANTITIES)}; got {given!r}"
        )
    for name in given:
        if name not in QUANTITIES:
            raise InputError(f"unknown target {name!r}; choose of {', '.join(QUANTITIES)}")
    return {name: _target(name, value) for name, value in given.items()}


def _target(name: str, value: Any) -> Target:
    """A limit from a number or a text."""
    problem = InputError(
        f"target {name!r} must be a fraction in (0, 1], an amount above 1, or a text such as "
        f'"50%" or "{"0.8 ms" if name == "latency" else "1.2G"}"; got {value!r}'
    )
    if isinstance(value, str):
        found = re.fullmatch(_AMOUNT, value.lower().strip())
        unit = found[2] if found else "?"
        if found is None or unit not in _UNITS:
            raise problem
        if (unit in _SECONDS) != (name == "latency") and unit not in ("", "%"):
            raise problem
        if name == "latency" and unit in _SECONDS and float(found[1]) > 0:
            return Target(float(found[1]) * _UNITS[unit], False)
        amount = float(found[1]) * _UNITS[unit]
        if unit == "%" and not 0 < amount <= 1:
            raise problem
        value = amount
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise problem
    if value <= 0:
        raise problem
    return Target(float(value), value <= 1)


assert {f.name for f in fields(Request)} == {"ratio", "allocation", *_NAMES}
