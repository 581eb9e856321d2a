"""Counts what kernels execute without a GPU: on the virtual GPU of a checkout's tests, which runs PTX.

ptxas says which line of PTX each machine instruction comes from: the instruction counts as often as that line ran. If
ptxas has unrolled a loop, the copies of its body share the line's count.
"""

from __future__ import annotations

import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from virtual_gpu import Device as Device  # type: ignore[import-not-found]
    from virtual_gpu import Result as Result
else:
    # A checkout has them; they are imported on first use.
    Device = Result = Any

TESTS = Path(__file__).parent.parent / "tests"
TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""What kernels are compiled for here."""
_LINE = re.compile(r'"\.nv_debug_ptx_txt", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_RESOURCES = re.compile(r"\bREG:(\d+) STACK:(\d+) .*?\bLOCAL:(\d+)")
# PTX and machine code have as many of these, unless ptxas has copied a loop.
_PAIRED_IN_PTX = ("ld.global", "st.global", "ld.shared", "st.shared", "atom.global", "shfl", "bar")
_PAIRED = re.compile(r"(LDG|STG|LDS|STS|ATOMG?|REDG?|SHFL|BAR|WARPSYNC)\b")


@contextlib.contextmanager
def counting_gpu(target: int) -> Iterator[Device]:
    """Within, the package's kernels run for a target, one CTA after the other, and every launch leaves a ``Result``.

    Raises:
        SystemExit: outside of a checkout.
    """
    if not (TESTS / "virtual_gpu").is_dir():
        raise SystemExit(f"this needs a checkout of the repository, for the virtual GPU in its folder tests: {TESTS}")
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from virtual_gpu import Device
    from virtual_gpu.harness import package_on  # type: ignore[import-not-found]

    device = Device(target, check=False, count=True, noise=False, shuffle=False, window=1, quantum=0)
    with package_on(device):
        yield device


class Machine(NamedTuple):
    """A kernel as the machine runs it."""

    code: tuple[tuple[int, str], ...]  # of each instruction the line of the PTX and the opcode
    registers: int  # of a thread
    spill_bytes: int  # of a thread, in memory


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
    if not (found := _RESOURCES.search(usage)):
        raise ValueError(f"no registers, stack and local memory in {usage!r}")
    registers, stack, local = map(int, found.groups())
    return Machine(instructions_of(text), registers, stack + local)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


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
    program, counts = result.program, result.counts["runs"]
    # How often each line of PTX ran, by its first instruction, and the basic block that it belongs to.
    targets = {int(row["target"]) for row, kind in zip(program.code, program.classes) if kind == "branch"}
    runs: dict[int, int] = {}
    blocks: dict[int, int] = {}
    block = 0
    for k, line in enumerate(program.lines):
        block += k in targets or (k > 0 and program.classes[k - 1] == "branch")
        runs.setdefault(line, int(counts[k]))
        blocks.setdefault(line, block)
    # How many copies the machine code has of each basic block, as far as that can be seen.
    in_ptx = Counter(line for line, kind in zip(program.lines, program.classes) if kind in _PAIRED_IN_PTX)
    in_code = Counter(line for line, opcode in machine.code if _PAIRED.match(opcode))
    ratios: defaultdict[int, list[float]] = defaultdict(list)
    for line in in_code.keys() & in_ptx.keys():
        ratios[blocks[line]].append(in_code[line] / in_ptx[line])
    copies = {block: max(1.0, statistics.median(found)) for block, found in ratios.items()}
    executed: defaultdict[str, float] = defaultdict(float)
    for line, opcode in machine.code:
        executed[opcode] += runs.get(line, int(counts[0])) / copies.get(blocks.get(line, -1), 1.0)
    return dict(executed)
