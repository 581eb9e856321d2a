"""A virtual GPU for Triton: runs the PTX that it compiles, on tensors of the CPU, and checks and counts.

It executes kernels instruction by instruction, and finds accesses out of bounds, races, wrong barriers and the like.
Not modelled are tensor cores, asynchronous copies, clusters, local memory and calls (:class:`Unsupported` is raised),
time, and weak memory: accesses come in one order. Approximate instructions give exact results, rounded.

Importing it needs neither Triton nor a C compiler.
"""

from __future__ import annotations

from .compiling import Compilation, Compiled, compiling_for
from .device import Device
from .driver import virtual_gpu
from .engine import NoCompiler
from .harness import on_virtual_gpu
from .program import Unsupported, classes
from .reports import ERRORS, KINDS, Fault
from .results import Result

__all__ = [
    "ERRORS",
    "KINDS",
    "Compilation",
    "Compiled",
    "Device",
    "Fault",
    "NoCompiler",
    "Result",
    "Unsupported",
    "classes",
    "compiling_for",
    "on_virtual_gpu",
    "virtual_gpu",
]
