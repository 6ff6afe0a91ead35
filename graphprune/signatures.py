"""Arguments of a forward that are no tensors: ``None``, booleans and texts.

Code branches on them (``if mask is None``), so that a forward can only be rewritten for given
values of them. A rewritten forward keeps its signature and refuses other values.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

Given = tuple[tuple[str, Any], ...]  # argument -> value; extra keyword arguments as pairs
_ATOMS = (type(None), bool, str)
_EXTRA = inspect.Parameter.VAR_KEYWORD
_MORE = inspect.Parameter.VAR_POSITIONAL
_ONLY = inspect.Parameter.KEYWORD_ONLY


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature | None:
    try:
        return inspect.signature(kind.forward)
    except (TypeError, ValueError):
        return None


def given(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are no tensors, defaults included."""
    signature = _signature(type(module))
    if signature is None:
        return {}
    try:
        bound = signature.bind(module, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    found = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is _EXTRA and all(isinstance(item, _ATOMS) for item in value.values()):
            found[name] = tuple(value.items())
        elif (kind is _MORE and not value) or isinstance(value, _ATOMS):
            found[name] = value
    return found


def specialised(function: Callable[..., Any], values: Given) -> Callable[..., Any]:
    """A forward without the arguments whose values are given."""
    fixed = dict(values)
    parameters = inspect.signature(function).parameters
    if not set(fixed) & set(parameters):
        return function
    names: dict[str, Any] = {"_function": function}
    heads, inner = [], []
    for name, parameter in parameters.items():
        if name in fixed:
            names[f"_given_{name}"] = fixed[name]
            if parameter.kind is _EXTRA:
                names[f"_given_{name}"] = dict(fixed[name])
                inner.append(f"**_given_{name}")
            elif parameter.kind is not _MORE:
                inner.append(f"{name}=_given_{name}")
            continue
        heads.append(_head(parameter, names))
        plain = parameter.kind in (_MORE, _EXTRA, inspect.Parameter.POSITIONAL_ONLY)
        stars = {_MORE: "*", _EXTRA: "**"}.get(parameter.kind, "")
        inner.append(f"{stars}{name}" if plain else f"{name}={name}")
    exec(
        f"def forward({', '.join(heads)}):\n    return _function({', '.join(inner)})", names
    )  # the arguments of the function itself
    return names["forward"]  # type: ignore[no-any-return]


def entry(function: Callable[..., Any], values: Given, owner: str) -> tuple[str, dict[str, Any]]:
    """Source of a function of the same signature that checks given values and returns the others.

    Returns:
        The source of ``entry``, and the names that it needs.
    """
    fixed = dict(values)
    names: dict[str, Any] = {"_given": fixed, "_owner": owner, "_check": check}
    heads, checks, rest = [], [], []
    starred = False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is _ONLY and not starred:
            heads.append("*")
            starred = True
        starred |= parameter.kind is _MORE
        heads.append(_head(parameter, names))
        if name in fixed:
            extra = parameter.kind is _EXTRA
            value = f"tuple({name}.items())" if extra else name
            checks.append(f"    _check(_owner, {name!r}, {value}, _given[{name!r}])\n")
        else:
            rest.append(f"*{name}" if parameter.kind is _MORE else name)
    result = "".join(f"{name}, " for name in rest)
    return f"def entry({', '.join(heads)}):\n{''.join(checks)}    return ({result})\n", names


def _head(parameter: inspect.Parameter, names: dict[str, Any]) -> str:
    stars = {_MORE: "*", _EXTRA: "**"}.get(parameter.kind, "")
    if parameter.default is inspect.Parameter.empty:
        return f"{stars}{parameter.name}"
    names[f"_default_{parameter.name}"] = parameter.default
    return f"{parameter.name}=_default_{parameter.name}"


def check(owner: str, name: str, found: Any, wanted: Any) -> None:
    """Refuse an argument that a forward was not rewritten for."""
    if found is wanted or (isinstance(found, bool | str | tuple) and found == wanted):
        return
    text = f"{type(found).__name__}" if not isinstance(found, bool | str) else repr(found)
    raise ValueError(
        f"the forward of {owner} was rewritten for {name}={wanted!r}, but got {text}; "
        "rebuild the model with example inputs for which it is called like this"
    )
