"""The default tests in one environment after the other, from the oldest versions to the newest.

``python examples/benchmarks/versions.py [NAME ...] --write docs/versions.md`` makes each
environment in a temporary folder (6 GB), installs the packages, unpacks the source distribution
there, runs its tests, and removes everything again. The interpreters ``python3.11`` to
``python3.13`` must be on the path. Takes about a quarter of an hour for each on two cores.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOWN = ("torch", "torchvision", "transformers", "lightning", "numpy", "scipy", "networkx")
BEGIN, END = "<!-- versions.py -->\n", "<!-- /versions.py -->\n"


@dataclass
class Environment:
    """One row of the table: an interpreter, and what pip is told beside the extras."""

    name: str
    python: str
    extras: str = "test,demo"
    packages: tuple[str, ...] = ()


def oldest() -> tuple[str, ...]:
    """What pyproject asks for, each in the oldest series that it allows."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = (
        project["optional-dependencies"][name] for name in ("plots", "test", "demo", "training")
    )
    pairs = (each.split(">=") for each in chain(project["dependencies"], *extras) if ">=" in each)
    return tuple(f"{name}=={low}{'' if '.' in low else '.0'}.*" for name, low in pairs)


ENVIRONMENTS = (
    Environment("oldest", "3.11", "test,demo,training", oldest()),
    Environment("newest", "3.13", "test,demo,training"),
    Environment("plain", "3.12"),
)


@dataclass
class Result:
    """What came out: the versions that were installed, and how the tests ended."""

    environment: Environment
    versions: dict[str, str] = field(default_factory=dict)
    outcome: str = "not installed"
    failed: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        python = self.versions.get("python", self.environment.python)
        rest = [self.versions.get(name, "-") for name in SHOWN]
        return [self.environment.name, python, *rest, self.outcome]


def run(*command: object, cwd: Path | None = None) -> str:
    """The output of a command; what it says of an error goes on the error stream."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    environ.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=environ, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode > 1:  # 1: tests fail
        print(f"{' '.join(words)} ended with {done.returncode}\n{done.stdout}", file=sys.stderr)
    return done.stdout


def versions(python: Path) -> dict[str, str]:
    """The versions of what is installed beside an interpreter."""
    code = (
        "import platform, importlib.metadata as m\n"
        "print('python', platform.python_version())\n"
        "for d in m.distributions(): print(d.metadata['Name'].lower(), d.version)"
    )
    return dict(line.split(maxsplit=1) for line in run(python, "-c", code).splitlines())


def unpacked(python: Path, folder: Path) -> Path:
    """The source distribution, built from a copy of the working tree and unpacked."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=ignored)
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(python, "-c", build, cwd=copy)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return source


def tested(environment: Environment, processes: int, folder: Path) -> Result:
    """Make the environment, run the tests, and say how they ended."""
    result = Result(environment)
    run(f"python{environment.python}", "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-compile", "setuptools>=77")
    source = unpacked(python, folder)
    wanted = (f"{source}[{environment.extras}]", *environment.packages)
    run(python, "-m", "pip", "install", "-q", "--no-compile", *wanted)
    result.versions = versions(python)
    report = folder / "report.xml"
    options = ("-q", "-n", processes, f"--junitxml={report}", "-p", "no:cacheprovider")
    begin = time.perf_counter()
    said = run(python, "-m", "pytest", *options, cwd=source)
    seconds = time.perf_counter() - begin
    if report.exists():
        result.failed = sorted(
            f"{case.get('classname')}::{case.get('name')}"
            for case in ET.parse(report).iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        )
        suite = next(ET.parse(report).iter("testsuite"))
        skipped, count = int(suite.get("skipped", 0)), int(suite.get("tests", 0))
        passed = count - skipped - len(result.failed)
        result.outcome = f"{passed} passed, {skipped} skipped, {len(result.failed)} failed"
        result.outcome += f" in {seconds:.0f} s"
    if result.failed:
        print(said, file=sys.stderr)
    return result


def table(results: list[Result]) -> str:
    """The results in Markdown, with the date."""
    header = ["environment", "python", *SHOWN, "default tests"]
    rows = [header, ["---"] * len(header), *(result.cells() for result in results)]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    failed = "".join(f"- {r.environment.name}: `{name}`\n" for r in results for name in r.failed)
    return f"{datetime.date.today()}:\n\n{lines}" + (f"\n{failed}" if failed else "")


def main() -> None:
    """Run the environments that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("names", nargs="*", help=", ".join(names))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", type=Path, help="put the table in this page")
    options = parser.parse_args()
    results = []
    for environment in ENVIRONMENTS:
        if not options.names or environment.name in options.names:
            with tempfile.TemporaryDirectory() as folder:
                results.append(tested(environment, options.processes, Path(folder)))
            print(table(results), flush=True)
    if options.write:
        head, _, rest = options.write.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{head}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}"
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
