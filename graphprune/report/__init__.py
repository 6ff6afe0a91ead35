"""What people look at: one HTML file about a plan.

A plan enters, with the graph of its model, measurements, a verification and a history where there
are any; a file that needs no network leaves. Everything below the command line may be imported.
"""

from pathlib import Path
from typing import Any

from graphprune.plan.plan import Plan


def write_report(plan: Plan, path: str | Path, *args: Any, **options: Any) -> Path:
    """What stands behind :meth:`graphprune.Plan.report`; what it needs is loaded here."""
    from graphprune.report.write import report

    return report(plan, path, *args, **options)
