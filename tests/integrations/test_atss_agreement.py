"""``alrp_triton.assigners.ATSS`` and MMDetection's ``ATSSAssigner`` choose the same anchors for the same objects."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmdet", reason="needs MMDetection: pip install '.[frameworks]'")
pytest.importorskip("torchvision", reason="needs torchvision: pip install '.[frameworks]'")

from mmdet.models.task_modules import AnchorGenerator, ATSSAssigner
from mmengine.structures import InstanceData

from alrp_triton.assigners import ATSS

NUM_IMAGES = 100
NUM_CLASSES = 80


def image(generator: torch.Generator) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Height and width, boxes and labels of up to 20 objects, of all sizes, some of them at the border or alike."""
    height, width = (int(n) for n in torch.randint(64, 400, (2,), generator=generator))
    count = int(torch.randint(21, (), generator=generator))
    limit = torch.tensor([width, height], dtype=torch.float32)
    sides = (4 * (limit / 4) ** torch.rand(count, 2, generator=generator)).minimum(limit)
    corners = (limit - sides) * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=1)
    if count > 2:
        boxes[1] = boxes[0]
        boxes[2] = boxes[2].round()
    return height, width, boxes, torch.randint(NUM_CLASSES, (count,), generator=generator)


@pytest.mark.parametrize(("scale", "scales_per_octave"), [(8, 1), (4, 2)])
def test_same_anchors_on_random_images(scale, scales_per_octave):
    anchors_of = AnchorGenerator(
        strides=[8, 16, 32, 64, 128], ratios=[1.0], octave_base_scale=scale, scales_per_octave=scales_per_octave
    )
    theirs, ours = ATSSAssigner(topk=9), ATSS(topk=9)
    generator = torch.Generator().manual_seed(0)
    num_objects = num_positives = num_empty = 0
    for _ in range(NUM_IMAGES):
        height, width, boxes, labels = image(generator)
        sizes = [(-(-height // stride[1]), -(-width // stride[0])) for stride in anchors_of.strides]
        levels = anchors_of.grid_priors(sizes, device="cpu")
        found = ours(levels, boxes)
        objects = InstanceData(bboxes=boxes, labels=labels)
        expected = theirs.assign(InstanceData(priors=torch.cat(levels)), [len(level) for level in levels], objects)

        assert torch.equal(found, expected.gt_inds - 1)
        positive = found >= 0
        assert torch.equal(labels[found[positive]], expected.labels[positive])
        assert (expected.labels[~positive] == -1).all()
        num_objects += len(boxes)
        num_positives += int(positive.sum())
        num_empty += not len(boxes)
    assert num_positives > 3 * num_objects > 2000
    assert num_empty > 0
