"""Multi-label classification: which digits are on a noisy form of four boxes. Some digits are rare.

    python examples/beyond_detection/multi_label.py

Binary cross-entropy against AP Loss with one ranking for each class, by the mean over classes of average precision.
"""

from __future__ import annotations

import numpy as np
import torch
import trials
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from alrp_triton import ap_loss

BOXES, BATCH, CLASSES = 4, 128, 10
# Of the digits that are drawn, 26 % are zeros and 2 % are nines.
FREQUENCY = 0.75 ** np.arange(CLASSES)


def pictures(digits: np.ndarray, classes: np.ndarray, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Digits in some of the boxes, ``[number, BOXES, 64]``, and which are there, ``[number, CLASSES]``."""
    images = 0.3 * rng.standard_normal((number, BOXES, 64), dtype=np.float32)
    labels = np.zeros((number, CLASSES), dtype=np.int64)
    for image, label in zip(images, labels):
        for box in rng.permutation(BOXES)[: rng.integers(1, BOXES + 1)]:
            kind = rng.choice(CLASSES, p=FREQUENCY / FREQUENCY.sum())
            image[box] += rng.choice(digits[classes == kind])
            label[kind] = 1
    return torch.from_numpy(images), torch.from_numpy(labels)


class Network(nn.Sequential):
    """Scores each box; a class has the highest score of the boxes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits.amax(1)


def loss_of(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if name == "BCE":
        return binary_cross_entropy_with_logits(logits, labels.float())
    return ap_loss(logits, labels, groups="class")


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    logits = model(images)
    return {"macro mAP": float(average_precision_score(labels.numpy(), logits.numpy(), average="macro"))}


def trial(loss: str, rate: float, seed: int, quick: bool) -> tuple[trials.Scores, trials.Scores]:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    digits, classes = load_digits(return_X_y=True)
    order, digits = rng.permutation(len(digits)), digits / 16
    # No digit is in two of them.
    parts = np.split(order, [len(order) * 6 // 10, len(order) * 8 // 10])
    sizes = (500, 200, 500) if quick else (2000, 1000, 2000)
    train, validation, test = [pictures(digits[part], classes[part], size, rng) for part, size in zip(parts, sizes)]
    model = Network()

    def loss_of_batch() -> Tensor:
        batch = torch.from_numpy(rng.choice(len(train[0]), BATCH, replace=False))
        return loss_of(loss, model(train[0][batch]), train[1][batch])

    trials.train(model, rate, 60 if quick else 300, loss_of_batch)
    return scores(model, *validation), scores(model, *test)


if __name__ == "__main__":
    trials.main(trial, ["BCE"], ["AP Loss"], [0.01, 0.03, 0.1], __doc__)
