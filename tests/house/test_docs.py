"""Everything that is shown is run: the pages, the examples in docstrings, the scripts."""

import ast
import doctest
import importlib
import inspect
import json
import linecache
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graphprune
from graphprune.criteria import registry

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
OWN_URL = re.compile("https://github.com/graphprune/graphprune/(blob|tree)/main/")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(graphprune.__path__, "graphprune.")
)
NEEDS = {
    "lightning_prune": ["lightning"],
    "lightning_resume": ["lightning"],
    "trainer_prune": ["transformers", "accelerate"],
    "trainer_resume": ["transformers", "accelerate"],
    "yolo": ["ultralytics"],
    "graphprune.vocabulary.tokenizer": ["tokenizers"],
    "graphprune.deploy.exporting": ["onnx", "onnxruntime", "onnxscript"],
    "graphprune.deploy.meeting": ["onnx", "onnxruntime", "onnxscript"],
    "graphprune.deploy.quantizing": ["onnx", "onnxruntime", "onnxscript"],
    "graphprune.deploy.reading.door": ["onnx", "onnxruntime", "onnxscript"],
}
MACHINE = re.compile(rf"(?<![\w./~-])/({'|'.join(('work', 'tmp', 'root', 'home', 'opt'))})/\w")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What is shown may register criteria; other tests do not see them."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def own_words(monkeypatch):
    """What torch says of a layer differs between its versions: none of it may be shown."""
    monkeypatch.setattr(torch.nn.Module, "__repr__", lambda self: "(torch's words)")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts of the docs folder, importable."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module


def test_the_api_page_is_what_the_docstrings_say(scripts):
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == scripts("make_api").reference(), "run: python docs/make_api.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_run_and_print_what_is_shown(page, scripts, own_words):
    for block in scripts("blocks").run(page):
        where = f"{page.name}:{block.line}"
        assert block.true, f"{where} prints\n{block.printed}\nrun: python docs/blocks.py"


def quoted_errors(code):
    """The lines of a block that catch an error which is not ours and do something with its text."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ExceptHandler) and node.name:
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind).rpartition(".")[2] for kind in kinds}
            if not all(hasattr(graphprune.errors, name) for name in names):
                yield node.lineno


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_quotes_no_error_of_another_library(page, scripts):
    blocks = scripts("blocks").FENCE.findall(page.read_text(encoding="utf-8"))
    assert not [line for code, _ in blocks for line in quoted_errors(code)]


def test_a_quoted_error_is_noticed():
    code = "try:\n    pass\nexcept {} as error:\n    print(error)\n"
    assert [*quoted_errors(code.format("(graphprune.errors.InputError, PlanError)"))] == []
    assert [*quoted_errors(code.format("(InputError, RuntimeError)"))] == [3]


def test_every_python_fence_is_found(scripts):
    """A fence that the pattern misses would be shown without being run."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(scripts("blocks").FENCE.findall(text)) == text.count("```python"), page.name


def test_a_false_output_is_noticed(scripts, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    assert [block.true for block in scripts("blocks").run(page)] == [False]
    scripts("blocks").refresh(page)
    assert page.read_text() == "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        name, _, anchor = target.partition("#")
        own = OWN_URL.match(name)
        if name.startswith("http") and not own:
            continue
        assert own or page.name != "README.md", f"{target} does not work on PyPI"
        file = ROOT / name[own.end() :] if own else page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if not anchor:
            continue
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        assert anchor in anchors, f"{page.name} links to {target}"


def test_the_architecture_page_has_the_floors_and_files_of_the_house():
    house = (ROOT / "tests" / "house" / "test_house.py").read_text(encoding="utf-8")
    floors = next(
        ast.literal_eval(node.value)
        for node in ast.parse(house).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = page.partition("## Who may import whom")[2].split("```")[1].splitlines()[1:]
    assert [set(line.split()) for line in reversed(shown)] == [set(f) for f in floors[:-1]]
    rows = page.partition("## The files")[2].partition("\n## ")[0]
    rooms = set().union(*floors[:-1])
    assert not {room for room in rooms if not re.search(rf"`{room}(\.py|/)`", rows)}


def test_the_snippet_for_transformers_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})


class Finder(doctest.DocTestFinder):
    """Finds the examples of decorated functions as well."""

    def _from_module(self, module, thing):
        return super()._from_module(module, inspect.unwrap(thing) if callable(thing) else thing)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name, own_words, monkeypatch):
    monkeypatch.setattr(linecache, "checkcache", lambda _=None: None)  # all files, each time
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    report: list[str] = []
    module = importlib.import_module(name)
    for test in Finder().find(module, name):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    source = inspect.getsource(module)  # a docstring may be put together, as that of Options is
    assert runner.tries == len(re.findall("^ *>>> ", source, re.MULTILINE))


LONG = {"trainer_prune", "trainer_resume", "ticket", "slimming", "repair", "yolo"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(path.stem, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out, "an example prints what it shows"


@pytest.mark.slow
def test_the_benchmark_of_one_shot_pruning_runs(tmp_path):
    if not (ROOT.parent / "shared" / "data" / "cifar_resnet20.safetensors").exists():
        pytest.skip("the trained networks are not in shared/data beside the repository")
    script, out = ROOT / "examples" / "benchmarks" / "oneshot.py", tmp_path / "rows.json"
    command = [sys.executable, str(script), "--quick", "--threads", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    assert {"reconstruction", "l2"} <= {row["criterion"] for row in content["criteria"]}
    assert all(row["macs"] <= row["budget"] for rows in content.values() for row in rows)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_ends_in_a_check(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 80
    last = ast.parse(text).body[-1]
    raises = (node.exc for node in ast.walk(last) if isinstance(node, ast.Raise))
    checks = any(isinstance(node, ast.Assert) for node in ast.walk(last)) or any(
        "AssertionError" in ast.unparse(exc) for exc in raises if exc is not None
    )
    assert checks, f"{path.name} ends in {ast.unparse(last)}"


def committed():
    """All files under version control; all text files where there is no repository."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode == 0:
        return [ROOT / line for line in found.stdout.splitlines()]
    folders = ("graphprune", "tests", "docs", "examples")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.*")]


def test_no_committed_text_names_a_path_of_a_machine():
    for path in committed():
        if path.suffix in {".py", ".md", ".toml", ".svg", ".txt", ".json", ".yml", ""}:
            if not path.is_file():
                continue
            lines = path.read_text(encoding="utf-8").splitlines()
            named = [line for line in lines if MACHINE.search(line)]
            assert not named, f"{path.relative_to(ROOT)}: {named[0]}"
