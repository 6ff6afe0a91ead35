"""Shrink every model of a suite, verify it, and write one line per model.

    python examples/benchmarks/coverage.py --models 'resnet*' --ratio 0.5
    python examples/benchmarks/coverage.py --suite diffusers --check
    python examples/benchmarks/coverage.py --cached --write docs/coverage.md

Results are appended to the cache as they come; a second run continues where the first stopped.
``--check`` compares the shares of parameters that stay with those stored in
coverage_shares.json and exits with 1 where a model keeps more, fails or is refused; ``--store``
writes them. A library that is not installed skips its suite.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage_shares
import coverage_table
import peer
import torch
from isolate import isolated
from suites import SUITES, Case, call, cases, cast, parameters, tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import graphprune
from graphprune.record.inputs import Call
from graphprune.verification.comparing import Session, difference
from graphprune.verification.report import TOLERANCES


def run(
    case: Case, ratio: float, scope: str, full_below: float, verified: bool = True
) -> dict[str, Any]:
    """Shrink and verify one model; stops at the first stage that fails."""
    torch.set_num_threads(1)
    row: dict[str, Any] = {"seconds": {}}

    def stage(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        try:
            return function()
        except Exception as error:
            kind = "does not verify" if name.startswith("verify") else "fails"
            row["status"] = row.get("status") or f"{name} {kind}"
            row["reason"] = row.get("reason") or f"{type(error).__name__}: {error}"
            return None
        finally:
            row["seconds"][name] = round(time.perf_counter() - start, 3)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", graphprune.errors.PruningWarning)
        model = stage("build", case.model)
        x = case.draw(case.batch)
        graph = model and stage("trace", lambda: graphprune.trace(model, x))
        plan = graph and stage("plan", lambda: graph.plan(ratio, scope=scope))
        small = plan and stage("rebuild", lambda: graphprune.rebuild(model, plan))
    pruning = [w for w in caught if issubclass(w.category, graphprune.errors.PruningWarning)]
    row["warning"] = "\n".join(str(w.message) for w in pruning)
    if graph is not None:
        row["groups"] = len(graph)
        row["head"] = sum(map(parameters, case.heads(model))) / parameters(model)
        row["frozen"] = frozen(graph)
    if plan is not None:
        row["exact"] = plan.exact
        row["params"] = [plan.before.params, plan.after.params]
        row["macs"] = [plan.before.macs, plan.after.macs]
    if small is not None and verified:
        huge = plan.before.params > full_below
        full = None if huge else stage("verify64", lambda: everything(model, small, x))
        low = full is not None and full[2]  # the model does not run in float64
        batch = low or stage("verify batch", lambda: outputs(case, model, small, torch.float64))
        single = stage("verify32", lambda: outputs(case, model, small, torch.float32))
        made = [result for result in (full, batch) if isinstance(result, tuple)]
        row["verify64"] = max((result[0] for result in made), default=None)
        row["checks"] = [check for result in made for check in result[1]]
        row["verify32"] = single and single[0]
    return row


def frozen(graph: graphprune.ChannelGraph) -> dict[str, int]:
    """Why channels stay: for each reason, the number of parameters in such channels."""
    found: dict[str, int] = {}
    sizes = {**dict(graph.model.named_parameters()), **dict(graph.model.named_buffers())}
    for group in graph.frozen:
        count = 0
        for member in group.members:
            slot = member.slot
            if slot.parameter and slot.tensor in sizes:
                count += sizes[slot.tensor].numel() // max(slot.size, 1) * member.index.size
        found[str(group.note)] = found.get(str(group.note), 0) + count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def everything(model: nn.Module, small: nn.Module, x: Any) -> tuple[float, list[str], bool]:
    """The largest relative difference, the names of the checks made, and whether in float32."""
    report = graphprune.verify(model, small, x)
    if report.reason:
        raise ValueError(f"not decided: {report.reason}")
    low = report.tolerance > TOLERANCES[torch.float64]
    return report.difference, [check.name for check in report.checks], low


def outputs(
    case: Case, model: nn.Module, small: nn.Module, dtype: torch.dtype
) -> tuple[float, list[str]]:
    """The largest relative difference of the outputs in eval mode, at another batch size.

    That is all that can be compared in float32: rounding flips ReLU and max-pooling, so the
    gradients of one and the same model differ by up to a tenth between float32 and float64.
    """
    x = cast(case.draw(case.batch + 1), dtype)
    limit = TOLERANCES[dtype]
    if dtype == torch.float32:
        limit = max(limit, 3 * rounding(small, x))
    session = Session(model, small, small.graphprune_plan, dtype, limit, 0)
    check = session.outputs("output, a larger batch", Call.of(x), training=False)
    return check.difference, [check.name]


@torch.no_grad()
def rounding(model: nn.Module, x: Any) -> float:
    """How far the outputs of a model move when its inputs are rounded otherwise."""
    nearby = tree_map_only(Tensor, lambda t: t * (1 + 1e-7) if t.is_floating_point() else t, x)
    pairs = zip(tensors(call(model, x)), tensors(call(model, nearby)))
    return max(difference(a, b) for a, b in pairs)


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one model, with the peer's result beside it."""
    arguments = (case, options.ratio, options.scope)
    rest = (options.full_below, not options.no_verify)
    row = isolated(run, *arguments, *rest, timeout=options.timeout)
    other: dict[str, Any] = {}
    if not options.no_peer:
        other = isolated(peer.outcome, *arguments, timeout=options.peer_timeout)
        if other.pop("status") != "ok":
            other = {"peer": other["reason"]}
        other.pop("reason", None)
    return {
        "suite": options.suite,
        "name": case.name,
        "kind": case.kind,
        "input": case.size,
        "ratio": options.ratio,
        "scope": options.scope,
        **row,
        **other,
    }


def read(cache: Path) -> dict[tuple[str, str, float, str], dict[str, Any]]:
    """The rows of a cache; later lines replace earlier ones."""
    rows = {}
    if cache.exists():
        for line in cache.read_text().splitlines():
            row = json.loads(line)
            rows[row["suite"], row["name"], row["ratio"], row["scope"]] = row
    return rows


def names(suite: str) -> list[str]:
    """The names of the models of a suite, none where its library is not installed."""
    try:
        return [case.name for case in cases(suite)]
    except ModuleNotFoundError:
        return []


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="torchvision")
    parser.add_argument("--models", nargs="+", default=["*"], help="glob patterns of names")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--scope", choices=("local", "global"), default="local")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per model")
    parser.add_argument("--peer-timeout", type=float, default=120, help="seconds for the peer")
    text = "parameters above which outputs in eval mode alone are compared"
    parser.add_argument("--full-below", type=float, default=250e6, help=text)
    parser.add_argument("--no-verify", action="store_true", help="only plan and rebuild")
    parser.add_argument("--check", action="store_true", help="compare with the stored shares")
    parser.add_argument("--store", action="store_true", help="store the shares")
    parser.add_argument("--no-peer", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument("--redo", choices=("failed", "all"), help="run cached models again")
    parser.add_argument("--cached", action="store_true", help="only show what is cached")
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir(), "graphprune-coverage.jsonl")
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Run what is not cached, print one line per model, write the table."""
    options = parse()
    try:
        chosen = cases(options.suite, options.models)
    except ModuleNotFoundError as missing:
        print(f"{options.suite}: {missing.name} is not installed")
        return 0
    rows = read(options.cache)
    setting = (options.ratio, options.scope)
    print(coverage_table.HEADER)
    if options.cached:
        done = {(key[0], key[1]) for key in rows if key[2:] == setting}
        chosen = [case for case in chosen if (options.suite, case.name) in done]
    for case in chosen:
        key = (options.suite, case.name, *setting)
        old = rows.get(key)
        again = options.redo == "all" or (
            options.redo == "failed" and old and old["status"] != "ok"
        )
        if old is None or (again and not options.cached):
            rows[key] = measured(case, options)
            with options.cache.open("a") as file:
                file.write(json.dumps(rows[key]) + "\n")
        print(coverage_table.line(rows[key]), flush=True)
    keys = {(options.suite, case.name) for case in chosen}
    current = [row for key, row in rows.items() if key[:2] in keys and key[2:] == setting]
    print(coverage_table.summary(current))
    worse = coverage_shares.complaints(current, coverage_shares.load()) if options.check else []
    print(*worse, sep="\n", end="\n" if worse else "")
    if options.store:
        coverage_shares.store(current)
    if options.write:
        order = {suite: names(suite) for suite in SUITES}
        before = options.write.read_text() if options.write.exists() else ""
        reasons = coverage_shares.load()["reasons"]
        page = coverage_table.document(order, list(rows.values()), before, reasons)
        options.write.write_text(page)
    return 0 if not worse and all(row["status"] == "ok" for row in current) else 1


if __name__ == "__main__":
    sys.exit(main())
