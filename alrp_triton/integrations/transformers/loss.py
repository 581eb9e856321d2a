"""The ranking loss that replaces ``model.loss_function`` of a DETR."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .._criteria import image_of_each, losses_of, open_balances, takes_boxes
from .outputs import Family

__all__ = ["DetrRankingLoss"]


class DetrRankingLoss(nn.Module):
    """The loss of a DETR, with the framework's matching and signature and a ranking loss for its terms.

    In each supervised output, all queries and classes of the batch are one ranking. The positives are the queries that
    the model's Hungarian matcher assigns to an object, each at the object's class. All other logits are negatives.

    Each decoder layer, and the encoder's proposals if there are any, have their own criterion. A layer with poorer
    boxes needs another weight between classification and localisation, and self-balancing measures iterations of one
    layer. ``criteria[0]`` belongs to the last layer; the others follow in the order of the layers, with the proposals
    at the end. They are used if ``config.auxiliary_loss`` is on.

    Denoising queries (RT-DETR and its successors) keep the model's own loss. They are made from the objects themselves,
    in known groups, and inference has none. In a common ranking they would be at the top.

    :func:`use_loss` makes it and describes the arguments.
    """

    criteria: nn.ModuleList

    def __init__(
        self, family: Family, criteria: Sequence[nn.Module], *, l1_weight: float | None, per_image: bool
    ) -> None:
        super().__init__()
        self.family, self.l1_weight, self.per_image = family, l1_weight, per_image
        self.criteria = nn.ModuleList(criteria)

    def forward(
        self,
        logits: Tensor,
        labels: list[dict[str, Tensor]],
        device: Any,
        pred_boxes: Tensor,
        config: Any,
        *layers: Any,
        **others: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        """The loss of one batch, called by the model with the framework's arguments.

        Args:
            logits: [B, Q, C] of the last layer.
            labels: for each image ``"class_labels"`` [G] and ``"boxes"`` [G, 4], as (centre x, centre y, width,
                height) in units of the image.
            device: device of the criterion; the framework's argument.
            pred_boxes: [B, Q, 4] of the last layer, as the boxes of ``labels``.
            config: the model's.
            layers: logits and boxes of all layers, for auxiliary losses.
            others: further arguments of the model's own loss.

        Returns:
            The loss; its weighted terms by name: ``loss_cls`` and ``loss_loc`` of the criterion, ``loss_bbox`` (L1),
            ``loss_giou`` if the criterion takes no boxes, and the other terms of the model's own loss, with the
            framework's suffixes for auxiliary layers and denoising; and the outputs of the auxiliary layers, or None.

        Raises:
            ValueError: there are more layers than criteria, because the config was changed.
        """
        outputs = self.family.outputs(logits, pred_boxes, config, *layers, **others)
        auxiliary = outputs.get("auxiliary_outputs")
        ranked = [outputs, *(auxiliary or [])]
        if len(ranked) > len(self.criteria):
            raise ValueError(f"config: expected at most {len(self.criteria)} supervised outputs, got {len(ranked)}")
        own = self.family.criterion(config)
        # transformers has no hook here, so the criterion of each batch changes its class.
        own.__class__ = _with_ranking(own.__class__)
        own.start(self, ranked)
        losses = own.to(device)(outputs, labels)
        return sum(losses.values()), losses, auxiliary

    def step_epoch(self) -> None:
        """End the self-balancing period of each criterion that has one and does not end it itself."""
        for balance in open_balances(self):
            balance.step_epoch()

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        return f"l1_weight={self.l1_weight}, per_image={self.per_image}"


class _RankingTerms:
    """Mixed into a criterion of the framework, which matches and adds up as before but gets the terms from this
    class."""

    weight_dict: dict[str, float]
    _get_source_permutation_idx: Any  # transformers has no public function for the matched queries in row-major order

    def start(self, loss: DetrRankingLoss, ranked: list[dict[str, Any]]) -> None:
        """Prepare one batch: ``ranked`` are the outputs with criteria; the others are denoising queries."""
        # By identity, because the framework passes the same objects to get_loss.
        self.criterion_of = {id(outputs): criterion for outputs, criterion in zip(ranked, loss.criteria)}
        self.per_image = loss.per_image
        self.own_weights = self.weight_dict
        self.weights = self.weight_dict if loss.l1_weight is None else {**self.weight_dict, "loss_bbox": loss.l1_weight}
        # Terms are weighted here. Some criteria of the framework would do it again, and drop terms without a weight.
        self.weight_dict = dict.fromkeys([*self.own_weights, "loss_cls", "loss_loc"], 1.0)

    def get_loss(
        self,
        loss: str,
        outputs: dict[str, Any],
        targets: list[dict[str, Tensor]],
        indices: Any,
        *more: Any,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The weighted terms of one output for ``loss`` of the framework; the arguments are the framework's."""
        criterion = self.criterion_of.get(id(outputs))
        if criterion is not None and loss in ("labels", "vfl"):
            return self._ranking(criterion, outputs, targets, indices)
        terms = super().get_loss(loss, outputs, targets, indices, *more, **options)  # type: ignore[misc]
        weights = self.own_weights if criterion is None else self.weights
        if takes_boxes(criterion):
            terms.pop("loss_giou", None)
        return {name: value * weights[name] for name, value in terms.items() if name in weights}

    def _ranking(
        self,
        criterion: nn.Module,
        outputs: dict[str, Any],
        targets: list[dict[str, Tensor]],
        indices: list[tuple[Tensor, Tensor]],
    ) -> dict[str, Tensor]:
        logits = outputs["logits"]
        # In row-major order, as the losses require: image by image, and SciPy's assignment is sorted by query.
        matched = self._get_source_permutation_idx(indices)
        labels = torch.full(logits.shape[:2], logits.shape[-1], device=logits.device)
        labels[matched] = torch.cat([target["class_labels"][of] for target, (_, of) in zip(targets, indices)])

        def boxes() -> tuple[Tensor, Tensor]:
            true = torch.cat([target["boxes"][of] for target, (_, of) in zip(targets, indices)])
            return _corners(outputs["pred_boxes"][matched]), _corners(true)

        groups = image_of_each(labels) if self.per_image else None
        cls, loc = losses_of(criterion, logits, labels, len(matched[0]), boxes, groups)
        return {"loss_cls": cls} if loc is None else {"loss_cls": cls, "loss_loc": loc}


def _corners(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) of boxes [P, 4] given as (centre x, centre y, width, height)."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return torch.cat([centre - half, centre + half], dim=1)


@cache
def _with_ranking(base: type) -> type:
    """``base`` with the terms of :class:`_RankingTerms`; the same class for the same base."""
    return type(f"Ranking{base.__name__}", (_RankingTerms, base), {"__module__": __name__})
