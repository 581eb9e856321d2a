"""Kernels written in PTX, for tests that need certain instructions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .device import Device
from .parse import parse
from .program import Program
from .results import Result

_SIZES = {"*": 8, "i32": 4, "i64": 8, "fp32": 4}
_LETTERS = {1: "h", 2: "h", 4: "r", 8: "d"}
_KINDS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
_KINDS |= {torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


def kernel(body: str, num_arguments: int, threads: int = 32) -> Program:
    """A kernel whose arguments are pointers, in %d0, %d1 and so on; %r0 is the thread's number.

    It has registers %p (predicates), %h (16 bits), %r (32 bits) and %d (64 bits), from 0 to 49.
    """
    params = ",\n".join(f"  .param .u64 kernel_param_{k}" for k in range(num_arguments))
    loads = "".join(f"  ld.param.b64 %d{k}, [kernel_param_{k}];\n" for k in range(num_arguments))
    return parse(f"""
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{params}
)
.reqntid {threads}
{{
  .reg .pred %p<50>;
  .reg .b16 %h<50>;
  .reg .b32 %r<50>;
  .reg .b64 %d<50>;
{loads}  mov.u32 %r0, %tid.x;
{body}
  ret;
}}
""")


def run(
    body: str,
    *arguments: Tensor,
    threads: int = 32,
    shared: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    device: Device | None = None,
) -> Result:
    """Run such a kernel."""
    kinds = [_KINDS[tensor.dtype] for tensor in arguments]
    program = kernel(body, len(arguments), threads)
    return (device or Device()).run(program, grid, shared, kinds, list[Any](arguments))


def at_thread(pointer: int, size: int) -> str:
    """%d40 becomes the address of this thread's element of an argument."""
    return f"mad.wide.u32 %d40, %r0, {size}, %d{pointer};"


def apply(instruction: str, *operands: Tensor, dtype: torch.dtype) -> Tensor:
    """The results of an instruction, of ``{d}`` and of operands ``{a}``, ``{b}`` and ``{c}``, one for each thread."""
    length = len(operands[0])
    assert length <= 1024
    out = torch.empty(length, dtype=dtype)
    lines, names = [], {"d": f"%{_LETTERS[dtype.itemsize]}20"}
    for k, (name, operand) in enumerate(zip("abc", operands)):
        size = operand.dtype.itemsize
        names[name] = f"%{_LETTERS[size]}{10 + k}"
        lines += [at_thread(k, size), f"ld.global.b{8 * size} {names[name]}, [%d40];"]
    size = dtype.itemsize
    lines += [instruction.format(**names), at_thread(len(operands), size)]
    lines.append(f"st.global.b{8 * size} [%d40], {names['d']};")
    result = run("\n".join(lines), *operands, out, threads=length, device=Device(strict=True))
    assert not result.reports, result.reports
    return out
