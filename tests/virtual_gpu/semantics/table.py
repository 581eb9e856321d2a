"""The table of the instructions that compute, and the C code made of it.

A type is a letter and a number of bits: ``u``, ``s`` and ``f`` for integers and floats; ``p`` is a predicate, which
holds 0 or all ones in 32 bits. An expression names its operands a, b, c and e; that of a predicate is 0 or 1.
"""

from __future__ import annotations

from dataclasses import dataclass

OPERANDS = "abce"
"""The names of operands in expressions, which are those of fields of an instruction (d is the destination)."""
FIRST_NUMBER = 100
"""Instructions that compute are numbered from here on; the others are ``layout.Op``."""


@dataclass(frozen=True)
class Rule:
    """What an instruction computes."""

    destination: str
    sources: tuple[str, ...]
    expression: str


RULES: dict[str, Rule] = {}


def rule(names: str, destination: str, sources: str, expression: str) -> None:
    """Define instructions, named with all their modifiers, that mean the same."""
    for name in names.split():
        RULES[name] = Rule(destination, tuple(sources.split()), expression)


def width_of(kind: str) -> int:
    """Bits of a register of a type."""
    return 32 if kind == "p" else int(kind[1:])


def _c_type(kind: str) -> str:
    return "u32_t" if kind == "p" else f"{kind}_t"


def _case(number: int, names: list[str], rule: Rule) -> str:
    operands = list(zip(OPERANDS, rule.sources))
    pointers = "".join(f"    const {_c_type(kind)} *at_{x} = AT(i->{x});\n" for x, kind in operands)
    loads = "".join(f"      {_c_type(kind)} {x} = at_{x}[l];\n" for x, kind in operands)
    destination = _c_type(rule.destination)
    value = f"-(u32_t)({rule.expression})" if rule.destination == "p" else f"({destination})({rule.expression})"
    return (
        f"  case {number}: {{  // {', '.join(names)}\n"
        f"    {destination} *d = into;\n{pointers}"
        f"    LANES {{\n{loads}      d[l] = {value};\n    }}\n    break;\n  }}\n"
    )


def generate(rules: dict[str, Rule]) -> tuple[dict[str, int], str]:
    """Number the instructions, those of one meaning alike, and write the cases of the engine's switch."""
    names: dict[Rule, list[str]] = {}
    for name, meaning in rules.items():
        names.setdefault(meaning, []).append(name)
    numbers: dict[str, int] = {}
    cases = []
    for number, (meaning, alike) in enumerate(names.items(), FIRST_NUMBER):
        numbers |= dict.fromkeys(alike, number)
        cases.append(_case(number, alike, meaning))
    return numbers, "".join(cases)
