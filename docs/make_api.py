"""Write docs/api.md from the docstrings of the package: ``python docs/make_api.py``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import graphprune
from graphprune import criteria, deploy, errors, testing, training
from graphprune.channels import analysis
from graphprune.measurement import Comparison
from graphprune.ops import Op, check, declare, forget
from graphprune.ops.samples import of
from graphprune.planning.sensitivity import Sensitivity
from graphprune.record.attention import MultiheadAttention
from graphprune.training import callbacks
from graphprune.training.search.outcome import Smallest, Tried
from graphprune.verification.report import Report

TARGET = Path(__file__).with_name("api.md")
LISTS = ("Args", "Raises", "Warns", "Attributes")
TEXTS = ("Returns", "Example")
HEADING = re.compile(rf"^({'|'.join((*LISTS, *TEXTS))}):$", re.MULTILINE)
INTRODUCTION = """\
# API

Written from the docstrings by `python docs/make_api.py`. Examples are run by the tests.
"""


class _Source:
    """Prints an annotation or a default as it stands in the code."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def reference() -> str:
    """The whole page."""
    tree = [thing for thing in vars(errors).values() if inspect.isclass(thing)]
    parts = [INTRODUCTION]
    for title, package, things in chapters():
        parts += chapter(title, package, things)
    return "\n".join([*parts, *errors_chapter(tree)]).rstrip() + "\n"


def chapters() -> list[tuple[str, str, list[Any]]]:
    """What is told of, apart from the errors: title, package that it is imported from, things."""
    public = [getattr(graphprune, name) for name in graphprune.__all__]
    functions = [thing for thing in public if inspect.isfunction(thing)]
    classes = [thing for thing in public if inspect.isclass(thing)]
    return [
        ("Functions", "graphprune", functions),
        ("Classes", "graphprune", [*classes, Report, Comparison, Sensitivity, Smallest, Tried]),
        (
            "Criteria",
            "graphprune.criteria",
            [
                *scorers(),
                criteria.register_criterion,
                criteria.register_statistic,
                criteria.gather,
                criteria.scores,
                *(criteria.Collector, criteria.Evidence, criteria.Unseen),
                *(analysis.Group, analysis.Member, analysis.Slot),
            ],
        ),
        ("Training", "graphprune.training", [getattr(training, n) for n in training.__all__]),
        (
            "Callbacks",
            "graphprune.training.callbacks",
            [getattr(callbacks, name) for name in callbacks.__all__],
        ),
        ("Deploy", "graphprune.deploy", [getattr(deploy, n) for n in deploy.__all__]),
        ("Testing", "graphprune.testing", [testing.check, testing.plans, testing.CheckReport]),
        ("Layers", "graphprune.record.attention", [MultiheadAttention]),
        ("Ops", "graphprune.ops", [declare, check, forget, Op, of]),
    ]


def scorers() -> Iterator[Any]:
    """The classes of the registered criteria, and functions, each once."""
    found = (criteria.find(name).function for name in criteria.criteria())
    yield from dict.fromkeys(f if inspect.isfunction(f) else type(f) for f in found)


def chapter(title: str, package: str, things: list[Any]) -> Iterator[str]:
    """A heading and the entries below it, by the name they are imported as."""
    yield f"## {title}\n"
    for thing in things:
        module = package if hasattr(importlib.import_module(package), thing.__name__) else ""
        yield from entry(thing, f"{module or thing.__module__}.{thing.__name__}")


def entry(thing: Any, name: str) -> Iterator[str]:
    """A function, or a class with its public members."""
    yield f"### `{name}`\n"
    if inspect.isfunction(thing):
        yield f"```py\n{signature(thing)}\n```\n"
    yield markdown(inspect.getdoc(thing) or "")
    if not inspect.isclass(thing):
        return
    yield from fields(thing)
    for member, value in vars(thing).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if member.startswith("_"):
            continue
        if inspect.isfunction(function):
            yield f"#### `{thing.__name__}.{member}`\n"
            yield f"```py\n{signature(function)}\n```\n"
            yield markdown(inspect.getdoc(function) or "")
    public = [(n, v) for n, v in vars(thing).items() if not n.startswith("_")]
    properties = [(n, v) for n, v in public if isinstance(v, property)]
    if properties:
        yield "Properties:\n"
        yield "".join(f"- `{n}`: {inline(inspect.getdoc(v) or '')}\n" for n, v in properties)


def fields(thing: type) -> Iterator[str]:
    """The fields of a dataclass whose docstring does not list them."""
    if not dataclasses.is_dataclass(thing) or "Attributes:" in (thing.__doc__ or ""):
        return
    if dataclasses.fields(thing):
        yield "Fields:\n"
        yield "".join(f"- `{field.name}: {field.type}`\n" for field in dataclasses.fields(thing))


def signature(function: Any) -> str:
    """The signature as it stands in the code, a long one with one argument per line."""
    found = inspect.signature(function)
    arguments = [
        parameter.replace(
            annotation=_Source(str(parameter.annotation))
            if parameter.annotation is not parameter.empty
            else parameter.empty
        )
        for parameter in found.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    result = f" -> {found.return_annotation}"
    line = f"{function.__name__}{found.replace(parameters=arguments, return_annotation='')}"
    line = re.sub(r" -> ''$", "", line) + result
    if len(line) <= 88:
        return line
    parts: list[str] = []
    for argument in arguments:
        if argument.kind is argument.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(str(argument))
    body = "".join(f"    {part},\n" for part in parts)
    return f"{function.__name__}(\n{body}){result}"


def markdown(text: str) -> str:
    """A Google-style docstring as Markdown."""
    head, *rest = HEADING.split(text)
    parts = [paragraphs(head)]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        body = textwrap.dedent(body.strip("\n"))
        if title == "Example":
            parts.append(f"```pycon\n{body.rstrip()}\n```\n")
        elif title in LISTS:
            parts.append(f"{title}:\n\n{items(body)}")
        else:
            parts.append(f"{title}: {paragraphs(body)}")
    return "\n".join(parts)


def paragraphs(text: str) -> str:
    """Paragraphs of one line each."""
    return "\n\n".join(inline(part) for part in text.strip().split("\n\n")) + "\n"


def items(body: str) -> str:
    """``name: text`` items, each with its continuation lines."""
    lines: list[str] = []
    for line in body.splitlines():
        if line and not line.startswith(" "):
            lines.append(line)
        elif line.strip():
            lines[-1] += " " + line.strip()
    pairs = (line.partition(":") for line in lines)
    return "".join(f"- `{name}`: {inline(text)}\n" for name, _, text in pairs)


def inline(text: str) -> str:
    """One line, with the roles and literals of reStructuredText as Markdown code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`")


def errors_chapter(tree: list[type]) -> Iterator[str]:
    """All exceptions in one table."""
    yield "## Errors\n"
    yield "In `graphprune.errors`. All but the warning derive from `GraphPruneError`.\n"
    yield "| error | also a | raised when |\n|---|---|---|"
    for error in tree:
        kinds = ", ".join(f"`{base.__name__}`" for base in error.__bases__ if base not in tree)
        yield f"| `{error.__name__}` | {kinds} | {inline(inspect.getdoc(error) or '')} |"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
