"""The losses, each with its formula, its function and its module."""

from .alrp import ALRPLoss, alrp_loss
from .ap import APLoss, ap_loss
from .ape import APELoss, ape_loss
from .ndcg import NDCGLoss, ndcg_loss
from .outputs import ALRPLossOutput, RankSortLossOutput, RankSortOutput
from .rank_sort import RankSortLoss, rank_sort_loss

__all__ = [
    "ALRPLoss",
    "ALRPLossOutput",
    "APELoss",
    "APLoss",
    "NDCGLoss",
    "RankSortLoss",
    "RankSortLossOutput",
    "RankSortOutput",
    "alrp_loss",
    "ap_loss",
    "ape_loss",
    "ndcg_loss",
    "rank_sort_loss",
]
