"""The stored shares of examples/benchmarks/coverage.py, and a sample of its suites."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "transformers_text": "transformers",
    "transformers_vision": "transformers",
    "recurrent": "torch",
    "diffusers": "diffusers",
    "vit_pytorch": "vit_pytorch",
    "segmentation_models": "segmentation_models_pytorch",
    "ultralytics": "ultralytics",
}
SAMPLE = 6


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of the folder of benchmarks."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and name.partition(".")[0] in {
            path.stem for path in FOLDER.glob("*.py")
        }:
            del sys.modules[name]


def row(share, status="ok", name="net"):
    return {
        "suite": "made", "name": name, "status": status, "reason": "why",
        "params": [1000, int(1000 * share)],
    }  # fmt: skip


def test_a_model_that_keeps_more_is_told(benchmark):
    shares = benchmark("coverage_shares")
    stored = {"shares": {"made": {"net": 0.3}}, "reasons": {}}
    assert shares.complaints([row(0.3), row(0.301), row(0.25)], stored) == []
    (more,) = shares.complaints([row(0.31)], stored)
    assert "net: keeps 31.0% of its parameters, 30.0% before" in more
    (failed,) = shares.complaints([row(0.3, "rebuild fails")], stored)
    assert "rebuild fails: why" in failed
    (new,) = shares.complaints([row(0.3, name="other")], stored)
    assert "other: no stored share" in new


def test_shares_are_stored_and_reasons_go_with_what_they_explain(benchmark, tmp_path):
    shares, path = benchmark("coverage_shares"), tmp_path / "shares.json"
    shares.store([row(0.5), row(0.6, name="other")], path)
    stored = json.loads(path.read_text())
    assert stored["shares"] == {"made": {"net": 0.5, "other": 0.6}}
    assert shares.unexplained(stored) == ["made/net", "made/other"]
    stored["reasons"] = {"made": {"net": "frozen", "other": "wide"}}
    assert shares.unexplained(stored) == []
    path.write_text(json.dumps(stored))
    shares.store([row(0.4)], path)
    assert shares.load(path)["reasons"] == {"made": {"other": "wide"}}
    shares.store([row(0.9, "trace fails")], path)
    assert shares.load(path)["shares"]["made"]["net"] == 0.4


def test_what_is_kept_beyond_the_usual_has_a_reason(benchmark):
    shares = benchmark("coverage_shares")
    stored = shares.load()
    assert shares.unexplained(stored) == []
    found = [share for models in stored["shares"].values() for share in models.values()]
    assert len(found) > 200
    assert sum(share < shares.USUAL for share in found) >= 0.94 * len(found)


@pytest.mark.slow
@pytest.mark.parametrize("suite", LIBRARIES)
@pytest.mark.filterwarnings("ignore")  # those of other libraries
def test_a_sample_keeps_no_more_than_before(benchmark, suite):
    """Every n-th model of a suite, in a process of its own, verified in float64."""
    pytest.importorskip(LIBRARIES[suite], reason=f"{suite} needs {LIBRARIES[suite]}")
    coverage, shares = benchmark("coverage"), benchmark("coverage_shares")
    stored = shares.load()
    if suite not in stored["shares"]:
        pytest.skip(f"no shares of {suite} are stored")
    here = {name: shares.versions().get(name) for name in shares.LIBRARIES}
    library = LIBRARIES[suite].replace("_", "-")
    if here.get(library) != stored["versions"].get(library):
        pytest.skip(f"the shares are those of {library} {stored['versions'].get(library)}")
    cases = [
        case for case in benchmark("suites").cases(suite) if case.name in stored["shares"][suite]
    ]
    options = coverage.parse(["--suite", suite, "--no-peer", "--full-below", "3e5"])
    rows = [coverage.measured(case, options) for case in cases[:: max(1, len(cases) // SAMPLE)]]
    assert shares.complaints(rows, stored) == []
