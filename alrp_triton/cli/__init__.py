"""The command ``alrp-triton``: ``doctor`` says what is wrong with an installation, ``verify`` checks the backends of
this machine, ``info`` shows versions, devices and settings, ``bench`` measures, ``compare`` trains a detector with
several losses on your data, ``evaluate`` computes AP and LRP of detections, ``calibrate`` makes their scores
probabilities.

A command is a function that adds its parser, with a function of the parsed arguments that returns the exit status.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import __version__
from .doctoring import add_doctor
from .evaluating import add_calibrate, add_evaluate
from .measuring import add_bench, add_compare
from .showing import add_info
from .verifying import add_verify


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv``, by default the process's own; return the exit status.

    Raises:
        SystemExit: with status 2 for wrong arguments, with 0 for ``--help`` and ``--version``.
    """
    parser = argparse.ArgumentParser(prog="alrp-triton", description="Ranking-based losses for object detection.")
    parser.add_argument("--version", action="version", version=f"alrp-triton {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_doctor, add_verify, add_info, add_bench, add_compare, add_evaluate, add_calibrate):
        add(commands)
    arguments, rest = parser.parse_known_args(argv)
    if "rest" in arguments:
        arguments.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    status: int = arguments.run(arguments)
    return status
