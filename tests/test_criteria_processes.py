"""Rankings of images in several processes: no image of one is ranked with one of another."""

import pytest
import torch
from dialect.processes import MARKS, SIZE

from alrp_triton import APLoss
from alrp_triton.integrations._criteria import image_of_each, losses_of

pytestmark = MARKS


def of_images(rank: int, logits: torch.Tensor, labels: torch.Tensor) -> float:
    own = slice(2 * rank, 2 * rank + 2)
    groups = image_of_each(labels[own])
    number = int((labels[own] < 3).sum())
    cls, _ = losses_of(APLoss(process_group=True), logits[own], labels[own], number, pytest.fail, groups)
    return cls.item()


def test_images_of_two_processes_are_two(pool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = (
        torch.randn(2 * SIZE, 6, 3, generator=generator),
        torch.randint(4, (2 * SIZE, 6), generator=generator),
    )
    alone = APLoss()(logits, labels, groups="image").item()
    assert pool.run(of_images, logits, labels) == [pytest.approx(alone)] * SIZE
