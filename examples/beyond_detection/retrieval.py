"""Retrieval: pictures of the same digit first, in the order of cosine similarity to a query.

    python examples/beyond_detection/retrieval.py

Every picture of a batch is a query that ranks the others. Supervised contrastive loss against AP Loss with one ranking
for each query, error-driven, and SmoothAP, which is differentiated.
"""

from __future__ import annotations

import numpy as np
import torch
import trials
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize

from alrp_triton import ap_loss
from alrp_triton.framework import RankingLoss, Statistics

BATCH, TEMPERATURE = 100, 0.1


def smooth_ap(ranking: Statistics) -> Tensor:
    return ranking.num_false_positives / ranking.rank


# Logits are cosines / 0.1: the ramp ends at a difference of 0.1 in cosine (AP Loss), and of 0.5 (SmoothAP), since a
# derivative is 0 beyond it.
DELTA = {"AP Loss": 1.0, "SmoothAP": 5.0}
SMOOTH_AP = RankingLoss(smooth_ap, gradient="true", delta=DELTA["SmoothAP"], backend="torch")


def pairs(embedded: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs ``[B, B]``, and labels: 1 for the same class, 0 for others, -1 for a picture and itself."""
    embedded = normalize(embedded, dim=1)
    labels = (classes[:, None] == classes).long().fill_diagonal_(-1)
    return embedded @ embedded.T, labels


def loss_of(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if name == "contrastive":
        positive = (labels == 1).float()
        probability = logits.masked_fill(labels < 0, -torch.inf).log_softmax(1).masked_fill(labels < 0, 0.0)
        return -((probability * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()
    query = torch.arange(len(logits))[:, None].expand(logits.shape)
    if name == "AP Loss":
        return ap_loss(logits, labels, groups=query, delta=DELTA[name], backend="torch")
    return SMOOTH_AP(logits, labels, groups=query)


@torch.no_grad()
def scores(model: nn.Module, pictures: Tensor, classes: Tensor) -> dict[str, float]:
    cosines, labels = pairs(model(pictures), classes)
    order = cosines.fill_diagonal_(-2.0).argsort(1, descending=True)[:, :-1]  # without the query, which is last
    hits = labels.gather(1, order).double()
    precision = hits.cumsum(1) / torch.arange(1, len(classes))
    each = (precision * hits).sum(1) / hits.sum(1)
    return {"mAP": float(each.mean()), "recall@1": float(hits[:, 0].mean())}


def trial(loss: str, rate: float, seed: int, quick: bool) -> tuple[trials.Scores, trials.Scores]:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pictures, classes = (torch.from_numpy(each) for each in load_digits(return_X_y=True))
    order = torch.from_numpy(rng.permutation(len(pictures)))
    train, validation, test = [((pictures[part] / 16).float(), classes[part]) for part in order.split([600, 400, 797])]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))

    def loss_of_batch() -> Tensor:
        batch = torch.from_numpy(rng.choice(len(train[0]), BATCH, replace=False))
        cosines, labels = pairs(model(train[0][batch]), train[1][batch])
        return loss_of(loss, cosines / TEMPERATURE, labels)

    trials.train(model, rate, 30 if quick else 150, loss_of_batch)
    return scores(model, *validation), scores(model, *test)


if __name__ == "__main__":
    trials.main(trial, ["contrastive"], ["AP Loss", "SmoothAP"], [0.003, 0.01, 0.03], __doc__)
