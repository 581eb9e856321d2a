"""Sums in 64-bit fixed point: integers add up to the same bits in any order, on any number of threads or processes."""

from __future__ import annotations

# float32 numbers up to 1, scaled by a power of two, are exact in float32, and 2^17 of them in float64.
_MOST_BITS = 36


def fraction_bits(num_logits: int) -> int:
    """Bits after the binary point for numbers in [0, 1], so that ``num_logits`` of them sum without overflow.

    36 bits up to 67 million logits, 32 at a billion; a float32 logit near 4 has 22.
    """
    return min(_MOST_BITS, 62 - num_logits.bit_length())
