"""Ranking losses for the DETR family of Hugging Face transformers: one call on an existing model."""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "alrp_triton.integrations.transformers needs transformers and SciPy: pip install 'alrp-triton[transformers]'"
    ) from error

from ._calibrate import CalibrationReport, calibrate, collect, thresholds
from .detr import restore, use_alrp, use_ap, use_loss, use_ndcg, use_rank_sort
from .loss import DetrRankingLoss
from .trainer import RankingTrainer, SelfBalanceCallback

__all__ = [
    "CalibrationReport",
    "DetrRankingLoss",
    "RankingTrainer",
    "SelfBalanceCallback",
    "calibrate",
    "collect",
    "restore",
    "thresholds",
    "use_alrp",
    "use_ap",
    "use_loss",
    "use_ndcg",
    "use_rank_sort",
]
