"""Segmentation with rare foreground of graded certainty: edges in noisy photographs.

    python examples/beyond_detection/segmentation.py

Five annotators mark the 1, 2, 3, 4 and 5 % of pixels with the steepest brightness; a pixel's certainty is the share of
those who mark it. The network sees the photograph under noise. BCE and Dice Loss against AP Loss and RankED's losses.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import trials
from scipy.ndimage import gaussian_gradient_magnitude
from sklearn.datasets import load_sample_image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from alrp_triton import ap_loss
from alrp_triton.compat import RankLoss, SortLoss

NOISE, CROP, BATCH = 0.5, 48, 4
# Columns of the photographs, 640 wide, for training, validation and test.
STRIPS = (slice(0, 320), slice(330, 480), slice(490, 640))


@cache
def photographs() -> tuple[Tensor, Tensor]:
    """Two photographs ``[2, 3, 427, 640]``, of mean 0 and deviation 1, and certainties ``[2, 1, 427, 640]``."""
    images = np.stack([load_sample_image(name) for name in ("china.jpg", "flower.jpg")]) / 255
    steepness = np.stack([gaussian_gradient_magnitude(image.mean(-1), 1.5) for image in images])
    marked = [steepness > np.quantile(steepness, 1 - share / 100, axis=(1, 2), keepdims=True) for share in range(1, 6)]
    normalised = torch.tensor((images - images.mean()) / images.std()).float()
    return normalised.permute(0, 3, 1, 2), torch.tensor(np.mean(marked, 0)).float()[:, None]


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, width, dilation in ((3, 5, 1), (8, 3, 2), (8, 3, 4)):
        padding = width // 2 * dilation
        layers += [nn.Conv2d(inputs, 8, width, 1, padding, dilation, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 1))


def loss_of(name: str, logits: Tensor, certainty: Tensor) -> Tensor:
    if name == "BCE":
        return binary_cross_entropy_with_logits(logits, certainty)
    if name == "Dice":
        predicted = logits.sigmoid()
        return 1 - 2 * (predicted * certainty).sum() / (predicted.sum() + certainty.sum() + 1e-6)
    if name == "AP Loss":
        return ap_loss(logits, certainty > 0)
    return RankLoss.apply(logits, certainty) + SortLoss.apply(logits, certainty)


@torch.no_grad()
def scores(model: nn.Module, images: Tensor, certainty: Tensor) -> dict[str, float]:
    """AP of the pixels that anyone marks; and the mean over annotators of the AP of their pixels."""
    logits, certainty = model.eval()(images).flatten(), certainty.flatten()
    each = [average_precision_score(certainty > level / 5 - 0.1, logits) for level in range(1, 6)]
    return {"AP": float(each[0]), "mean AP over certainty": float(np.mean(each))}


def trial(loss: str, rate: float, seed: int, quick: bool) -> tuple[trials.Scores, trials.Scores]:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    images, certainty = photographs()
    noisy = images + NOISE * torch.randn(images.shape)
    model = network()

    def loss_of_batch() -> Tensor:
        corners = zip(rng.integers(0, images.shape[2] - CROP, BATCH), rng.integers(0, STRIPS[0].stop - CROP, BATCH))
        crops = [(i % 2, slice(None), slice(r, r + CROP), slice(c, c + CROP)) for i, (r, c) in enumerate(corners)]
        clean, target = (torch.stack([each[crop] for crop in crops]) for each in (images, certainty))
        return loss_of(loss, model(clean + NOISE * torch.randn(clean.shape)), target)

    trials.train(model, rate, 30 if quick else 150, loss_of_batch)
    validation, test = [scores(model, noisy[..., strip], certainty[..., strip]) for strip in STRIPS[1:]]
    return validation, test


if __name__ == "__main__":
    trials.main(trial, ["BCE", "Dice"], ["AP Loss", "RankED"], [0.003, 0.01, 0.03], __doc__)
