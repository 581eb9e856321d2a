"""Train a detector on photographs, and keep its scores early, in the middle and late in training.

    python -m benchmarks.training.real_scores --data DIR [--passes N]

DIR has ``images``, ``annotations/train.json`` and ``annotations/test.json``, in COCO's format. The detector is that of
the comparison of losses, with Rank & Sort Loss. What is kept are numbers: for one image of the test split all logits,
in the order of memory, and for several images those of the positives (``results/scores.npz``).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..workloads import RECORDED
from .data import read
from .detector import Detector
from .inputs import Inputs
from .run import Experiment, Run, Setting

_IMAGES_OF_POSITIVES = 24
# When scores are kept, as shares of the training.
_STAGES = {"early": 0.01, "middle": 0.15, "late": 1.0}


def scores_of(model: Detector, inputs: Inputs) -> dict[str, Tensor]:
    """The logits of the first image, without its positives, and the logits of the positives of several images."""
    positives, negatives = [], torch.empty(0)
    seen: list[Any] = []
    hook = model.head.ranking_criterion.register_forward_pre_hook(lambda _, given: seen.append(given[:2]))
    for k in range(min(_IMAGES_OF_POSITIVES, len(inputs))):
        with torch.no_grad():
            model.losses(*inputs.batch([k], [False], torch.device("cpu")))
        logits, labels = (each[0] for each in seen.pop())
        is_positive = labels[:, None] == torch.arange(logits.shape[1])
        positives.append(logits[is_positive])
        if k == 0:
            # What replaces positives and ignored anchors are scores of the row before, so that the order stays.
            usable = (labels == logits.shape[1]).nonzero().squeeze(1)
            rows = torch.searchsorted(usable, torch.arange(len(labels)), right=True).sub(1).clamp(min=0)
            negatives = logits[usable[rows]].reshape(-1)
    hook.remove()
    return {"negatives": negatives, "positives": torch.cat(positives)}


def train(folder: Path, run: Run, setting: Setting, cache: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The scores of all stages, in half precision."""
    files = {split: folder / "annotations" / f"{split}.json" for split in ("train", "test")}
    experiment = Experiment(read(files, folder / "images"), setting, cache)
    kept: dict[str, np.ndarray[Any, Any]] = {}

    def watch(share: float, model: Detector) -> None:
        print(f"{share:.2f}", flush=True)
        for stage, least in _STAGES.items():
            if share >= least and f"{stage} negatives" not in kept:
                for kind, scores in scores_of(model, experiment.inputs["test"]).items():
                    kept[f"{stage} {kind}"] = scores.half().numpy()

    experiment.train(run, torch.device("cpu"), watch)
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and write what is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.real_scores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--passes", type=float, default=9.0, help="over the images of training")
    parser.add_argument("--rate", type=float, default=3e-3, help="the learning rate")
    parser.add_argument("--cache", type=Path, default=Path("compare-output/inputs"), help="folder of features")
    parser.add_argument("--output", type=Path, default=RECORDED)
    options = parser.parse_args(arguments)
    run = Run("rank-sort", options.rate, 0, options.passes)
    np.savez_compressed(options.output, **train(options.data, run, Setting(), options.cache))  # type: ignore[arg-type]
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
