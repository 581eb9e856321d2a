"""A calibration in the last layer of MMDetection's RetinaNet."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("mmdet")

from mmdet_heads import METAS, STRIDES, C, anchor_head
from mmengine.config import ConfigDict

from alrp_triton.calibration import Affine, Calibration, fold

KEEP_ALL = ConfigDict(
    nms_pre=10**6, min_bbox_size=-1, score_thr=0.0, nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=10**6
)


def test_scores_of_a_head_are_the_calibrated_ones() -> None:
    torch.manual_seed(0)
    head = anchor_head("RankingRetinaHead").double().eval()
    head.retina_cls.weight.data.normal_(std=0.2)
    features = [torch.randn(3, 8, 64 // stride, 64 // stride, dtype=torch.float64) for stride in STRIDES]
    own = Calibration(Affine(0.5, 1.0), {0: Affine(0.2, 3.0), 2: Affine(0.7, -2.0)})

    def detect():
        with torch.no_grad():
            return head.predict_by_feat(*head(features), batch_img_metas=METAS, cfg=KEEP_ALL)

    before = detect()
    fold(own, head.retina_cls, C, range(C))
    for old, new in zip(before, detect(), strict=True):
        expected = own(old.scores, old.labels)
        for label in range(C):
            mine = old.labels == label
            assert mine.any()
            found = new.scores[new.labels == label]
            torch.testing.assert_close(expected[mine].sort()[0], found.sort()[0], rtol=1e-9, atol=0)
