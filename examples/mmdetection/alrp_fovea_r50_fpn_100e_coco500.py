# aLRP Loss, FoveaBox.
_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./_base_/coco500.py"]

model = dict(
    type="FOVEA",
    bbox_head=dict(
        _delete_=True,
        type="RankingFoveaHead",
        num_classes=80,
        in_channels=256,
        stacked_convs=4,
        feat_channels=256,
        strides=[8, 16, 32, 64, 128],
        base_edge_list=[16, 32, 64, 128, 256],
        scale_ranges=((1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)),
        sigma=0.4,
        with_deform=False,
        loss_cls=dict(
            type="ALRPLoss",
            delta=1.0,
            tau=0.5,
            box_error="giou",
            self_balance=dict(init=50.0, average="means"),
        ),
        loss_bbox=None,
    ),
    train_cfg=dict(_delete_=True),
    test_cfg=dict(
        _delete_=True,
        nms_pre=1000,
        score_thr=0.05,
        nms=dict(type="nms", iou_threshold=0.5),
        max_per_img=100,
    ),
)
optim_wrapper = dict(optimizer=dict(lr=0.008))
