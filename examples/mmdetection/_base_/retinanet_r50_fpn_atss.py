# RetinaNet with ATSS's assignment and square anchors of as many scales as scales_per_octave says, without centre-ness.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"

model = dict(
    bbox_head=dict(
        type="RankingRetinaHead",
        anchor_generator=dict(scales_per_octave=2, ratios=[1.0]),
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(
            _delete_=True,
            type="ALRPLoss",
            delta=1.0,
            tau=0.5,
            box_error="giou",
            # The average that the authors' code takes; the paper's is "ratios".
            self_balance=dict(init=50.0, average="means"),
        ),
        loss_bbox=None,
    ),
    train_cfg=dict(assigner=dict(_delete_=True, type="ATSSAssigner", topk=9)),
)
