"""The ranking loss that replaces ``model.loss_function`` of a DETR."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._criteria import open_balances
from .._ranked_outputs import RankedOutputs, ranked_class
from .outputs import Family

__all__ = ["DetrRankingLoss"]


class DetrRankingLoss(nn.Module):
    """The loss of a DETR, with the framework's matching and signature and a ranking loss for its terms.

    In each supervised output, all queries and classes of the batch are one ranking. The positives are the queries that
    the model's Hungarian matcher assigns to an object, each at the object's class. All other logits are negatives.

    Each decoder layer with ``config.auxiliary_loss``, and the encoder's proposals if there are any, are matched and
    ranked alone, as groups of one call. The terms are the sums over these outputs, as if each had a call of its own.
    Self-balancing has one weight for all.

    Denoising queries (RT-DETR and its successors) keep the model's own loss. They are made from the objects themselves,
    in known groups, and inference has none. In a common ranking they would be at the top.

    :func:`use_loss` makes it and describes the arguments.
    """

    def __init__(self, family: Family, criterion: nn.Module, *, l1_weight: float | None, per_image: bool) -> None:
        super().__init__()
        self.family, self.l1_weight, self.per_image = family, l1_weight, per_image
        self.criterion = criterion

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
            The loss; its weighted terms by name: ``loss_cls`` and ``loss_loc`` of the criterion, of all outputs
            together, ``loss_bbox`` (L1), ``loss_giou`` if the criterion takes no boxes, and the other terms of the
            model's own loss, with the framework's suffixes for auxiliary layers and denoising; and the outputs of the
            auxiliary layers, or None.
        """
        outputs = self.family.outputs(logits, pred_boxes, config, *layers, **others)
        own = self.family.criterion(config)
        # transformers has no hook here, so the criterion of each batch changes its class.
        own.__class__ = ranked_class(_WeightedTerms, own.__class__)
        own.start(self)
        losses = own.to(device)(outputs, labels)
        return sum(losses.values()), losses, outputs.get("auxiliary_outputs")

    def step_epoch(self) -> None:
        """End the self-balancing period of the criterion, if it has one and does not end it itself."""
        for balance in open_balances(self):
            balance.step_epoch()

    def extra_repr(self) -> str:
        """The arguments, as ``repr`` shows them."""
        return f"l1_weight={self.l1_weight}, per_image={self.per_image}"


class _WeightedTerms(RankedOutputs):
    """Multiplies the framework's terms by their weights; some of its criteria would not."""

    ranking_keys = ("logits", "class_labels")
    weight_dict: dict[str, float]

    def start(self, loss: DetrRankingLoss) -> None:
        """Prepare one batch."""
        self.ranking_criterion, self.ranking_per_image = loss.criterion, loss.per_image
        self.own_weights = self.weight_dict
        self.weights = self.weight_dict if loss.l1_weight is None else {**self.weight_dict, "loss_bbox": loss.l1_weight}
        # Others would multiply again.
        self.weight_dict = dict.fromkeys(self.own_weights, 1.0)

    def get_loss(self, loss: str, outputs: dict[str, Any], *more: Any, **options: Any) -> dict[str, Tensor]:
        terms = super().get_loss(loss, outputs, *more, **options)
        weights = self.own_weights if id(outputs) in self.ranking_noisy else self.weights
        return {name: value * weights[name] for name, value in terms.items() if name in weights}
