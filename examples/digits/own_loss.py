"""A ranking loss of one's own: search cost, the bits that false positives cost someone who looks for an object.

Who reads a ranked list from its top and wants positive i passes rank(i) entries, and rank+(i) if no negative stood in
the way. To point at one entry among n takes log2(n) bits; the false positives cost log2(rank(i) / rank+(i)) of them.
One minus the precision, the error of AP Loss, is near 1 for a positive below ten false positives as for one below ten
thousand; this error keeps growing, by a bit for each doubling, so that hopeless positives are not given up.
"""

from __future__ import annotations

import math

from torch import Tensor

from alrp_triton.framework import Statistics


def search_cost(ranking: Statistics) -> Tensor:
    """l(i) = log2(rank(i) / rank+(i)), ``[P]``; its target is 0, and the loss is its mean over the positives."""
    return (ranking.num_false_positives / ranking.rank_positive).log1p() / math.log(2)
