"""Ranking losses for RF-DETR: one call on its Lightning module, or one callback of its trainer.

    module = use_rank_sort(RFDETRModelModule(model_config, train_config))
    build_trainer(train_config, model_config).fit(module, RFDETRDataModule(model_config, train_config))

All decoder layers, the encoder and, in training, the groups of queries are ranked in one call, each as a group of its
own. RF-DETR's matcher, box and mask terms and their weights remain; :mod:`~..detr` describes the criterion.
:func:`calibrate` makes scores probabilities, so that the threshold of ``predict`` works again.
"""

from __future__ import annotations

try:
    import pytorch_lightning  # noqa: F401
    import rfdetr  # noqa: F401
except ImportError as error:
    raise ImportError(
        "alrp_triton.integrations.rfdetr needs RF-DETR with what it trains with: pip install 'alrp-triton[rfdetr]'"
    ) from error

from ._calibrate import CalibrationReport, calibrate, collect, thresholds
from .callback import RankingCallback
from .model import restore, use_alrp, use_ap, use_loss, use_ndcg, use_rank_sort

__all__ = [
    "CalibrationReport",
    "RankingCallback",
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
