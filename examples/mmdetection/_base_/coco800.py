# COCO on images of about 800 pixels, 100 epochs on 4 GPUs with 4 images each.
_base_ = "./coco500.py"

train_pipeline = _base_.train_pipeline
train_pipeline[5] = dict(type="Resize", scale=(800, 800), keep_ratio=False)
test_pipeline = _base_.test_pipeline
test_pipeline[1] = dict(type="Resize", scale=(1333, 800), keep_ratio=True)

train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=100, by_epoch=True, milestones=[60, 80], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=16)
