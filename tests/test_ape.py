"""APE Loss: its published code, and its module."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dialect import KERNELS, assert_close, by_backend, random_case

from alrp_triton import APELoss, RankSortLoss, ape_loss
from alrp_triton.boxes import iou


@by_backend
@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_golden(delta, backend):
    golden = np.load(Path(__file__).parent / "golden" / "members" / "ape.npz")
    logits, targets, ious, value, gradient = (
        torch.from_numpy(golden[key]) for key in ("logits", "targets", "ious", f"ape_{delta}", f"ape_{delta}_grad")
    )
    x = logits.clone().requires_grad_()
    found = ape_loss(x, targets, ious, delta=delta, backend=backend).total
    found.backward()
    assert_close("loss", found, value, 1e-6)
    assert_close("gradient", x.grad, gradient, 1e-6)


@pytest.mark.skipif(KERNELS, reason="of the module")
def test_module_ranks_by_ape_and_takes_boxes_as_rank_and_sort_does():
    case = random_case(200, 12)
    target = torch.rand(12, 2).repeat(1, 2) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    pred = target + 0.1 * torch.rand(12, 4)
    given = case.logits.requires_grad_(), case.labels, pred.requires_grad_(), target
    found, other = APELoss(delta=1.0, self_balance=False)(*given), RankSortLoss(delta=1.0, self_balance=False)(*given)
    expected = ape_loss(case.logits, case.labels, iou(pred, target).detach(), delta=1.0)
    torch.testing.assert_close((found.ranking, found.sorting), (expected.ranking, expected.sorting))
    assert found.loc == other.loc
    assert torch.autograd.grad(found.total, pred)[0].any()
