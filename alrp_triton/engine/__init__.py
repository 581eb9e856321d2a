"""The engine: exact ranking statistics and ranking gradients in linear time. It knows no particular loss.

The data's way: :mod:`.inputs` checks what came; :mod:`.counted` has the P positives found, placed (:mod:`.placed`,
:mod:`.knots`), and every negative counted; :mod:`.ranking` is what a loss's formula sees of them; what it makes of that
is sent; and in backward every logit's gradient is written. The :mod:`.passes` find, count and write; :mod:`.operators`
registers with PyTorch what it is to see as a whole.
"""

from . import passes
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
    "passes",
]
