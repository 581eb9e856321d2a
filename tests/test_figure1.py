"""Figure 1 of the paper: aLRP Loss tells apart what AP Loss does not, 0.53, 0.69 and 0.89 against 0.36."""

import pytest
import torch
from dialect import assert_close, by_backend

from alrp_triton import ALRPLoss, alrp_loss

pytestmark = by_backend

# Ten anchors by descending score, of which four are positives.
RANKS = torch.tensor([1, 3, 6, 10])
LOGITS = torch.arange(10, 0, -1, dtype=torch.float64)
LABELS = torch.zeros(10, dtype=torch.int64).index_fill(0, RANKS - 1, 1)
# IoUs of the positives in this order, and the aLRP loss with the step function and tau = 0.5.
ORDERS = {
    "positively correlated": ([0.95, 0.80, 0.65, 0.50], 0.53),
    "uncorrelated": ([0.80, 0.65, 0.50, 0.95], 0.69),
    "negatively correlated": ([0.50, 0.65, 0.80, 0.95], 0.89),
}
AP_LOSS = (0 / 1 + 1 / 3 + 3 / 6 + 6 / 10) / 4


def by_hand(ious):
    """Mean of (N_FP + sum of the errors at and above) / rank."""
    errors = [(1 - iou) / 0.5 for iou in ious]
    return sum((rank - i + sum(errors[:i])) / rank for i, rank in enumerate(RANKS.tolist(), 1)) / 4


def boxes_with(ious):
    """Predictions inside of a 10 x 10 target, so that the IoU is the share of its width."""
    target = torch.tensor([5.0, 5.0, 15.0, 15.0]).repeat(len(ious), 1)
    pred = target.clone()
    pred[:, 2] = 5 + 10 * torch.tensor(ious)
    return pred, target


@pytest.mark.parametrize("loc_ranking", ["sorted", "smooth"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_values(order, loc_ranking, shuffled, backend):
    ious, printed = ORDERS[order]
    errors = (1 - torch.tensor(ious, dtype=torch.float64)) / 0.5
    logits, labels = LOGITS, LABELS
    if shuffled:
        places = torch.tensor([7, 2, 9, 5, 0, 3, 8, 1, 6, 4])
        logits, labels = logits[places], labels[places]
        # Errors come in the order of the positives, which stand at these ranks now.
        errors = errors[torch.searchsorted(RANKS, (11 - logits[labels == 1]).long())]
    cls, loc, rank = alrp_loss(logits, labels, errors, delta=0, loc_ranking=loc_ranking, backend=backend)
    assert sorted(rank.tolist()) == RANKS.tolist()
    assert_close("cls", cls, torch.tensor(AP_LOSS), 1e-7)
    assert round(cls.item(), 2) == 0.36
    assert_close("aLRP", cls + loc, torch.tensor(by_hand(ious), dtype=torch.float64), 1e-12)
    # 0.885 is printed as 0.89.
    assert abs(cls.item() + loc.item() - printed) <= 0.005 + 1e-9


@pytest.mark.parametrize("order", ORDERS)
def test_values_from_boxes(order, backend):
    ious, printed = ORDERS[order]
    criterion = ALRPLoss(delta=0.0, tau=0.5, box_error="iou", self_balance=None, backend=backend)
    cls, loc, rank = criterion(LOGITS.float(), LABELS, *boxes_with(ious))
    assert rank.tolist() == RANKS.tolist()
    assert_close("cls", cls, torch.tensor(AP_LOSS), 1e-7)
    assert_close("aLRP", cls + loc, torch.tensor(by_hand(ious)), 1e-6)
    assert abs(cls.item() + loc.item() - printed) <= 0.005 + 1e-6


def test_only_the_order_of_scores_counts(backend):
    errors = torch.tensor([0.1, 0.4, 0.7, 1.0])
    expected = alrp_loss(LOGITS, LABELS, errors, delta=0, backend=backend)
    for stretched in (LOGITS.exp(), LOGITS * 1e-3, LOGITS.float() * 1e30, (LOGITS / 16).half()):
        for one, other in zip(alrp_loss(stretched, LABELS, errors, delta=0, backend=backend), expected):
            assert_close("stretched", one, other, 1e-7)
