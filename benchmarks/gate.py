"""What the kernels may cost, recorded: a change for the worse has to change the record with it.

    python -m benchmarks.gate             compare with the record; exit status 1 if anything is worse
    python -m benchmarks.gate --record    write a new record

No GPU is needed: the kernels are compiled, and registers, spills, shared memory and instructions are read off the
machine code (:mod:`.static`). They depend on the compiler, so the record holds for one version of Triton.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .report import print_table
from .static import VARIANTS, Figures, figures

RECORD = Path(__file__).parent / "results" / "static.json"
TARGETS = ("sm_80", "sm_90", "sm_100")
COSTS = ("registers", "spill_bytes", "shared_bytes", "instructions", "per_logit", "per_pair")
"""Of each, less is better."""


class Compiled(NamedTuple):
    """One kernel as it is pinned."""

    target: str
    kernel: str
    variant: str
    dtype: str

    def figures(self) -> Figures:
        """Compile it."""
        return figures(self.kernel, self.target, self.variant, logits=getattr(torch, self.dtype))


# The linear kernels also read half precision as it is.
CONFIGURATIONS = [
    Compiled(target, kernel, variant, dtype)
    for target in TARGETS
    for dtype in ("float32", "bfloat16")
    for variant, kernels in VARIANTS.items()
    for kernel in kernels
    if dtype == "float32" or kernel in ("buckets", "gradient")
]


def worse(before: dict[str, Any], now: Figures) -> list[str]:
    """The costs that have grown, as text."""
    found = ((cost, before.get(cost), getattr(now, cost)) for cost in COSTS)
    return [f"{cost} {old} -> {new}" for cost, old, new in found if old is not None and (new is None or new > old)]


def recorded(path: Path = RECORD) -> tuple[str, dict[Compiled, dict[str, Any]]]:
    """The record: the version of Triton it holds for, and the costs of each configuration."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["triton"], {
        Compiled(**{name: row[name] for name in Compiled._fields}): row for row in content["configurations"]
    }


def record(path: Path = RECORD) -> None:
    """Write what all configurations cost now."""
    rows = []
    for configuration in CONFIGURATIONS:
        costs = configuration.figures()
        rows.append(configuration._asdict() | {cost: getattr(costs, cost) for cost in COSTS})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{{"triton": "{triton.__version__}", "configurations": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"written to {path}")


def main(arguments: list[str] | None = None) -> None:
    """Compare, or record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write a new record instead of comparing with it")
    parser.add_argument("--file", type=Path, default=RECORD, help="the record (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.record:
        record(options.file)
        return
    version, before = recorded(options.file)
    if version != triton.__version__:
        sys.exit(f"the record is of Triton {version}, this is {triton.__version__}: figures do not compare")
    missing = [configuration for configuration in CONFIGURATIONS if configuration not in before]
    if missing:
        sys.exit(f"not recorded: {', '.join(' '.join(configuration) for configuration in missing)}")
    changes = {configuration: worse(before[configuration], configuration.figures()) for configuration in CONFIGURATIONS}
    rows = [[" ".join(configuration), "; ".join(costs)] for configuration, costs in changes.items() if costs]
    if rows:
        print_table("Worse than recorded", ["target, kernel, variant, dtype", "cost"], rows)
        sys.exit(1)
    print(f"{len(CONFIGURATIONS)} configurations, none worse than recorded")


if __name__ == "__main__":
    main()
