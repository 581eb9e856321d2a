_base_ = "./alrp_retinanet_r50_fpn_atss_100e_coco500.py"

model = dict(backbone=dict(depth=101, init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet101")))
