"""The shares of parameters that stay, stored, so that a change that freezes more fails."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STORED = Path(__file__).with_name("coverage_shares.json")
SLACK = 0.002  # of all parameters: rounding of counts, not a layer
USUAL = 0.45  # at ratio 0.5; whatever keeps more has a reason
LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "diffusers",
    "vit-pytorch",
    "segmentation-models-pytorch",
    "ultralytics",
)


def load(path: Path = STORED) -> dict[str, Any]:
    """What is stored: versions of libraries, shares and reasons by suite and model."""
    if not path.exists():
        return {"versions": {}, "shares": {}, "reasons": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def kept(row: Row) -> float | None:
    """The share of the parameters that stays."""
    return row["params"][1] / row["params"][0] if row.get("params") else None


def complaints(rows: Iterable[Row], stored: Mapping[str, Any]) -> list[str]:
    """What is worse than stored: models that fail, and models that keep more."""
    found = []
    for row in rows:
        suite, name, share = row["suite"], row["name"], kept(row)
        before = stored["shares"].get(suite, {}).get(name)
        if row["status"] != "ok":
            found.append(f"{suite}/{name}: {row['status']}: {row.get('reason', '')[:200]}")
        elif before is None:
            found.append(f"{suite}/{name}: no stored share; --store writes it")
        elif share is not None and share > before + SLACK:
            text = f"{suite}/{name}: keeps {share:.1%} of its parameters, {before:.1%} before"
            found.append(text)
    return found


def unexplained(stored: Mapping[str, Any]) -> list[str]:
    """Models that keep more than usual without a reason."""
    return [
        f"{suite}/{name}"
        for suite, models in stored["shares"].items()
        for name, share in models.items()
        if share > USUAL and not stored["reasons"].get(suite, {}).get(name)
    ]


def store(rows: Iterable[Row], path: Path = STORED) -> None:
    """Write the shares of these rows; others, and reasons that still apply, stay."""
    stored = load(path)
    for row in rows:
        share = kept(row)
        if row["status"] == "ok" and share is not None:
            stored["shares"].setdefault(row["suite"], {})[row["name"]] = round(share, 4)
    for suite, models in stored["reasons"].items():
        usual = [name for name in models if stored["shares"][suite].get(name, 0) <= USUAL]
        for name in usual:
            del models[name]
    stored["versions"] = stored["versions"] | versions()
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


def versions() -> dict[str, str]:
    """The versions of the libraries whose models are measured."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
