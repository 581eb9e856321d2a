"""What the detectors share: how one part of an existing model comes to compute another loss."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RankingPart", "image_of_each", "mix_in"]


class RankingPart(nn.Module):
    """Mixed into the class of one instance by :func:`mix_in`: a part of a detector that has a ranking criterion.

    Changing the instance's class, rather than hanging a bound method on it, keeps ``self`` right wherever the part is
    copied or replicated. Only pickling needs help, because the combined class has no importable name.
    """

    ranking_criterion: nn.Module
    ranking_per_image: bool

    def ranking_options(self, images: Tensor) -> dict[str, Tensor]:
        """Further arguments of the criterion; ``images`` says which image each row of the labels belongs to."""
        return {"groups": images} if self.ranking_per_image else {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, type(self).__bases__, self.__dict__


def mix_in(part: nn.Module, mixin: type[RankingPart], criterion: nn.Module, per_image: bool) -> None:
    """Give ``part`` the methods of ``mixin``, unless it has them, and a criterion, in place of any before."""
    if not isinstance(part, mixin):
        part.__class__ = _combined(mixin, type(part))  # type: ignore[arg-type]
    assert isinstance(part, mixin)
    # A default criterion starts on the CPU; the model may already live elsewhere.
    part.ranking_criterion = criterion.to(next(part.parameters()).device)
    part.ranking_per_image = per_image


def image_of_each(labels: Tensor) -> Tensor:
    """The image of each anchor [B, A], a view of B numbers."""
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


@cache
def _combined(mixin: type, base: type) -> type:
    """``base`` with what ``mixin`` adds; the same class for the same two, as a class statement gives."""
    return type(f"Ranking{base.__name__}", (mixin, base), {"__module__": __name__})


def _empty(mixin: type, base: type) -> nn.Module:
    """An empty part for ``pickle`` and ``copy`` to fill."""
    part: nn.Module = object.__new__(_combined(mixin, base))
    return part
