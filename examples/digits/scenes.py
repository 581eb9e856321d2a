"""Detection scenes composed of real handwritten digits.

The digits are the 1 797 scans of 8 x 8 pixels that scikit-learn carries (the test part of the UCI set "Optical
Recognition of Handwritten Digits", 13 writers), so nothing is downloaded. Each is enlarged to a random size and
inked, light or dark, onto a background of smooth noise among clutter that is stroke-like but no digit: lines, arcs
and scraps of other scans. A scene follows from its seed alone; training and test scenes share no scan.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "test"]
Array = NDArray[np.float32]

NUM_CLASSES = 10
SIZE = 128  # of a scene, pixels
MAX_DIGITS = 7
DIGIT_SIZES = (24, 52)  # of a scan enlarged with its margin of one pixel, pixels
HELD_OUT = 0.25  # share of the scans kept for the test scenes
NOISE = 0.03  # standard deviation of each pixel; images are in 0..1
INK = 0.5  # coverage from which a pixel belongs to the digit, and so to its box


@cache
def glyphs(split: Split) -> tuple[Array, NDArray[np.int64]]:
    """The scans [N, 8, 8], in 0..1, and classes [N] of one split: disjoint, and the same in every run."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    first_train = round(HELD_OUT * len(order))
    chosen = order[first_train:] if split == "train" else order[:first_train]
    return (digits.images[chosen] / 16).astype(np.float32), digits.target[chosen].astype(np.int64)


class DigitScenes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """``length`` scenes, in torchvision's form.

    Item ``i`` is an image [1, SIZE, SIZE] in 0..1 and a target with ``boxes`` [n, 4], (x1, y1, x2, y2) in pixels,
    tight around the ink, and ``labels`` [n] in 0..9; n runs from 0 to MAX_DIGITS. It depends on split, seed and ``i``.
    """

    def __init__(self, split: Split, length: int, seed: int = 0) -> None:
        self.split, self.length, self.seed = split, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([self.seed, self.split == "test", index])
        scans, classes = glyphs(self.split)
        canvas = _background(rng)
        _clutter(canvas, rng, scans)

        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(rng.integers(MAX_DIGITS + 1)):
            chosen = rng.integers(len(scans))
            digit = _enlarge(scans[chosen], rng)
            for _ in range(10):  # a scene that has no room left goes without this digit
                x, y = (int(rng.integers(SIZE - extent + 1)) for extent in digit.shape[::-1])
                box = (x, y, x + digit.shape[1], y + digit.shape[0])
                if not any(_overlap(box, other) for other in boxes):
                    _ink(canvas, digit, x, y, rng)
                    boxes.append(box)
                    labels.append(int(classes[chosen]))
                    break

        canvas += rng.normal(0, NOISE, canvas.shape)
        return torch.from_numpy(canvas.clip(0, 1))[None], {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }


def _resize(image: Array, width: int, height: int) -> Array:
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator) -> Array:
    """Smooth noise on three scales around a random grey."""
    canvas = np.full((SIZE, SIZE), rng.uniform(0.25, 0.75), np.float32)
    for cells, amplitude in ((3, 0.12), (8, 0.06), (24, 0.04)):
        canvas += amplitude * _resize(rng.standard_normal((cells, cells), np.float32), SIZE, SIZE)
    return canvas


def _clutter(canvas: Array, rng: np.random.Generator, scans: Array) -> None:
    """Lines and arcs, then corners of scans enlarged like digits: 4 x 4 pixels, too little to be one."""
    coverage = Image.new("L", (SIZE, SIZE))
    draw = ImageDraw.Draw(coverage)
    for _ in range(rng.integers(2, 7)):
        x, y = rng.integers(0, SIZE, 2).tolist()
        dx, dy = rng.integers(10, 60, 2).tolist()
        width, shade = int(rng.integers(1, 4)), int(rng.integers(90, 200))
        if rng.random() < 0.5:
            draw.line((x, y, x + dx, y - dy), shade, width)
        else:
            start = int(rng.integers(360))
            draw.arc((x, y, x + dx, y + dy), start, start + int(rng.integers(60, 200)), shade, width)
    _ink(canvas, np.asarray(coverage, np.float32) / np.float32(255), 0, 0, rng)
    for _ in range(rng.integers(3)):
        row, column = rng.integers(0, 2, 2) * 4
        scrap = _enlarge(scans[rng.integers(len(scans)), row : row + 4, column : column + 4], rng, 0.5)
        x, y = (int(rng.integers(SIZE - extent + 1)) for extent in scrap.shape[::-1])
        _ink(canvas, scrap, x, y, rng)


def _enlarge(scan: Array, rng: np.random.Generator, scale: float = 1.0) -> Array:
    """The scan as ink coverage in 0..1 at a random size and aspect, cropped to its ink."""
    size = scale * np.exp(rng.uniform(*np.log(DIGIT_SIZES)))
    width = round(size * rng.uniform(0.85, 1.15))
    coverage = (3 * _resize(np.pad(scan, 1), width, round(size)) - 1).clip(0, 1)
    rows, columns = (np.flatnonzero((coverage >= INK).any(axis)) for axis in (1, 0))
    if not len(rows):  # an empty corner
        return coverage
    return coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _ink(canvas: Array, coverage: Array, x: int, y: int, rng: np.random.Generator) -> None:
    """Blend ink that is lighter or darker than the place it goes to, in place."""
    patch = canvas[y : y + coverage.shape[0], x : x + coverage.shape[1]]
    mean = patch.mean()
    shade = mean + rng.choice((-1, 1)) * rng.uniform(0.3, 0.6)
    if not 0 <= shade <= 1:
        shade = 2 * mean - shade
    patch += coverage * (shade - patch)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])
