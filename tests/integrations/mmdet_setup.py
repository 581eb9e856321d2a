"""What the tests of the MMDetection integration share: a small data set, and the example configurations made small."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData

import alrp_triton.integrations.mmdet  # noqa: F401  (registers the heads)

EXAMPLES = Path(__file__).parents[2] / "examples" / "mmdetection"
CLASSES = ("red", "green", "blue")
SIZES = [(96, 80), (64, 96), (96, 96), (80, 64), (96, 64), (72, 96)]
NUM_IMAGES = len(SIZES)


def write_coco(folder: Path) -> None:
    """Coloured rectangles on noise, of other sizes from image to image; the last has none, and one a crowd."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, annotations = [], []
    for index, (width, height) in enumerate(SIZES):
        image = rng.integers(0, 40, (height, width, 3))
        for _ in range(2 if index < NUM_IMAGES - 1 else 0):
            category = int(rng.integers(3))
            w, h = (int(side) for side in rng.integers(16, 40, 2))
            x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
            image[y : y + h, x : x + w, 2 - category] = 230  # files are read as BGR
            annotation = {"image_id": index, "category_id": category, "bbox": [x, y, w, h], "area": w * h}
            annotations.append({**annotation, "id": len(annotations) + 1, "iscrowd": 0})
        if index == 0:
            annotations[-1]["iscrowd"] = 1
        name = f"{index}.png"
        mmcv.imwrite(image.astype(np.uint8), str(folder / "images" / name))
        images.append({"id": index, "file_name": name, "width": width, "height": height})
    categories = [{"id": index, "name": name} for index, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


@functools.cache
def example(name: str) -> Config:
    """An example configuration as it is in the file; not to be changed."""
    return Config.fromfile(EXAMPLES / f"{name}.py")


def small_config(name: str, data: Path, work: Path, *, epochs: int, augment: bool = True) -> Config:
    """An example configuration, smaller: its network, its images, its data set, the length of its training."""
    config = copy.deepcopy(example(name))
    model = config.model
    model.backbone.update(depth=18, base_channels=8, stem_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    if "roi_head" in model:
        model.rpn_head.update(in_channels=16, feat_channels=16)
        model.roi_head.bbox_roi_extractor.out_channels = 16
        model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=len(CLASSES))
        model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    else:
        # The normalisation of ATSS has 32 groups.
        model.bbox_head.update(in_channels=16, feat_channels=32, stacked_convs=1, num_classes=len(CLASSES))

    source = {
        "data_root": str(data) + "/",
        "ann_file": "annotations.json",
        "data_prefix": {"img": "images/"},
        "metainfo": {"classes": CLASSES},
    }
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        loader.dataset.update(source)
        for step in loader.dataset.pipeline:
            if step.type == "Resize":
                step.scale = (96, 96)
    # The image without objects takes part.
    config.train_dataloader.dataset.filter_cfg = None
    if not augment:
        steps = config.train_dataloader.dataset.pipeline
        config.train_dataloader.dataset.pipeline = [steps[0], steps[1], steps[5], steps[7]]
    for evaluator in (config.val_evaluator, config.test_evaluator):
        evaluator.ann_file = str(data / "annotations.json")
    config.train_cfg.update(max_epochs=epochs, val_interval=epochs)
    config.param_scheduler[0].end = 3
    config.default_hooks.logger.interval = 1
    config.work_dir = str(work)
    config.experiment_name = work.name
    config.randomness = {"seed": 0}
    config.log_level = "ERROR"
    return config


def instances(boxes: list[list[float]], labels: list[int]) -> InstanceData:
    """The objects of an image."""
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), labels=torch.tensor(labels, dtype=torch.long)
    )


def img_meta(height: int, width: int, **more: Any) -> dict[str, Any]:
    """Of an image of this size."""
    return {"img_shape": (height, width), "pad_shape": (height, width), "scale_factor": (1.0, 1.0), **more}


def drawn_batch(objects: tuple[Any, ...] = ((10, 8, 40, 44), (30, 40, 60, 62)), size: int = 64) -> dict[str, list[Any]]:
    """Two images of other sizes, in the second of which there is nothing; bright objects."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randint(40, (3, size, width), generator=generator, dtype=torch.uint8) for width in (size, 48)]
    samples = []
    for image, boxes in zip(inputs, (objects, ())):
        for index, box in enumerate(boxes):
            x1, y1, x2, y2 = (int(side) for side in box)
            image[index, y1:y2, x1:x2] = 230
        shape = tuple(image.shape[1:])
        sample = DetDataSample(metainfo=img_meta(*shape, ori_shape=shape))
        sample.gt_instances = instances([list(box) for box in boxes], list(range(len(boxes))))
        sample.ignored_instances = instances([], [])
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def logged(runner: Any, name: str) -> list[float]:
    """What the runner logged under this name, iteration by iteration."""
    return runner.message_hub.get_scalar(f"train/{name}").data[0].tolist()
