"""Problems of several groups, and what several calls make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import KERNELS, Case, random_case
from .family import ALRP, AP, APE, DEPTH, NDCG, RANK_SORT, WEIGHTED, Member, Results, evaluate

GROUPED = (ALRP, AP, NDCG, RANK_SORT, DEPTH, WEIGHTED, APE)
by_grouped = pytest.mark.parametrize("member", GROUPED, ids=repr)
by_some_grouped = pytest.mark.parametrize("member", [RANK_SORT, DEPTH] if KERNELS else GROUPED, ids=repr)
"""One that sorts positives, one with numbers of its own; where kernels run these do for all."""


def draw_groups(case: Case, ids: tuple[int, ...] = (2**40, -3, 5), seed: int = 0) -> Tensor:
    """A group for each logit."""
    return torch.tensor(ids)[torch.randint(len(ids), case.labels.shape, generator=torch.Generator().manual_seed(seed))]


def grouped_case(
    size: int = 240, num_pos: int = 24, seed: int = 0, ids: tuple[int, ...] = (0, 1, 2, 3)
) -> tuple[Case, Tensor]:
    """A case whose scores and values lie elsewhere in each group, and the groups; each has positives."""
    case = random_case(size, num_pos, seed=seed)
    groups = draw_groups(case, ids, seed)
    groups[(case.labels == 1).nonzero().squeeze(1)[: len(ids)]] = torch.tensor(ids)
    shift = sum((groups == identity) * 0.75 * k for k, identity in enumerate(ids))
    return case._replace(logits=case.logits + shift), groups


def separately(
    member: Member, case: Case, groups: Tensor, backend: str, constant: bool = False, **arguments: Any
) -> Results:
    """The mean over the groups with a positive, each called by itself; rank is not averaged.

    Args:
        constant: whether each of these calls gets groups, too, all the same.
    """
    values, is_pos = member.values(case), case.labels == 1
    present = groups[is_pos].unique().tolist()
    whole: Results = {}
    for group in present:
        inside = groups == group
        own = {"groups": groups[inside]} if constant else {}
        parts = evaluate(
            member, case.logits[inside], case.labels[inside], values[inside[is_pos]], backend, **own, **arguments
        )
        for name, part in parts.items():
            part = part if name == "rank" else part / len(present)
            if part.dim() == 0:
                whole[name] = whole.get(name, 0) + part
                continue
            place = inside[is_pos] if name in member.by_positive else inside
            whole.setdefault(name, torch.zeros(place.shape, dtype=part.dtype))[place] = part
    return whole


def problem_of_images(
    num_images: int = 3, num_anchors: int = 14, num_classes: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits ``[B, A, C]``, class labels ``[B, A]``, the same by logits, values."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_images, num_anchors, num_classes, generator=generator)
    classes = torch.randint(-1, num_classes + 3, (num_images, num_anchors), generator=generator).clamp(max=num_classes)
    labels = torch.zeros(logits.shape, dtype=torch.int64)
    is_pos = (classes >= 0) & (classes < num_classes)
    labels[is_pos] = torch.nn.functional.one_hot(classes[is_pos], num_classes)
    labels[classes == -1] = -1
    return logits, classes, labels, (4 * torch.rand(int(is_pos.sum()), generator=generator)).round() / 4
