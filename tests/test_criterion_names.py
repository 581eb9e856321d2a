"""How checkpoints of integrations name a criterion: alike for the same loss, and only for the same loss."""

import pytest
from torch import nn

from alrp_triton import ALRPLoss, APLoss, RankSortLoss, SelfBalance
from alrp_triton.framework import RankingLoss
from alrp_triton.integrations._criteria import name_of


def own_error(*_):
    """Of boxes, or of a ranking."""


def other_error(*_):
    """Likewise."""


class Functor:
    def __call__(self, *_):
        """An error of boxes."""


class Own(nn.Module):
    def __init__(self, width, inner=None, **others):
        super().__init__()
        self.width, self.inner = width, inner


@pytest.mark.parametrize(
    ("criterion", "name"),
    [
        (APLoss(), "APLoss()"),
        (APLoss(2.0, interpolated=False), "APLoss(delta=2.0, interpolated=False)"),
        # Neither of these changes the loss.
        (RankSortLoss(monitor=True, backend="torch", process_group=True), "RankSortLoss()"),
        # A repr would have addresses.
        (RankSortLoss(box_error=own_error), "RankSortLoss(box_error=own_error)"),
        (RankSortLoss(box_error=Functor()), "RankSortLoss(box_error=Functor)"),
        (RankingLoss(own_error, delta=0.5), "RankingLoss(error=own_error, delta=0.5)"),
        # A module in it has settings too.
        (ALRPLoss(), "ALRPLoss(self_balance=SelfBalance())"),
        (ALRPLoss(self_balance=SelfBalance(2, period=9)), "ALRPLoss(self_balance=SelfBalance(init=2.0, period=9))"),
        (ALRPLoss(self_balance=None), "ALRPLoss(self_balance=None)"),
        (Own(3, APLoss(monitor=True), monitor=1), "Own(width=3, inner=APLoss())"),
    ],
)
def test_names(criterion, name):
    assert name_of(criterion) == name


def test_another_function_is_another_loss():
    assert name_of(RankingLoss(own_error)) != name_of(RankingLoss(other_error))
    assert name_of(RankingLoss(lambda ranking: ranking.rank)) != name_of(RankingLoss(own_error))
