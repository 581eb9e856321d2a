"""Functions for the adapters of all frameworks: check a criterion and its options, and call it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..losses.self_balance import SelfBalance

__all__ = [
    "check_criterion",
    "check_flag",
    "check_weight",
    "end_periods",
    "image_of_each",
    "losses_of",
    "name_of",
    "numbers_of",
    "of_this_process",
    "open_balances",
    "takes_boxes",
]


def takes_boxes(criterion: object) -> bool:
    """Whether a criterion is called with boxes; your own sets ``takes_boxes = True``."""
    return getattr(criterion, "takes_boxes", False) is True


def losses_of(
    criterion: nn.Module,
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    num_positives: int,
    boxes: Callable[[], tuple[Tensor, Tensor]],
    groups: Tensor | Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """The classification part and the localisation part of the loss; None for the latter if it takes no boxes.

    ``boxes`` computes the predicted and the true boxes of the positives, [P, 4] each. In evaluation mode the latter is
    without the weight of self-balancing, so that losses of different epochs compare.
    """
    options: dict[str, Any] = {} if groups is None else {"groups": groups}
    if not takes_boxes(criterion):
        return criterion(logits, labels, num_positives=num_positives, **options), None
    loss = criterion(logits, labels, *boxes(), **options)
    balance = getattr(criterion, "self_balance", None)
    if isinstance(balance, SelfBalance) and not criterion.training:
        return loss.cls, loss.loc / balance.weight.to(loss.loc)
    return loss.cls, loss.loc


def image_of_each(labels: Tensor) -> Tensor:
    """A number for the image of each label [B, ...], which no image of another process has; a view of B numbers."""
    images = of_this_process(torch.arange(len(labels), device=labels.device))
    return images.view(-1, *[1] * (labels.ndim - 1)).expand_as(labels)


def of_this_process(numbers: Tensor) -> Tensor:
    """Numbers that other processes do not have, from numbers >= 0: with a ``process_group`` the same number is the same
    ranking in all processes."""
    if dist.is_available() and dist.is_initialized():
        return numbers * dist.get_world_size() + dist.get_rank()
    return numbers


def open_balances(model: nn.Module) -> list[SelfBalance]:
    """The modules whose periods end by ``step_epoch()``, each once, in the same order in every process."""
    return [part for part in model.modules() if isinstance(part, SelfBalance) and part.period is None]


def end_periods(model: nn.Module) -> None:
    """End the open periods, each with the sums of all processes of the default group, so that all continue with one
    weight; called in every process."""
    for balance in open_balances(model):
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(balance.sums)
            dist.all_reduce(balance.count)
        balance.step_epoch()


def numbers_of(criterion: nn.Module) -> dict[str, Tensor]:
    """What a log shows of a criterion, 0-dimensional tensors by name: the statistics of ``monitor=True``, and the
    weight of the boxes if there is one."""
    weights = [part.weight for part in criterion.modules() if isinstance(part, SelfBalance)]
    return {**({"weight": weights[0]} if weights else {}), **getattr(criterion, "stats", {})}


# Settings that change nothing of what is trained, but for rounding.
_NEUTRAL = frozenset({"monitor", "backend", "process_group"})


def name_of(criterion: nn.Module) -> str:
    """What a checkpoint says of a criterion: its class and those of its arguments that make it another loss.

    It is the same in another process and with a later version that has more settings: defaults are left out, and a
    function is shown by its name. Of your own criterion it has the arguments that are attributes of the same name.
    """
    shown = []
    for name, parameter in signature(type(criterion)).parameters.items():
        value = _text(getattr(criterion, name, parameter.default))
        if name not in _NEUTRAL and value != _text(parameter.default):
            shown.append(f"{name}={value}")
    return f"{type(criterion).__name__}({', '.join(shown)})"


def _text(value: object) -> str:
    if isinstance(value, nn.Module):
        return name_of(value)
    # The repr of a function has an address.
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)


def check_criterion(criterion: object) -> None:
    if not isinstance(criterion, nn.Module):
        got, such = type(criterion).__name__, "ALRPLoss"
        if isinstance(criterion, type):
            got, such = f"the class {criterion.__name__}", criterion.__name__
        raise TypeError(f"criterion: expected a torch.nn.Module, got {got}; write {such}()")
    parameters = signature(criterion.forward).parameters.values()
    takes_number = any(each.name == "num_positives" or each.kind is each.VAR_KEYWORD for each in parameters)
    if not takes_boxes(criterion) and not takes_number:
        wanted = "a ranking loss, such as ALRPLoss(); your own takes num_positives, or has takes_boxes = True"
        raise TypeError(f"criterion: expected {wanted}, got {type(criterion).__name__}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_weight(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a finite number >= 0, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
