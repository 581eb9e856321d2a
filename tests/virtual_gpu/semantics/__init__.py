"""What each PTX instruction that only computes means: the types of its operands, and one C expression of them.

The engine's switch over instructions is generated from this table.
"""

from __future__ import annotations

from . import conversions, floats, halves, integers
from .table import RULES, Rule, generate, width_of

__all__ = ["RULES", "Rule", "generate", "width_of"]

for part in (integers, floats, halves, conversions):
    part.define()

NUMBERS, CASES = generate(RULES)
"""The number of each instruction, and the cases of the switch."""
