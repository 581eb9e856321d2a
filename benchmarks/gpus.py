"""What the model assumes of each GPU (:mod:`.model`): one table, with where each number is from.

``published`` is what the vendor says of the product. Whatever is ``assumed`` is a guess: nobody measured it here.
"""

from __future__ import annotations

from typing import NamedTuple

PUBLISHED, ASSUMED = "published", "assumed"


class Number(NamedTuple):
    """A number and where it is from."""

    value: float
    source: str

    def __str__(self) -> str:
        return f"{self.value:g} {self.source}"


class GPU(NamedTuple):
    """What a time is computed from."""

    counts_of: str
    """The target whose counts are taken."""
    processors: Number
    """Multiprocessors, or compute units."""
    gigahertz: Number
    """Of the processors, and of the L2 cache."""
    issued: Number
    """Instructions of 32 lanes that a processor begins in a clock."""
    sectors: Number
    """Of 32 bytes, that a processor loads or stores in a clock."""
    terabytes: Number
    """A second, read and written, of a large copy."""
    atomics: Number
    """Of 64 bits on different words of the L2 cache, in a clock of the whole GPU."""
    atomics_of_a_word: Number
    """Of 64 bits on one word, in a clock."""
    clocks_alone: Number
    """That a CTA with a processor for itself takes for each instruction of a warp: it waits for its own results."""
    launch_microseconds: Number
    """From the end of a kernel to where the next one, launched before, does something."""


GPUS = {
    "A100": GPU(
        counts_of="sm_80",
        processors=Number(108, PUBLISHED),
        gigahertz=Number(1.41, PUBLISHED),
        issued=Number(4, PUBLISHED),
        sectors=Number(4, ASSUMED),
        # 80 GB; nine tenths of the published 2.04.
        terabytes=Number(1.8, ASSUMED),
        atomics=Number(80, ASSUMED),
        atomics_of_a_word=Number(1, ASSUMED),
        clocks_alone=Number(2, ASSUMED),
        launch_microseconds=Number(1.5, ASSUMED),
    ),
    "H100": GPU(
        counts_of="sm_90",
        processors=Number(132, PUBLISHED),
        # Below the highest that is published, as under load.
        gigahertz=Number(1.7, ASSUMED),
        issued=Number(4, PUBLISHED),
        sectors=Number(4, ASSUMED),
        # Nine tenths of the published 3.35.
        terabytes=Number(3.0, ASSUMED),
        atomics=Number(96, ASSUMED),
        atomics_of_a_word=Number(1, ASSUMED),
        clocks_alone=Number(2, ASSUMED),
        launch_microseconds=Number(1.5, ASSUMED),
    ),
    "H200": GPU(
        counts_of="sm_90",
        processors=Number(132, PUBLISHED),
        gigahertz=Number(1.7, ASSUMED),
        issued=Number(4, PUBLISHED),
        sectors=Number(4, ASSUMED),
        # Nine tenths of the published 4.8.
        terabytes=Number(4.3, ASSUMED),
        atomics=Number(96, ASSUMED),
        atomics_of_a_word=Number(1, ASSUMED),
        clocks_alone=Number(2, ASSUMED),
        launch_microseconds=Number(1.5, ASSUMED),
    ),
    "B200": GPU(
        counts_of="sm_100",
        processors=Number(148, ASSUMED),
        gigahertz=Number(1.8, ASSUMED),
        issued=Number(4, ASSUMED),
        sectors=Number(4, ASSUMED),
        # Nine tenths of the published 8.
        terabytes=Number(7.2, ASSUMED),
        atomics=Number(128, ASSUMED),
        atomics_of_a_word=Number(1, ASSUMED),
        clocks_alone=Number(2, ASSUMED),
        launch_microseconds=Number(1.5, ASSUMED),
    ),
    "MI300X": GPU(
        # A stand-in: what AMD's compiler makes of the kernels is not counted.
        counts_of="sm_90",
        processors=Number(304, PUBLISHED),
        gigahertz=Number(2.1, PUBLISHED),
        # Four units of 16 lanes, each of which takes four clocks for 64 lanes.
        issued=Number(2, PUBLISHED),
        sectors=Number(2, ASSUMED),
        # Eight tenths of the published 5.3.
        terabytes=Number(4.2, ASSUMED),
        atomics=Number(128, ASSUMED),
        atomics_of_a_word=Number(0.5, ASSUMED),
        clocks_alone=Number(4, ASSUMED),
        launch_microseconds=Number(4, ASSUMED),
    ),
}
STAND_INS = {"MI300X": "sm_90's counts stand in for MI300X's"}


def named(device: str) -> str | None:
    """The entry of :data:`GPUS` for what PyTorch calls a device."""
    return next((name for name in GPUS if name in device), None)
