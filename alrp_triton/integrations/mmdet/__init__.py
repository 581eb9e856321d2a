"""Ranking losses for MMDetection 3.x: losses, heads and a hook for configuration files.

    custom_imports = dict(imports=["alrp_triton.integrations.mmdet"], allow_failed_imports=False)
    custom_hooks = [dict(type="SelfBalanceHook")]
    head = dict(type="RankingRetinaHead", loss_cls=dict(_delete_=True, type="ALRPLoss"), loss_bbox=None)
    model = dict(bbox_head=head)

Importing this module registers, in MMDetection's ``MODELS``,

- the losses ``ALRPLoss``, ``RankSortLoss``, ``APLoss`` and ``NDCGLoss``, see :mod:`.criteria`;
- the heads ``RankingRetinaHead``, ``RankingATSSHead``, ``RankingFoveaHead``, ``RankingRPNHead`` and
  ``RankingShared2FCBBoxHead``: MMDetection's heads with a loss that ranks all levels and images together;

and ``SelfBalanceHook`` and ``StatisticsHook`` in MMEngine's ``HOOKS``. The mixins make ranking heads from other heads.
MMDetection's own heads and losses do not change.

:func:`calibrate` makes scores probabilities, so that ``score_thr`` works again, and :func:`thresholds` gives the best
score threshold of each class. Both ask the model about validation data by :func:`collect`.
"""

try:
    import mmcv.ops  # noqa: F401  (mmdet.models asks for it in places that name it less clearly)
    import mmdet.models  # noqa: F401
except ImportError as error:
    raise ImportError(
        "alrp_triton.integrations.mmdet needs MMDetection 3.x, by pip install 'alrp-triton[mmdet]', and mmcv with its "
        f"compiled operators, by its own installer; importing them failed: {error}"
    ) from error

from .bbox import RankingBBoxMixin, RankingShared2FCBBoxHead
from .calibrating import CalibrationReport, calibrate, collect, thresholds
from .criteria import ALRPLoss, APLoss, NDCGLoss, RankingCriterion, RankSortLoss
from .dense import RankingAnchorMixin, RankingATSSHead, RankingRetinaHead, RankingRPNHead
from .fovea import RankingFoveaHead
from .hooks import SelfBalanceHook, StatisticsHook

__all__ = [
    "ALRPLoss",
    "APLoss",
    "CalibrationReport",
    "NDCGLoss",
    "RankSortLoss",
    "RankingATSSHead",
    "RankingAnchorMixin",
    "RankingBBoxMixin",
    "RankingCriterion",
    "RankingFoveaHead",
    "RankingRPNHead",
    "RankingRetinaHead",
    "RankingShared2FCBBoxHead",
    "SelfBalanceHook",
    "StatisticsHook",
    "calibrate",
    "collect",
    "thresholds",
]
