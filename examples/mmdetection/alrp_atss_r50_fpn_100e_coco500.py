# aLRP Loss with ATSS's own head and anchors, without its centre-ness. Not one of the published settings, which use
# RetinaNet's head, so that the learning rate is theirs and has not been searched.
_base_ = "./alrp_retinanet_r50_fpn_atss_100e_coco500.py"

model = dict(
    type="ATSS",
    neck=dict(add_extra_convs="on_output"),
    bbox_head=dict(
        type="RankingATSSHead",
        anchor_generator=dict(octave_base_scale=8, scales_per_octave=1),
        # A dict here, as in MMDetection's ATSS, keeps the centre-ness, in the loss and in the scores.
        loss_centerness=None,
    ),
    test_cfg=dict(nms=dict(iou_threshold=0.6)),
)
