"""The engine: exact ranking statistics and ranking gradients in linear time. It knows no particular loss.

The data's way: :mod:`.inputs` checks what came, :mod:`.positives` finds the P positives, :mod:`.knots` sorts their
ramps, a backend from :mod:`.backends` reads every logit once (pass 1), :mod:`.ranking` turns that into per-positive
statistics, the loss makes per-positive values and weights of them, and pass 2 writes every logit's gradient in
backward. :mod:`.operators` registers what touches M-sized data with PyTorch. Where the kernels know a loss's formula by
name, :mod:`.fused` goes the same way in one operator.
"""

from .inputs import Levels, check_inputs
from .pairs import PairFunction
from .ranking import Ranking, Statistics

__all__ = ["Levels", "PairFunction", "Ranking", "Statistics", "check_inputs"]
