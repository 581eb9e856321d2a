"""Ranking-based losses for object detection, exact in linear time.

aLRP Loss unifies classification and localisation in one loss with one hyperparameter: :func:`alrp_loss`,
:class:`ALRPLoss`. AP Loss, Rank & Sort Loss, APE Loss, NDCG Loss and your own losses (:mod:`alrp_triton.framework`) use
the same engine. The mathematics is in docs/mathematics.md.
"""

from pathlib import Path as _Path

# In a checkout, kernels/ and benchmarks/ lie beside this folder.
if (_Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(_Path(__file__).parents[1]))

from . import framework
from .compiling import warm_up
from .losses import (
    ALRPLoss,
    ALRPLossOutput,
    APELoss,
    APLoss,
    NDCGLoss,
    RankSortLoss,
    RankSortLossOutput,
    RankSortOutput,
    alrp_loss,
    ap_loss,
    ape_loss,
    ndcg_loss,
    rank_sort_loss,
)
from .losses.self_balance import SelfBalance
from .positives import at_positives

__version__ = "0.1.0"
"""Of the package, by Semantic Versioning."""
__all__ = [
    "ALRPLoss",
    "ALRPLossOutput",
    "APELoss",
    "APLoss",
    "NDCGLoss",
    "RankSortLoss",
    "RankSortLossOutput",
    "RankSortOutput",
    "SelfBalance",
    "__version__",
    "alrp_loss",
    "ap_loss",
    "ape_loss",
    "at_positives",
    "framework",
    "ndcg_loss",
    "rank_sort_loss",
    "warm_up",
]
