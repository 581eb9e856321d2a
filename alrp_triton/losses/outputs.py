"""What the losses return. Train on ``total``."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

from torch import Tensor

__all__ = ["ALRPLossOutput", "RankSortLossOutput", "RankSortOutput"]


class ALRPLossOutput(NamedTuple):
    """The two components of aLRP Loss, and the ranks behind them. ``cls + loc`` is the loss."""

    cls: Tensor
    """Classification component, scalar; its backward gives the error-driven gradient of the scores."""
    loc: Tensor
    """Localisation component, scalar; its backward gives the gradient of the localisation errors."""
    rank: Tensor
    """Rank of each positive among positives and negatives, ``[P]``, detached."""

    @property
    def total(self) -> Tensor:
        """The loss, ``cls + loc``. (A sum over this tuple would add the ranks.)"""
        return self.cls + self.loc


class RankSortOutput(NamedTuple):
    """The two errors of Rank & Sort Loss, scalars. ``ranking + sorting`` is the loss."""

    ranking: Tensor
    """The error of negatives above positives."""
    sorting: Tensor
    """The error of positives of lower IoU above those of higher IoU."""

    @property
    def total(self) -> Tensor:
        """The loss, ``ranking + sorting``."""
        return self.ranking + self.sorting


class RankSortLossOutput(NamedTuple):
    """The result of :class:`RankSortLoss`, scalars. ``cls + loc`` is the loss."""

    ranking: Tensor
    sorting: Tensor
    loc: Tensor
    """Localisation loss, multiplied by the weight that makes it as large as the other two together."""

    @property
    def cls(self) -> Tensor:
        """Classification component: ``ranking + sorting``."""
        return self.ranking + self.sorting

    @property
    def total(self) -> Tensor:
        """The loss, ``cls + loc``."""
        return self.cls + self.loc


def _no_attribute(output: tuple[Tensor, ...], name: str) -> NoReturn:
    # An AttributeError, so that hasattr() is False as for any tuple.
    call = "()" if callable(getattr(Tensor, name, None)) else ""
    of_tensors = hasattr(Tensor, name) and not name.startswith("_")
    hint = f": use .total.{name}{call} for the whole loss, or that of one component" if of_tensors else ""
    raise AttributeError(f"{type(output).__name__} has no {name}{hint}")


def _no_arithmetic(output: tuple[Tensor, ...], other: object) -> NoReturn:
    # A tuple would repeat itself, or append the other.
    raise TypeError(f"expected a tensor to add or multiply, got {type(output).__name__}: use .total, the whole loss")


# Not within the classes, where type checkers would take any name for an attribute.
for _kind in (ALRPLossOutput, RankSortOutput, RankSortLossOutput):
    setattr(_kind, "__getattr__", _no_attribute)  # noqa: B010
    for _name in ("add", "radd", "mul", "rmul", "sub", "rsub", "truediv"):
        setattr(_kind, f"__{_name}__", _no_arithmetic)
