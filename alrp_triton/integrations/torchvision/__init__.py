"""Ranking losses for torchvision's detectors: one call on an existing model, nothing patched globally."""

from .retinanet import use_alrp, use_ap, use_classification_loss, use_ndcg, use_rank_sort

__all__ = ["use_alrp", "use_ap", "use_classification_loss", "use_ndcg", "use_rank_sort"]
