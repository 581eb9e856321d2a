"""The engine: exact ranking statistics and ranking gradients in linear time, independent of the loss.

The steps in order: :mod:`.inputs` checks the arguments. :mod:`.counted` finds the P positives, places them
(:mod:`.placed`, :mod:`.knots`) and counts every negative. The formula of a loss reads a :mod:`.ranking`; its result is
sent. Backward writes the gradient of every logit. The :mod:`.passes` find, count and write. :mod:`.operators` registers
operators with PyTorch.
"""

from . import doubts, passes
from .counted import Counted, Evaluated, attach_whole
from .inputs import Levels, check_inputs
from .pairs import PairFunction
from .ranking import Ranking, Statistics

__all__ = [
    "Counted",
    "Evaluated",
    "Levels",
    "PairFunction",
    "Ranking",
    "Statistics",
    "attach_whole",
    "check_inputs",
    "doubts",
    "passes",
]
