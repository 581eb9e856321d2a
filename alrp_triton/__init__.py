"""Ranking-based losses for object detection, exact in linear time.

One loss for classification and localisation, one hyperparameter, no weights to tune. See :func:`alrp_loss` and
:class:`ALRPLoss`; the mathematics is in docs/mathematics.md.
"""

from .balance import SelfBalance
from .losses import ALRPLoss, ALRPLossOutput, alrp_loss

__version__ = "0.1.0"
__all__ = ["ALRPLoss", "ALRPLossOutput", "SelfBalance", "__version__", "alrp_loss"]
