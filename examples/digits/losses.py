"""What the demo can train with, by name: each puts its loss into torchvision's RetinaNet."""

from __future__ import annotations

from collections.abc import Callable

from own_loss import search_cost
from torchvision.models.detection import RetinaNet

from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.framework import RankingLoss
from alrp_triton.integrations.torchvision import use_ap, use_loss, use_ndcg, use_rank_sort

# On COCO the weight lasts an epoch of some thousands of iterations. In a run of some hundreds the losses change a lot
# within that: a short period follows them. In its first iterations loc is so near 0 that a mean of ratios would be
# theirs alone; the quotient of mean losses, as in the authors' code, is not.
BALANCE = {"period": 25, "average": "means"}

LOSSES: dict[str, Callable[[RetinaNet], RetinaNet]] = {
    "alrp": lambda model: use_loss(model, ALRPLoss(self_balance=SelfBalance(**BALANCE))),
    "rank-sort": use_rank_sort,
    # These leave the boxes to the detector's own L1 loss.
    "ap": use_ap,
    "ndcg": use_ndcg,
    "own": lambda model: use_loss(model, RankingLoss(search_cost)),
}
TITLES = {
    "alrp": "aLRP Loss",
    "rank-sort": "Rank & Sort Loss",
    "ap": "AP Loss",
    "ndcg": "NDCG Loss",
    "own": "a loss of one's own",
}
