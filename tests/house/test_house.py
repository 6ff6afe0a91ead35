"""The house: who may import whom, what is public, how large files are, what is registered."""

import ast
import importlib
import importlib.util
import inspect
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.sources import nodes

import graphprune
from graphprune import errors
from graphprune.criteria import criteria, register_criterion
from graphprune.moved import MOVED
from graphprune.ops import declare, free
from graphprune.ops.registry import REGISTRY

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "graphprune"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package or file at the top imports from the floors below its own, never from its own floor or
# above it. Files of one package share a room, in which they may see each other.
FLOORS = (
    {"errors", "moved", "version"},
    {"arguments", "ranks"},
    {"ops", "text"},
    {"record"},
    {"plan", "measurement"},
    {"channels", "execute"},
    {"calibration", "criteria", "verification"},
    {"planning"},
    {"masks", "parts"},
    {"api"},
    {"deploy", "testing", "training", "vocabulary"},
    {"report"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room(path):
    """The room of a file: its package, or the file itself at the top."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path):
    """The rooms that a file imports from, with the lines; imports for types alone as well."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: imports are absolute"
            head, *rest = (node.module or "").split(".")
            if head == "graphprune":
                for name in rest[:1] or [alias.name for alias in node.names]:
                    yield name, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.split(".")[0] != "graphprune", f"{path.name}:{node.lineno}"


def name(path):
    return str(path.relative_to(PACKAGE))


def test_every_room_is_on_one_floor():
    assert Counter(room for floor in FLOORS for room in floor).most_common(1)[0][1] == 1
    missing = {room(path) for path in FILES} - set(FLOOR)
    assert not missing, f"give {sorted(missing)} a floor in {Path(__file__).name}"
    gone = set(FLOOR) - {room(path) for path in FILES}
    assert not gone, f"no such files: {sorted(gone)}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_go_down(path):
    mine = room(path)
    for other, line in imports(path):
        allowed = other == mine or FLOOR[other] < FLOOR[mine]
        assert allowed, f"{name(path)}:{line} imports {other}, which is not below {mine}"


def modules(path):
    """The modules that a file imports from, as dotted names below the package."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("graphprune"):
            inside = node.module.partition(".")[2]
            yield from [inside] if inside else (alias.name for alias in node.names)


def files_in_circles(arrows):
    """What is left when files that import nothing left are taken away, again and again."""
    left = {file: set(others) & set(arrows) for file, others in arrows.items()}
    while gone := {file for file, others in left.items() if not others}:
        left = {file: others - gone for file, others in left.items() if file not in gone}
    return sorted(left)


def test_no_files_import_each_other_in_a_circle():
    """Imports inside functions count as well."""
    arrows = {}
    for path in FILES:
        own = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        arrows[own] = {other for other in modules(path) if other != own}
    assert not files_in_circles(arrows)
    assert files_in_circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == ["a", "b", "c"]


def test_walls_across():
    """What must never meet, whatever the floors are."""
    seen = {}
    for path in FILES:
        seen.setdefault(room(path), set()).update(other for other, _ in imports(path))
    select = PACKAGE / "planning" / "select.py"
    assert not [module for module in modules(select) if module.startswith("criteria")]
    slicing = {path for path in FILES if path.match("verification/masked.py")}
    assert slicing, "the reference has moved"
    for path in slicing:
        assert not [m for m in modules(path) if m.startswith("execute")], "they share no code"
    assert "verification" not in seen["execute"]
    assert seen["ops"] <= {"ops", "errors"}


def test_packages_say_what_enters_and_leaves_and_hide_behind_no_function():
    rooms = {room(path) for path in FILES}
    assert not rooms & set(graphprune.__all__)
    assert sorted(dir(graphprune)) == sorted([*graphprune.__all__, "__version__"])
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        parts = folder.relative_to(ROOT).parts
        text = importlib.import_module(".".join(parts)).__doc__
        assert len(parts) > 2 or len(text.strip().splitlines()) >= 3, folder


def test_an_import_upwards_would_be_seen(tmp_path):
    file = tmp_path / "ops.py"
    file.write_text("def f():\n    from graphprune.api import trace\n")
    assert [other for other, _ in imports(file) if FLOOR[other] > FLOOR["ops"]] == ["api"]


def test_the_public_names_are_true():
    assert list(graphprune.__all__) == sorted(graphprune.__all__)
    fresh = {}
    exec("from graphprune import *", fresh)
    assert set(graphprune.__all__) == set(fresh) - {"__builtins__"}
    public = {n for n, thing in vars(graphprune).items() if inspect.isroutine(thing)}
    public |= {n for n, thing in vars(graphprune).items() if inspect.isclass(thing)}
    assert public - {"__dir__"} == set(graphprune.__all__)


@pytest.mark.parametrize("public", graphprune.__all__)
def test_a_public_name_is_documented_with_an_example(public):
    thing = getattr(graphprune, public)
    texts = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing):
        members = [value for n, value in vars(thing).items() if n[0] != "_"]
        texts += [inspect.getdoc(m) or "" for m in members if inspect.isroutine(m)]
        texts += [inspect.getdoc(m) or "" for m in members if isinstance(m, property)]
    assert all(texts), f"a member of {public} has no docstring"
    assert any("Example:\n" in text and ">>> " in text for text in texts), public


def test_all_errors_share_a_base():
    classes = [thing for thing in vars(errors).values() if inspect.isclass(thing)]
    assert classes
    for kind in classes:
        assert issubclass(kind, errors.GraphPruneError | errors.PruningWarning)
        assert kind.__doc__


@pytest.mark.parametrize("folder", ["graphprune", "tests", "examples", "docs"])
def test_files_are_short(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_registered_twice(path):
    """Neither in a decorator's list of ops nor as a key of a table."""
    for node in nodes(path):
        keys = node.keys if isinstance(node, ast.Dict) else []
        double = [key for key, n in Counter(ast.unparse(k) for k in keys if k).items() if n > 1]
        assert not double, f"{name(path)}:{node.lineno}: {double}"


def test_an_op_is_declared_once():
    targets = Counter(
        ast.unparse(argument)
        for path in FILES
        for node in nodes(path)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("declare", "spelling")
        for argument in node.args
        if not isinstance(argument, ast.Starred)
    )
    assert len(targets) > 200
    assert targets.most_common(1)[0][1] == 1, targets.most_common(3)


def test_rules_are_for_ops_and_documented():
    for name, op in REGISTRY.items():
        assert name in ("pointwise", "pointwise_") or name.count(".") == 1, name
        assert inspect.getdoc(op.channels), name


def test_registries_refuse_a_second_entry():
    with pytest.raises(KeyError, match=r"aten\.mm is declared already"):
        declare(torch.ops.aten.mm, macs=free)(lambda *_: ())
    with pytest.raises(KeyError, match="registered already"):
        register_criterion("l2")(lambda *_: None)
    assert {"l1", "l2", "random"} <= set(criteria())


def test_every_module_imports_and_says_what_it_is():
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        assert importlib.import_module(".".join(parts).removesuffix(".__init__")).__doc__


@pytest.mark.parametrize("old", MOVED)
def test_modules_that_moved_are_found_by_their_old_names(old):
    new = f"graphprune.{MOVED[old]}"
    for name in [name for name in sys.modules if name.startswith(f"graphprune.{old}")]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=f"graphprune.{old} is {new} since"):
        found = importlib.import_module(f"graphprune.{old}")
    assert found is importlib.import_module(new)
    assert found.__spec__.name == found.__name__ == new
    assert old not in graphprune.__all__
    assert importlib.util.find_spec(f"graphprune.{old}x") is None
