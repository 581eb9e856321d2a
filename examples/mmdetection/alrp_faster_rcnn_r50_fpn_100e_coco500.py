# aLRP Loss in both stages of Faster R-CNN, neither of which samples.
_base_ = ["mmdet::_base_/models/faster-rcnn_r50_fpn.py", "./_base_/coco500.py"]

model = dict(
    rpn_head=dict(
        type="RankingRPNHead",
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(
            _delete_=True,
            type="ALRPLoss",
            delta=1.0,
            # The IoU from which an anchor is a positive here.
            tau=0.7,
            box_error="giou",
            self_balance=dict(init=50.0, average="means"),
            loss_weight=0.2,
        ),
        loss_bbox=None,
    ),
    roi_head=dict(
        bbox_head=dict(
            type="RankingShared2FCBBoxHead",
            loss_cls=dict(
                _delete_=True,
                type="ALRPLoss",
                delta=1.0,
                tau=0.5,
                box_error="giou",
                self_balance=dict(init=50.0, average="means"),
            ),
            loss_bbox=None,
        )
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(_delete_=True, type="PseudoSampler")),
        rcnn=dict(sampler=dict(_delete_=True, type="PseudoSampler")),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.012))
