"""Where a benchmark ran, tables on the terminal, and results on disk."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import alrp_triton

_IN_CHECKOUT = Path(__file__).parent / "results"
RESULTS = _IN_CHECKOUT if _IN_CHECKOUT.is_dir() else Path()
"""Where results go by default: not into an installed package."""


def environment(module: str) -> dict[str, Any]:
    """Command and versions, for a reader who wants the same numbers."""
    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "alrp_triton": alrp_triton.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        # Of the last minute: above the number of cores, others share them and wall-clock times mean little.
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _commit() -> str | None:
    """The checkout's commit, "-dirty" where tracked files differ from it; None outside a checkout."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_environment(environment: dict[str, Any]) -> None:
    """The same as a few lines of text."""
    for name, value in environment.items():
        print(f"{name:>12}: {value}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str | None = None) -> None:
    """A table whose first column is text and the others numbers (given as text)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for k, column in enumerate(columns):
        table.add_column(column, justify="right" if k else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console = Console()
    # Piped into a file there is no terminal to fit; never cut a number off.
    Console(width=max(console.width, 110)).print(table)


def claim(name: str, value: float, relation: str, target: float) -> dict[str, Any]:
    """A measured number against what is claimed of it; ``relation`` is ``"<="``, ``"<"`` or ``">="``."""
    met = {"<=": value <= target, "<": value < target, ">=": value >= target}[relation]
    return {"claim": name, "measured": value, "target": f"{relation} {target:g}", "met": met}


def print_claims(claims: Sequence[dict[str, Any]]) -> None:
    """The table of all claims."""
    rows = [(c["claim"], f"{c['measured']:.2f}", c["target"], "yes" if c["met"] else "NO") for c in claims]
    print_table("Claims", ["claim", "measured", "target", "met"], rows)


def write(path: Path, results: dict[str, Any]) -> None:
    """Results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
