# aLRP Loss, RetinaNet with ATSS's assignment.
_base_ = ["./_base_/retinanet_r50_fpn_atss.py", "./_base_/coco500.py"]

optim_wrapper = dict(optimizer=dict(lr=0.008))
