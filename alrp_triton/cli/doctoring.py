"""The command ``doctor``."""

from __future__ import annotations

import argparse
from typing import Any

from .. import doctor
from ..doctor_devices import Fault


def add_doctor(commands: Any) -> None:
    text = """Examine this installation: versions, devices, kernels, results and caches. Plain text for a bug report; it
    ends with what is wrong and how to mend it. The exit status is 1 if anything is."""
    parser = commands.add_parser("doctor", help="say what is wrong with this installation", description=text)
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    faults = []
    for title, findings in doctor.examine():
        print(title)
        for finding in findings:
            # Each line at once, because some take seconds.
            if isinstance(finding, Fault):
                faults.append(finding)
                print(f"  WRONG: {finding.what}", flush=True)
            else:
                print(f"  {finding}", flush=True)
    print("\nNothing is wrong." if not faults else "\nWhat to do:")
    for number, fault in enumerate(faults, 1):
        print(f"  {number}. {fault.what}\n     {fault.mend}")
    return 1 if faults else 0
