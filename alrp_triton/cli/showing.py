"""The command ``info``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import info
from .printing import print_table


def add_info(commands: Any) -> None:
    text = "Show versions, devices, backends, and the kernels' settings."
    parser = commands.add_parser("info", help="show versions, devices, backends and settings", description=text)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    found = info.collect()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    tuning = found["autotuning"]
    print_table("Versions", ["", ""], [[name, value or "-"] for name, value in found["versions"].items()])
    print_table("Devices", ["device", "name", "architecture", "memory"], map(_device_cells, found["devices"]))
    print_table("Backends", ["backend", "device", "available", ""], map(_backend_cells, found["backends"]))
    settings = [
        [architecture, kernel, _settings(chosen)]
        for architecture, kernels in found["settings"].items()
        for kernel, chosen in kernels.items()
    ]
    print_table("Pinned settings", ["architecture", "kernel", "settings"], settings)
    holds = f"{len(tuning['found'])} settings" if tuning["exists"] else "not there"
    print(f"Cache file: {tuning['cache_file']} ({holds})")
    print()
    if tuning["found"]:
        cells = [[key.replace("|", ", "), _settings(chosen)] for key, chosen in tuning["found"].items()]
        print_table("Found settings", ["kernel, device, dtype, logits", "settings"], cells)
    variables = [[name, value or "not set", info.ENVIRONMENT[name]] for name, value in found["environment"].items()]
    print_table("Environment", ["variable", "value", "meaning"], variables)
    return 0


def _device_cells(device: dict[str, Any]) -> list[str]:
    memory = "-" if device["memory"] is None else f"{device['memory'] / 2**30:.1f} GiB"
    return [device["device"], device["name"], device["architecture"], memory]


def _backend_cells(backend: dict[str, Any]) -> list[str]:
    remark = backend["reason"] or ("taken by auto" if backend["auto"] else "")
    return [backend["backend"], backend["device"], "yes" if backend["available"] else "no", remark]


def _settings(settings: dict[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
