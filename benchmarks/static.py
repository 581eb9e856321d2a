"""Compile every kernel without a GPU and read what the machine code costs: registers, spills, instructions.

    python -m benchmarks.static [--target sm_90] [--output FILE.json]

Instructions per logit are those of the whole kernel over the logits that one thread handles: an upper bound, since a
tile whose scores lie below every ramp jumps over most of them. Instructions per pair are those of the innermost loop.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from alrp_triton.kernels import (
    arrange,
    buckets,
    coefficients,
    configurations,
    errors,
    fused,
    gradient,
    knots,
    pairs,
    pairwise_count,
    pairwise_gradient,
    pairwise_positives,
    positives,
    ranks,
    sorting,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def sigmoid(x, delta):  # type: ignore[no-untyped-def]
    """A function to stand in the place of the ramp."""
    return 1 / (1 + tl.exp(-x / delta))


TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "collect": positives.collect_kernel,
    "order": positives.order_kernel,
    "buckets": buckets.bucket_kernel,
    "gradient": gradient.gradient_kernel,
    "pairwise_count": pairwise_count.pairwise_count_kernel,
    "pairwise_gradient": pairwise_gradient.pairwise_gradient_kernel,
    "positives": pairwise_positives.positives_kernel,
    "sorting_errors": sorting.errors_kernel,
    "sorting_received": sorting.received_kernel,
    "arrange": arrange.arrange_kernel,
    "knots": arrange.arrange_kernel,
    "table": arrange.table_kernel,
    "rank": ranks.ranks_kernel,
    "sums": ranks.sums_kernel,
    "running_max": ranks.sums_kernel,
    "coefficients": coefficients.coefficients_kernel,
    "send": coefficients.coefficients_kernel,
    "combine": gradient.combine_kernel,
    "errors": errors.errors_kernel,
    "interpolate": errors.interpolate_kernel,
    "finish": fused.finish_kernel,
    "own": fused.own_kernel,
}
OF_LEVELS = {
    "collect": positives.collect_levels_kernel,
    "buckets": buckets.bucket_levels_kernel,
    "gradient": gradient.gradient_levels_kernel,
}
"""The kernels that take several levels, as they do it."""
NUM_LEVELS = 5
# Without settings to choose from.
P_SIZED = {
    "order": positives.ORDER,
    "positives": {"block": 256, "num_warps": 4},
    "table": {"block_p": 256, "num_warps": 4},
    "combine": {"block": 256, "num_warps": 4},
    "own": {"block_p": 256, "num_warps": 4},
    **dict.fromkeys(("arrange", "knots", "rank", "sums", "running_max", "coefficients", "send"), knots.SETTINGS),
    **dict.fromkeys(("interpolate", "finish"), knots.SETTINGS),
    "errors": errors.MANY_SUMS,
}
VARIANTS = {
    "": tuple(KERNELS),
    "grouped": tuple(kernel for kernel in KERNELS if kernel not in ("collect", *P_SIZED)),
    "sigmoid": ("pairwise_count", "pairwise_gradient"),
    "levels": tuple(OF_LEVELS),
    "grouped levels": ("buckets", "gradient"),
}
"""The kernels that can be compiled with groups, with a function of one's own in the place of the ramp, or for a launch
over several levels."""
TRITON_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
# Of pass 2 of the pairwise form, in its innermost loop.
_POSITIVES_IN_TURN = pairwise_gradient.IN_TURN.value
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Figures(NamedTuple):
    """What one compiled kernel costs; None where the target does not tell."""

    target: str
    kernel: str
    variant: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int
    instructions: int | None
    per_logit: float | None
    per_pair: float | None


def compile_kernel(
    kernel: str,
    target: str,
    *,
    logits: torch.dtype = torch.float32,
    labels: str = "i64",
    per_class: bool = True,
    axes: int = 2,
    steps: int = 10,
    step_function: bool = False,
    variant: str = "",
    formula: str = "alrp_sorted",
) -> tuple[Any, dict[str, int]]:
    """Compile one kernel as a launch on contiguous logits would, with the settings pinned for the target, in one of the
    :data:`VARIANTS` (groups: one for each row of logits); ``formula`` is that of the fused steps.

    Returns:
        ``(compiled kernel, settings)``.
    """
    function = KERNELS[kernel]
    if variant == "sigmoid":
        function = pairs.with_function(function, sigmoid)
    several, grouped = variant.endswith("levels"), variant.startswith("grouped")
    compute = "fp64" if logits == torch.float64 else "fp32"
    plain = compute == "fp32" and variant in ("", "levels")
    settings = P_SIZED.get(kernel) or _pinned(kernel, target, variant, plain)
    if kernel == "collect":
        # A walk over labels, a row at a time.
        axes -= per_class
    constants: dict[str, Any] = (
        {name.upper(): value for name, value in settings.items() if name != "num_warps"}
        | {
            "AXES": axes,
            "CLASSES": 80 if per_class else 0,
            "COLUMNS": 80 if per_class else 0,
            "FLAT": axes == (2 if per_class else 1),
            "STEPS": steps,
            "INVERSE_WIDTH": 0.0 if step_function else 0.5,
            "SATURATE": TARGETS[target].backend == "cuda" and compute == "fp32",
            "CLOSE": plain and not step_function,
            "MAY_BE_CLOSE": plain and not step_function,
            "LARGEST": torch.finfo(torch.float64 if compute == "fp64" else torch.float32).max,
            # A launch turns arguments that are 1 into constants.
            "x_step0": 1,
            "g_step0": 1,
        }
        | ({"y_step1": 1} if per_class else {"y_step0": 1})
        | {"tile": None, "UNIT": 16}
        | {"GROUPED": grouped, "CUSTOM": variant == "sigmoid", "DELTA": 0.7}
        | {"BITS": 64 if compute == "fp64" else 32, "KIND": 4 * (kernel == "running_max")}
        | {"SENDS": kernel == "send", "EPS": 0.0}
        | (dict.fromkeys(("share", "spread", "pos_gradient")) if kernel == "coefficients" else {})
        | {"ORDERED": kernel == "knots"}
        | (dict.fromkeys(("slots", "found", "pos_index", "floors")) | {"pos_logits": None} if kernel == "knots" else {})
        | fused.constants_of(formula)[0]
        | fused.constants_of(formula)[1]
        | ({"z_step1": 1} if grouped else {"groups": None, "threshold_groups": None, "pos_groups": None})
        | ({} if grouped else {f"z_step{i}": 1 for i in range(4)})
    )
    pointers = {"logits": TRITON_DTYPES[logits], "gradient": TRITON_DTYPES[logits], "labels": labels, "totals": "i64"}
    pointers |= dict.fromkeys(("pos_index", "found", "slots"), "i64")
    pointers |= dict.fromkeys(("pos_gradient", "pos_weights", "errors", "received"), "fp64")
    pointers |= dict.fromkeys(("groups", "threshold_groups", "pos_groups"), "i64")
    pointers |= dict.fromkeys(
        ("thresholds", "floors", "levels", "slopes", "positives", "scaled", "bases", "pos_logits", "ious"), compute
    )
    pointers |= dict.fromkeys(("weights", "at_infinities", "scores"), compute)
    pointers |= dict.fromkeys(("begin", "end"), "i64")
    pointers |= dict.fromkeys(("unit", "values", "ranks", "poison", "sums", "coefficients", "rows"), "fp64")
    pointers |= dict.fromkeys(("share", "spread", "factors", "own"), "fp64")
    pointers |= dict.fromkeys(("first", "second", "factor", "pos_factor"), compute)
    pointers |= {"padded": compute, "sums": compute if kernel == "combine" else "fp64"}
    if kernel in ("coefficients", "send"):
        pointers["weights"] = "fp64"
    if kernel in ("errors", "finish"):
        pointers |= dict.fromkeys(("values", "ranks", "received", "coefficients"), compute)
        if formula == "rank_sort":
            pointers["received"] = "fp64"
        # There it is a number.
        del pointers["unit"]
    members: list[str] = []
    if several:
        one, function = function, OF_LEVELS[kernel]
        members = [name for name in one.arg_names if name not in (*function.arg_names, "tile")]
        constants["POINTERS"] = members.index("num_logits")
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes = {}

    def describe(place: tuple[int, ...], name: str) -> str:
        """Note an argument at a place in the signature, and return its type."""
        if name in constants:
            # Of several levels, what is 1 is left out.
            constexprs[place] = None if name in members else constants[name]
            return "constexpr"
        # As a launch finds of all usual numbers of logits, which several levels pass in units of their own.
        if name in pointers or (name == "num_logits" and not several):
            attributes[place] = [["tt.divisibility", 16]]
        return "*" + pointers[name] if name in pointers else "fp32" if name in ("scale", "unit") else "i32"

    for i, name in enumerate(function.arg_names):
        if name == "walks":
            columns = enumerate(["first_tile", *members])
            signature[name] = tuple(tuple(describe((i, j, k), x) for k in range(NUM_LEVELS)) for j, x in columns)
        else:
            signature[name] = describe((i,), name)
    source = ASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"num_warps": settings["num_warps"]}), settings


def _pinned(kernel: str, target: str, variant: str, plain: bool) -> configurations.Settings:
    if kernel.startswith("sorting"):
        kernel = "sorting"
    elif kernel.startswith("pairwise"):
        kernel += "" if plain else "_general"
    elif variant.startswith("grouped"):
        kernel += "_grouped"
    return configurations.pinned(kernel, target)


def figures(kernel: str, target: str, variant: str = "", **how: Any) -> Figures:
    """Compile one kernel and read its cost; see :func:`compile_kernel` for ``how``."""
    compiled, settings = compile_kernel(kernel, target, variant=variant, **how)
    registers, spill_bytes = _usage(compiled.asm)
    instructions = per_logit = per_pair = None
    if "cubin" in compiled.asm:
        code = _disassemble(compiled.asm["cubin"])
        instructions = len(code)
        threads = 32 * settings["num_warps"]
        if "block_p" in settings and kernel != "table":
            inner = _innermost(code)
            at_once = _POSITIVES_IN_TURN if kernel == "pairwise_gradient" else settings["block_p"]
            per_pair = inner and inner / (settings["block"] * at_once / threads)
        elif kernel in ("buckets", "gradient"):
            per_logit = instructions / (settings["block"] / threads)
    shared_bytes = compiled.metadata.shared
    return Figures(target, kernel, variant, registers, spill_bytes, shared_bytes, instructions, per_logit, per_pair)


def spilled(kernel: str, target: str, variant: str = "", **how: Any) -> int | None:
    """Compile one kernel and read how many bytes it spills, which is much quicker than all :func:`figures`."""
    return _usage(compile_kernel(kernel, target, variant=variant, **how)[0].asm)[1]


def _first(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def _usage(asm: Any) -> tuple[int | None, int | None]:
    """Registers, and bytes of local memory (spills)."""
    if "cubin" in asm:
        text = _of_cubin("-res-usage", asm["cubin"])
        return _first(r"REG:(\d+)", text), _first(r"LOCAL:(\d+)", text) + _first(r"STACK:(\d+)", text)
    if "amdgcn" in asm:
        spills = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", asm["amdgcn"])
        return _first(r"\.vgpr_count:\s+(\d+)", asm["amdgcn"]), 4 * sum(int(n) for n in spills)
    return None, None


@cache
def _disassemble(cubin: bytes) -> list[tuple[int, str]]:
    """The instructions as (address, text) without padding; takes longer than to compile them."""
    sass = _of_cubin("-sass", cubin)
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass)]
    return [(at, text) for at, text in code if not text.endswith("NOP")]


def _of_cubin(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BINARIES / "cuobjdump"), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def _innermost(code: list[tuple[int, str]]) -> int | None:
    """Instructions of the loop through which pairs go: the shortest (the one for close blocks) of those that hold no
    other loop and at least half as many float operations as any other; None where there is none."""
    jumps = [(at, re.search(r"BRA(?:\.U)?(?:\s+\S+,)?\s+`?\(?.*?0x([0-9a-f]+)", text)) for at, text in code]
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]
    bodies = [
        [text for at, text in code if begin <= at <= end]
        for begin, end in loops
        if not any(begin <= inner[0] and inner[1] <= end and inner != (begin, end) for inner in loops)
    ]
    found = [(sum(bool(re.match(r"(@\S+ )?[FD](ADD|FMA)", text)) for text in body), len(body)) for body in bodies]
    most = max((operations for operations, _ in found), default=0)
    return min((length for operations, length in found if 2 * operations >= most), default=None) if most else None


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, action="append", help="one of the targets (default: all)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    table = Table(*Figures._fields, title=f"triton {triton.__version__}, float32 logits, class labels, P = 512")
    rows = [
        figures(kernel, target, variant)
        for target in arguments.target or TARGETS
        for variant, kernels in VARIANTS.items()
        for kernel in kernels
    ]
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in row))
    Console(width=120).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
