"""What pyproject asks for is what the package imports, and where: no more, and nothing by luck."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from support.sources import nodes

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {
    "scikit-learn": "sklearn",
    "sentence-transformers": "sentence_transformers",
}  # by the name of the package
OWN = {*sys.stdlib_module_names, "graphprune"}


def asked(requirements):
    """The modules that requirements bring."""
    names = (re.match(r"[\w-]+", text)[0] for text in requirements)
    return {MODULES.get(name, name) for name in names} - {"graphprune"}


HARD = asked(PROJECT["dependencies"])
EXTRAS = {name: asked(texts) for name, texts in PROJECT["optional-dependencies"].items()}


@functools.cache
def imported(path):
    """The modules that are imported inside functions, and those as a file loads."""
    found = set(), set()
    inside = {
        id(node)
        for outer in nodes(path)
        if isinstance(outer, ast.FunctionDef)
        or (isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test))
        for node in ast.walk(outer)
    }
    for node in nodes(path):
        names = found[id(node) not in inside]
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return found


def found(top):
    """The modules of others that the package imports."""
    names = set()
    for file in (ROOT / "graphprune").rglob("*.py"):
        if "callbacks" not in file.parts:  # each is of the library whose name it bears
            names.update(imported(file)[top])
    return names - OWN


def test_each_hard_dependency_is_imported_and_nothing_else_is_needed():
    at_once, later = found(top=True), found(top=False)
    assert at_once <= HARD, "imported as the package loads, but not asked for"
    assert at_once | later >= HARD, "asked for, but imported nowhere"
    optional = set().union(*EXTRAS.values())
    assert later - HARD <= optional, "imported where it is used, but in no extra"


BLOCKED = ("torchvision", "matplotlib", "sklearn", "transformers", "lightning", "hypothesis")
SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED!r}))
import torch
before = set(sys.modules)
import graphprune
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
import graphprune.cli.main
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
x = torch.zeros(1, 4)
graph = graphprune.trace(net, x)
small = graphprune.rebuild(net, 0.5, x)
graphprune.verify(net, small, x)
from graphprune.cli.loading import load_model
for use in (lambda: graph.draw("g.svg"), lambda: load_model("torchvision:resnet18")):
    try:
        use()
    except graphprune.errors.InputError as error:
        print(error)
"""


def test_what_is_optional_is_not_needed_and_is_asked_for_by_name(tmp_path):
    """Without the extras the engine runs; what needs one says which.

    Importing the package loads none of them, nor progress bars, the command line and solvers.
    """
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[0].split()
    assert "graphprune" in loaded
    assert not {"networkx", "rich", "scipy", "typer"} & set(loaded)
    assert 'pip install "graphprune[plots]"' in done.stdout
    assert "pip install torchvision" in done.stdout
