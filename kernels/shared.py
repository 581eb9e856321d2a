"""What a program keeps in shared memory, on NVIDIA's GPUs: a table of sums, and the thresholds with their grid.

Triton has neither atomics nor random reads of shared memory, so both are written in PTX here. Hundreds of programs that
add to the same words of global memory wait for one another; lanes of one program hardly do. Shared memory adds 32 bits
at once, so a 64-bit word is two of these, and what the lower sum carries goes to the upper one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

MOST_WORDS = 2048
"""How many words a table has. The sizes below follow from it: 2,048 thresholds, and 4 cells for each of these."""
_MOST_WORDS = tl.constexpr(MOST_WORDS)
_LAST = tl.constexpr(MOST_WORDS - 1)
_MOST_CELLS = tl.constexpr(4 * MOST_WORDS)


@triton.jit
def declare(SEARCH: tl.constexpr):
    """Once in a kernel, before all else of this module."""
    run("mov.u32 $0, $1; .shared .align 4 .b8 alrp_words[16384];", "=r,r", tl.program_id(0))
    if SEARCH:
        run(
            "mov.u32 $0, $1; .shared .align 4 .b8 alrp_thresholds[8192]; .shared .align 4 .b8 alrp_cells[16384];",
            "=r,r",
            tl.program_id(0),
        )


@triton.jit
def run(PTX: tl.constexpr, OPERANDS: tl.constexpr, first):
    """Execute PTX for each lane, for what it does; it has to set a result."""
    tl.inline_asm_elementwise(PTX, OPERANDS, [first], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def clear_words(BLOCK: tl.constexpr):
    """Set all words to 0."""
    for first in range(0, _MOST_WORDS, BLOCK):
        run(
            """{ .reg .b32 at; .reg .pred in; mov.u32 at, alrp_words; mad.lo.u32 at, $1, 4, at;
            setp.lt.s32 in, $1, 2048; @in st.shared.b32 [at], 0; @in st.shared.b32 [at + 8192], 0; mov.u32 $0, 0; }""",
            "=r,r",
            first + tl.arange(0, BLOCK),
        )


@triton.jit
def add_to_words(index, value, mask):
    """Add each lane's 64-bit integer to the word of its index."""
    tl.inline_asm_elementwise(
        """{ .reg .b32 at, low, high, old, sum; .reg .pred in, carries; setp.ne.s32 in, $3, 0;
        mov.u32 at, alrp_words; mad.lo.u32 at, $1, 4, at; mov.b64 {low, high}, $2;
        @in atom.shared.add.u32 old, [at], low; add.u32 sum, old, low; setp.lt.u32 carries, sum, low;
        @carries add.u32 high, high, 1; @in red.shared.add.u32 [at + 8192], high; mov.u32 $0, 0; }""",
        "=r,r,l,r",
        [index, value, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_one_to_words(index, value):
    """Add a 64-bit integer to a word."""
    # A lane for each thread, of which the first adds.
    thread = tl.arange(0, num_threads())
    add_to_words(index + 0 * thread, value + 0 * thread.to(tl.int64), thread == 0)


@triton.jit
def store_words(pointers, number, BLOCK: tl.constexpr):
    """Store so many words from a pointer on."""
    for first in range(0, number, BLOCK):
        index = first + tl.arange(0, BLOCK)
        word = tl.inline_asm_elementwise(
            """{ .reg .b32 at, low, high; .reg .pred in; mov.u32 at, alrp_words; mad.lo.u32 at, $1, 4, at;
            setp.lt.s32 in, $1, 2048; mov.u32 low, 0; mov.u32 high, 0;
            @in ld.shared.b32 low, [at]; @in ld.shared.b32 high, [at + 8192]; mov.b64 $0, {low, high}; }""",
            "=l,r",
            [index],
            dtype=tl.int64,
            is_pure=False,
            pack=1,
        )
        tl.store(pointers + index, word, mask=index < number)


@triton.jit
def copy_search(thresholds, cells, num_cells, BLOCK: tl.constexpr):
    """Copy -inf and the thresholds after it, NaN beyond them; and the cells, which hold numbers of thresholds."""
    num_thresholds = num_cells // 4 - 2
    for first in range(0, _MOST_WORDS, BLOCK):
        i = first + tl.arange(0, BLOCK)
        threshold = tl.load(thresholds + i - 1, mask=(i > 0) & (i <= num_thresholds), other=float("nan"))
        tl.inline_asm_elementwise(
            """{ .reg .b32 at; .reg .pred in; mov.u32 at, alrp_thresholds; mad.lo.u32 at, $1, 4, at;
            setp.lt.s32 in, $1, 2048; @in st.shared.f32 [at], $2; mov.u32 $0, 0; }""",
            "=r,r,f",
            [i, tl.where(i == 0, float("-inf"), threshold)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    for first in range(0, num_cells, BLOCK):
        i = first + tl.arange(0, BLOCK)
        cell = tl.load(cells + i, mask=i < num_cells, other=0)
        tl.inline_asm_elementwise(
            """{ .reg .b32 at; .reg .b16 half; .reg .pred in; mov.u32 at, alrp_cells; mad.lo.u32 at, $1, 2, at;
            setp.lt.s32 in, $1, 8192; cvt.u16.u32 half, $2; @in st.shared.u16 [at], half; mov.u32 $0, 0; }""",
            "=r,r,r",
            [i, cell],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def threshold_at(index):
    """The threshold before each place; -inf before the first."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 at; mov.u32 at, alrp_thresholds; mad.lo.u32 at, $1, 4, at; ld.shared.f32 $0, [at]; }",
        "=f,r",
        [tl.minimum(index, _LAST)],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def number_before(cell):
    """The number of thresholds before a cell."""
    return tl.inline_asm_elementwise(
        """{ .reg .b32 at; .reg .b16 half; mov.u32 at, alrp_cells; mad.lo.u32 at, $1, 2, at;
        ld.shared.u16 half, [at]; cvt.u32.u16 $0, half; }""",
        "=r,r",
        [cell],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
