"""How the rows of coverage.py are shown: one line each, a summary, and docs/coverage.md."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from coverage_shares import USUAL, load, versions

Row = dict[str, Any]
MAIN = (0.5, "local")
LIMIT = 0.6  # the share of parameters a model may keep at ratio 0.5 without a word
STAGES = ("trace", "plan", "rebuild")
CHECKS = ("verify64", "verify batch", "verify32")
HEADER = (
    f"{'model':<30} {'groups':>6} {'params':>7} {'MACs':>7} {'float64':>8} {'float32':>8} "
    f"{'trace':>6} {'plan':>6} {'rebld':>6} {'verify':>6}  peer / status"
)


def share(pair: Sequence[int] | None) -> str:
    """What is kept, in percent."""
    return f"{100 * pair[1] / pair[0]:.1f} %" if pair else "-"


def _gap(row: Row, name: str) -> str:
    return f"{row[name]:.0e}" if row.get(name) is not None else "-"


def _peer(row: Row) -> str:
    kept = f"{100 * row['peer_kept']:.1f} %" if row.get("peer_kept") is not None else ""
    state = row.get("peer", "not run")
    return kept if state == "runs" else " ".join(filter(None, (kept, state)))


def _seconds(row: Row, names: Sequence[str]) -> float:
    return sum(row.get("seconds", {}).get(name, 0.0) for name in names)


def line(row: Row) -> str:
    """One line for the terminal."""
    seconds = row.get("seconds", {})
    stages = " ".join(f"{seconds.get(name, float('nan')):6.2f}" for name in STAGES)
    state = row["status"] if row["status"] == "ok" else f"{row['status']}: {row['reason'][:150]}"
    return (
        f"{row['name']:<30} {row.get('groups', '-'):>6} {share(row.get('params')):>7} "
        f"{share(row.get('macs')):>7} {_gap(row, 'verify64'):>8} {_gap(row, 'verify32'):>8} "
        f"{stages} {_seconds(row, CHECKS):6.1f}  {_peer(row)} / {state}"
    )


def summary(rows: Sequence[Row]) -> str:
    """How many of the models pass, here and with the peer."""
    good = [row for row in rows if row["status"] == "ok"]
    large = sum(_large(row) for row in good)
    proven = sum(_verified(row) for row in good)
    text = f"{len(good)} of {len(rows)} models shrunk and verified"
    if proven < len(good):
        text = f"{len(good)} of {len(rows)} models planned, {proven} of them shrunk and verified"
    text += f", {large} of them above {100 * LIMIT:.0f} % of their parameters" if large else ""
    tried = [row["peer"] for row in rows if "peer" in row]
    runs = sum(state == "runs" for state in tried)
    return f"{text}; the peer's result runs for {runs} of {len(tried)}" if tried else text


def _verified(row: Row) -> bool:
    return row.get("verify64") is not None or row.get("verify32") is not None


def document(
    order: Mapping[str, Sequence[str]],
    rows: Sequence[Row],
    before: str = "",
    reasons: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """The whole of docs/coverage.md.

    Args:
        order: the names of the models of each suite, in the order to show.
        rows: all cached rows.
        before: the page as it is; sections of suites without rows stay as they are.
        reasons: why models keep more than usual, by suite and name.
    """
    parts = [_intro()]
    old = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n^## |\Z)", before, re.M | re.S))
    for suite in order:
        place = {name: number for number, name in enumerate(order[suite])}
        mine = [row for row in rows if row["suite"] == suite and row["name"] in place]
        mine.sort(key=lambda row: place[row["name"]])
        if mine:
            measured = f"Measured on {date.today()} with {_versions()}."
            parts += [
                f"## {suite}",
                measured,
                *_suite(mine),
                _reasons((reasons or {}).get(suite, {})),
            ]
        elif suite in old:
            parts += [f"## {suite}", old[suite].strip()]
    return "\n\n".join(filter(None, parts)) + "\n"


def _reasons(known: Mapping[str, str]) -> str:
    """Why models keep more than usual."""
    lines = [f"- {name}: {text}" for name, text in sorted(known.items())]
    return "\n".join(["Why these keep more than 45 %:\n", *lines]) if lines else ""


def _suite(rows: Sequence[Row]) -> list[str]:
    main = [row for row in rows if (row["ratio"], row["scope"]) == MAIN]
    others = sorted({(row["ratio"], row["scope"]) for row in rows} - {MAIN}, key=_local_first)
    parts = [f"Ratio {MAIN[0]}, {MAIN[1]}: {summary(main)}.", _table(main)]
    parts += [_kept(main), _fewer(main), _failures(main)]
    for ratio, scope in others:
        chosen = [row for row in rows if (row["ratio"], row["scope"]) == (ratio, scope)]
        parts += [f"Ratio {ratio}, {scope}: {summary(chosen)}.", _failures(chosen)]
    return [*parts, _short(rows, others)]


def _local_first(setting: tuple[float, str]) -> tuple[bool, float]:
    return setting[1] != "local", -setting[0]


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    return ", ".join(found + [f"{name} {text}" for name, text in versions().items()])


def _counts() -> str:
    stored = load()["shares"]
    shares = [share for models in stored.values() for share in models.values()]
    usual = sum(share < USUAL for share in shares)
    return (
        f"At ratio 0.5, {usual} of {len(shares)} models keep less than {100 * USUAL:.0f} % of "
        "their parameters."
    )


def _intro() -> str:
    return f"""# What graphprune shrinks

Written by `examples/benchmarks/coverage.py --suite SUITE --write docs/coverage.md`, one thread. The
share of parameters that each model keeps stands in `examples/benchmarks/coverage_shares.json`;
`coverage.py --suite SUITE --check` exits with 1 where a model keeps more than that, fails or is
refused. {_counts()}

- **torchvision**: every model of `list_models()` that is not quantized, and the ResNets for CIFAR.
- **timm**: the smallest model of every architecture module.
- **transformers**: architectures from small configurations (width 64, two layers, four heads).
- **recurrent**: four models written for this table, in `examples/benchmarks/recurrent.py`.
- **transformers_text**, **transformers_vision**: more architectures of transformers, as small.
- **vit_pytorch**, **segmentation_models**, **diffusers**, **ultralytics**: small models of these
  libraries, none of which is needed otherwise. Ultralytics is under AGPL-3.0.

Where a model has outputs that are not used further (states of the encoder, hidden states, features
of a detector), the suite names those that are, as a loss does; all others would keep their
channels.

Every model starts from random weights, with random BatchNorm statistics and no parameter left
constant. It is traced, planned and rebuilt without any hint, and compared with the masked original
by `graphprune.verify`: outputs in eval mode at another batch size and, where the model takes one,
another resolution; outputs, gradients and buffers in train mode, auxiliary heads included.

- *params*, *MACs*: what is kept. MACs are those of the input in the table.
- *float64*: the largest relative difference found in all these checks; the limit is 1e-10.
- *float32*: the same for outputs in eval mode; the limit is 1e-5, or three times what the outputs
  of the small model move when its inputs change by 1e-7. Gradients are compared in float64
  only: rounding flips ReLU and max-pooling, so that even one and the same model has gradients that
  differ by several percent between float32 and float64.
- *renorm.*: models with a norm over removed channels; there the reference takes the statistics over
  the kept channels.
- *seconds*: trace, plan and rebuild, first call in a fresh process; other work ran beside it, see
  [benchmarks](benchmarks.md#the-slowest-models) for CPU seconds.
- *peer*: parameters kept by Torch-Pruning (`BasePruner`, `GroupMagnitudeImportance(p=2)`, same
  ratio, output layers ignored, nothing else set by hand), and whether its result runs in eval and
  in train mode, with outputs of the same shapes. It is not checked against a reference."""


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| model | input | groups | params | MACs | float64 | float32 | seconds | peer |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        kind = "" if row.get("exact", True) else " (renorm.)"
        failed = "" if row["status"] == "ok" else f" **{row['status']}**"
        cells = [
            f"{row['name']}{kind}{failed}",
            row["input"],
            str(row.get("groups", "-")),
            share(row.get("params")),
            share(row.get("macs")),
            _gap(row, "verify64"),
            _gap(row, "verify32"),
            f"{_seconds(row, STAGES):.2f}",
            _peer(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(rows: Sequence[Row], settings: Sequence[tuple[float, str]]) -> str:
    """Parameters kept and the largest difference, one column for each setting."""
    if not settings:
        return ""
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {(row["name"], row["ratio"], row["scope"]): row for row in rows}
    titles = [f"{ratio}, {scope}" for ratio, scope in settings]
    lines = ["| model | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name in names:
        cells = [name]
        for setting in settings:
            row = found.get((name, *setting))
            failed = row is not None and row["status"] != "ok"
            cells.append(
                "-"
                if row is None
                else f"**{row['status']}**"
                if failed
                else f"{share(row.get('params'))} ({_gap(row, 'verify64')})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _large(row: Row) -> bool:
    return bool(row.get("params")) and row["params"][1] > LIMIT * row["params"][0]


def _kept(rows: Sequence[Row]) -> str:
    """Why models keep much."""
    large = [row for row in rows if _large(row)]
    if not large:
        return f"Every model keeps at most {100 * LIMIT:.0f} % of its parameters."
    lines = [f"Models that keep more than {100 * LIMIT:.0f} % of their parameters, and why:\n"]
    for row in large:
        head = row.get("head", 0)
        text = f"- {row['name']}: {share(row['params'])}."
        if head > 0.1:
            text += (
                f" {100 * head:.0f} % of its parameters are in the output layer, which loses "
                "inputs but no outputs."
            )
        lines.append(f"{text} Frozen: {reasons(row)}.")
    return "\n".join(lines)


def reasons(row: Row, most: int = 3) -> str:
    """The reasons that freeze most parameters, each with its share."""
    found: dict[str, int] = {}
    for reason, count in row.get("frozen", {}).items():
        place = re.search(r"\(([^()]*):(\d+)\)$", reason)
        text = re.sub(r"( in \S+)? \([^()]*\)$", "", reason)
        if place:
            text += f" ({'/'.join(place[1].split('/')[-2:])}:{place[2]})"
        found[text] = found.get(text, 0) + count
    total = sum(found.values()) or 1
    largest = sorted(found.items(), key=lambda item: -item[1])[:most]
    return "; ".join(f"{text}, {100 * count / total:.0f} %" for text, count in largest)


def _fewer(rows: Sequence[Row]) -> str:
    """Which models were verified by less than all checks."""
    missing: dict[str, list[str]] = {}
    for row in rows:
        checks = row.get("checks") or []
        if row["status"] != "ok":
            continue
        if len(checks) == 1:
            missing.setdefault("outputs in eval mode only, for their size", []).append(row["name"])
            continue
        if not any("resolution" in check for check in checks):
            missing.setdefault("no other resolution", []).append(row["name"])
        if any("does not train" in check for check in checks):
            missing.setdefault("no train mode on these inputs", []).append(row["name"])
    lines = [f"- {text}: {', '.join(names)}" for text, names in missing.items()]
    return "\n".join(["Verified by fewer checks:\n", *lines]) if lines else ""


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row["status"] != "ok"]
    lines = [f"- {row['name']}: {row['status']}: {_first(row['reason'])}" for row in failed]
    return "\n".join(["Not passed:\n", *lines]) if failed else ""


def _first(text: str) -> str:
    return re.sub(r"/\S*/site-packages/", "", text.strip().partition("\n")[0])[:300]
