"""Table 5 of the paper: the best and the worst that an order of the same true positives can give.

Within each class the true positives, detections that COCO's matching at an IoU of 0.5 accepts, exchange their scores so
that these fall with IoU or rise with it. False positives keep theirs. So AP50 stays as it was, but for an image in
which an object's duplicate now comes first and takes the match, and all that changes is how scores correlate with
localisation.
"""

from __future__ import annotations

import torch
from report import Detections
from torch import Tensor
from torchvision.ops import box_iou

from .data import Scenes

MIN_IOU = 0.5


def matched_ious(boxes: Tensor, labels: Tensor, truth_boxes: Tensor, truth_labels: Tensor) -> Tensor:
    """IoU [n] of each detection with the object that it finds, 0 for false positives.

    Detections come best first; each takes, of its class, the object not yet taken with which its IoU is largest, if
    that is 0.5 or more: the rule of COCO's evaluation.
    """
    ious = box_iou(boxes, truth_boxes).masked_fill_(labels[:, None] != truth_labels, 0.0)
    found = torch.zeros(len(boxes))
    if not len(truth_boxes):
        return found
    for i, row in enumerate(ious):
        best = row.argmax()
        if row[best] >= MIN_IOU:
            found[i] = row[best]
            ious[:, best] = 0.0
    return found


def rerank(detections: Detections, truth: Scenes, *, best_first: bool) -> Detections:
    """The detections of all ``truth`` with the scores of each class's true positives sorted by IoU.

    Args:
        detections: for each scene ``boxes`` [n, 4], ``labels`` [n] and ``scores`` [n], best first; not changed.
        truth: the scenes.
        best_first: the larger the IoU the higher the score; else the lower.

    Returns:
        Detections in the same form, sorted anew.
    """
    targets = [truth[i][1] for i in range(len(truth))]
    ious = torch.cat(
        [matched_ious(d["boxes"], d["labels"], t["boxes"], t["labels"]) for d, t in zip(detections, targets)]
    )
    labels = torch.cat([found["labels"] for found in detections])
    scores = torch.cat([found["scores"] for found in detections])
    for label in labels.unique():
        where = torch.nonzero((labels == label) & (ious > 0))[:, 0]
        by_iou = where[ious[where].argsort(descending=best_first, stable=True)]
        scores[by_iou] = scores[where].sort(descending=True).values
    reranked = []
    for found, new in zip(detections, scores.split([len(found["scores"]) for found in detections])):
        order = new.argsort(descending=True, stable=True)
        reranked.append({"boxes": found["boxes"][order], "labels": found["labels"][order], "scores": new[order]})
    return reranked
