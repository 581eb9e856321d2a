"""Machine code: what ptxas makes of a kernel's PTX, and how often a launch has executed each of its instructions.

The virtual GPU runs PTX. ptxas says which line of it each machine instruction comes from; that is how often it counts.
Where ptxas has unrolled a loop, the copies of its body share the line's count.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import tempfile
from collections import Counter, defaultdict
from functools import lru_cache
from typing import NamedTuple

from .virtual import Result

_LINE = re.compile(r'"\.nv_debug_ptx_txt", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_RESOURCES = {
    "registers": re.compile(r"\bREG:(\d+)"),
    "stack": re.compile(r"\bSTACK:(\d+)"),
    "local": re.compile(r"\bLOCAL:(\d+)"),
}
# What PTX and machine code have one for one, so that more of them in the machine code are copies.
_PAIRED_IN_PTX = ("ld.global", "st.global", "ld.shared", "st.shared", "atom.global", "shfl", "bar")
_PAIRED = re.compile(r"(LDG|STG|LDS|STS|ATOMG?|REDG?|SHFL|BAR|WARPSYNC)\b")


class Machine(NamedTuple):
    """A kernel as the machine runs it."""

    code: tuple[tuple[int, str], ...]
    """Of each instruction the line of the PTX and the opcode."""
    registers: int
    """Of a thread."""
    spill_bytes: int
    """Of a thread, in memory."""


@lru_cache(maxsize=256)
def assemble(ptx: str, target: int) -> Machine:
    """What Triton's own call of ptxas makes of PTX, for a target such as 90."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    backend = CUDABackend(GPUTarget("cuda", target, 32))
    cubin = backend.make_cubin(ptx, {}, backend.parse_options({}), target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(knobs.nvidia.nvdisasm.path, "-c", "-gp", file.name)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    resources = {name: _number(pattern, usage) for name, pattern in _RESOURCES.items()}
    return Machine(instructions_of(text), resources["registers"], resources["stack"] + resources["local"])


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    if not found:
        raise ValueError(f"no {pattern.pattern} in {text!r}")
    return int(found[1])


def instructions_of(disassembly: str) -> tuple[tuple[int, str], ...]:
    """Lines of PTX and opcodes, from what nvdisasm prints with ``-c -gp``; without padding."""
    line, found = 0, []
    for row in disassembly.splitlines():
        if at := _LINE.search(row):
            line = int(at[1])
        elif (instruction := _INSTRUCTION.search(row)) and not instruction[1].startswith("NOP"):
            found.append((line, instruction[1]))
    return tuple(found)


def executed(result: Result, machine: Machine) -> dict[str, float]:
    """How many warp instructions of each opcode a launch has executed. Copies of a loop make it fractions."""
    runs, blocks = _runs(result), _blocks(result)
    copies = _copies(result, machine, blocks)
    entry = int(result.counts["runs"][0])
    found: defaultdict[str, float] = defaultdict(float)
    for line, opcode in machine.code:
        found[opcode] += runs.get(line, entry) / copies.get(blocks.get(line, -1), 1.0)
    return dict(found)


def _runs(result: Result) -> dict[int, int]:
    """How often each line of PTX ran: its first instruction."""
    runs: dict[int, int] = {}
    for line, number in zip(result.program.lines, result.counts["runs"]):
        runs.setdefault(line, int(number))
    return runs


def _blocks(result: Result) -> dict[int, int]:
    """The number of the basic block that each line of PTX belongs to."""
    kinds, code = result.program.classes, result.program.code
    targets = {int(row["target"]) for row, kind in zip(code, kinds) if kind == "branch"}
    blocks: dict[int, int] = {}
    number = 0
    for k, line in enumerate(result.program.lines):
        if k in targets or (k and kinds[k - 1] == "branch"):
            number += 1
        blocks.setdefault(line, number)
    return blocks


def _copies(result: Result, machine: Machine, blocks: dict[int, int]) -> dict[int, float]:
    """How many copies the machine code has of each basic block, where that can be seen."""
    in_ptx = Counter(line for line, kind in zip(result.program.lines, result.program.classes) if kind in _PAIRED_IN_PTX)
    in_code = Counter(line for line, opcode in machine.code if _PAIRED.match(opcode))
    ratios: defaultdict[int, list[float]] = defaultdict(list)
    for line, number in in_code.items():
        if line in in_ptx:
            ratios[blocks[line]].append(number / in_ptx[line])
    return {block: max(1.0, statistics.median(found)) for block, found in ratios.items()}
