"""Let one of three blocks leave every model of a suite, and compare with the masked original.

    python examples/benchmarks/depth.py --suite timm --full --cache rows.jsonl
    python examples/benchmarks/depth.py --cache rows.jsonl --write docs/depth.md

One line for each model: how many blocks and branches were found, what is left of the parameters,
and the largest relative difference in float64 (eval mode, another batch size; all of ``verify``
with ``--full``). Models of which nothing leaves say why. The page is written from all rows of the
cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from depth_table import HEADER, line, write
from isolate import isolated
from suites import SUITES, Case, cases, cast

import graphprune
from graphprune.errors import InputError, PruningWarning
from graphprune.record.inputs import Call
from graphprune.verification.comparing import Session
from graphprune.verification.report import TOLERANCES

THIRD = 1 / 3


def run(case: Case, full: bool) -> dict[str, Any]:
    """One of three blocks leaves one model; of branches, where there are no blocks."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PruningWarning)
    model, x = case.model(), case.draw(case.batch)
    start = time.process_time()
    graph = graphprune.trace(model, x)
    row: dict[str, Any] = {"blocks": len(graph.finder.single_blocks)}
    row["branches"] = len(graph.branches)
    row["seconds"] = round(time.process_time() - start, 1)
    plan = None
    for kind in (kind for kind in ("blocks", "branches") if row[kind] > 1):
        try:
            plan = graph.plan(max(THIRD, 1 / row[kind]), parts=kind)
        except InputError as error:  # the code around them does not go on
            row["why"] = str(error)
            continue
        row["kind"] = kind
        break
    if plan is None:
        return row
    small = graphprune.rebuild(model, plan)
    row["removed"] = len(plan.parts)
    row["params"] = [plan.before.params, plan.after.params]
    if full:
        report = graphprune.verify(model, small, x)
        row["verdict"], row["difference"] = report.verdict, report.difference
    else:
        call = Call.of(cast(case.draw(case.batch + 1), torch.float64))
        limit = TOLERANCES[torch.float64]
        session = Session(model, small, plan, torch.float64, limit, 0)
        check = session.outputs("outputs", call, training=False)
        row["difference"] = check.difference
        row["verdict"] = "equal" if check.difference <= limit else "different"
    return row


def main() -> int:
    """Run a suite and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=SUITES, default="torchvision")
    parser.add_argument("--models", nargs="+", default=["*"], help="glob patterns of names")
    parser.add_argument("--timeout", type=float, default=300, help="seconds per model")
    parser.add_argument("--full", action="store_true", help="all that verify compares")
    parser.add_argument("--cache", type=Path, help="append rows here, and take them from here")
    parser.add_argument("--write", type=Path, help="the page to write from the cache")
    options = parser.parse_args()
    known = {}
    if options.cache and options.cache.exists():
        rows = map(json.loads, options.cache.read_text().splitlines())
        known = {(row["suite"], row["name"]): row for row in rows}
    if options.write:
        suites = {
            suite: [row for row in known.values() if row["suite"] == suite] for suite in SUITES
        }
        write(options.write, {suite: rows for suite, rows in suites.items() if rows})
        return 0
    print(HEADER)
    bad = 0
    for case in cases(options.suite, options.models):
        row = known.get((options.suite, case.name))
        if row is None:
            row = isolated(run, case, options.full, timeout=options.timeout)
            if options.cache:
                with options.cache.open("a") as file:
                    text = json.dumps({"suite": options.suite, "name": case.name, **row})
                    file.write(text + "\n")
        row["name"] = case.name
        bad += row["status"] != "ok" or row.get("verdict") == "different"
        print(line(row), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
