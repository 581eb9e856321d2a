# aLRP Loss, RetinaNet with the assignment by IoU.
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./_base_/coco500.py"]

model = dict(
    bbox_head=dict(
        type="RankingRetinaHead",
        anchor_generator=dict(scales_per_octave=2),
        bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]),
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
)
optim_wrapper = dict(optimizer=dict(lr=0.008))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=100, by_epoch=True, milestones=[60, 80], gamma=0.1),
]
