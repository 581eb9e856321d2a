"""Where a loss puts the gradient of the boxes: the share of each tenth of the positives, by rank of their scores.

    python -m benchmarks.training.box_shares --data DIR [--losses LOSS ...]

Trains a detector with each loss and looks at several batches early, in the middle and at the end. The results are
printed and drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

from .contenders import CONTENDERS
from .data import read
from .detector import Detector
from .inputs import Inputs
from .run import Experiment, Run, Setting

_TENTHS, _BATCHES = 10, 4
_STAGES = {"early": 0.08, "middle": 0.4, "end": 1.0}
"""Shares of the training."""


def shares_of(criterion: nn.Module, logits: Tensor, labels: Tensor, boxes: Tensor, targets: Tensor) -> Tensor:
    """The share of the gradient of the boxes, as a sum of absolute values, of each tenth of the positives; those with
    the highest scores first; ``[10]``."""
    boxes = boxes.detach().requires_grad_()
    loss = criterion(logits.detach(), labels, boxes, targets)
    (gradient,) = torch.autograd.grad(loss.loc, boxes)
    positive = (labels >= 0) & (labels < logits.shape[-1])
    scores = logits.detach()[positive].gather(1, labels[positive][:, None])[:, 0]
    sizes = gradient.abs().sum(1)[scores.argsort(descending=True, stable=True)]
    parts = sizes.tensor_split(_TENTHS)
    return torch.stack([part.sum() for part in parts]) / sizes.sum()


def look(model: Detector, inputs: Inputs, size: int) -> list[float]:
    """:func:`shares_of`, the mean of several batches; changes nothing."""
    criterion = model.head.ranking_criterion
    given: list[tuple[Tensor, ...]] = []
    hook = criterion.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    state = {name: x.clone() for name, x in criterion.state_dict().items()}
    found = []
    for k in range(_BATCHES):
        indices = [i % len(inputs) for i in range(k * size, (k + 1) * size)]
        with torch.no_grad():
            model.losses(*inputs.batch(indices, [False] * size, torch.device("cpu")))
        arguments = given.pop()
        found.append(shares_of(criterion, *arguments))
        given.clear()
    hook.remove()
    criterion.load_state_dict(state)
    mean: list[float] = torch.stack(found).mean(0).tolist()
    return mean


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.box_shares",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--losses", nargs="+", choices=CONTENDERS, default=["focal", "rank-sort", "alrp"])
    parser.add_argument("--passes", type=float, default=4.0)
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("compare-output"), metavar="DIR")
    options = parser.parse_args(arguments)
    files = {"train": options.data / "annotations" / "train.json"}
    setting = Setting(size=options.size)
    experiment = Experiment(read(files, options.data / "images"), setting, options.output / "inputs")
    found: dict[str, dict[str, list[float]]] = {}
    for name in options.losses:
        stages: dict[str, list[float]] = {}

        def watch(share: float, model: Detector, stages: dict[str, list[float]] = stages) -> None:
            for stage, least in _STAGES.items():
                if share >= least and stage not in stages:
                    stages[stage] = look(model, experiment.inputs["train"], setting.batch_size)

        experiment.train(Run(name, options.rate, 0, options.passes), torch.device("cpu"), watch)
        found[name] = stages
        for stage, shares in stages.items():
            print(f"{name}, {stage}: {' '.join(f'{100 * share:.1f}' for share in shares)}", flush=True)
    (options.output / "box-shares.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    _draw(found, options.output / "box-shares.png")


def _draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(_STAGES), figsize=(4 * len(_STAGES), 3.4), layout="constrained", sharey=True)
    for one, stage in zip(axes, _STAGES):
        for name, stages in found.items():
            shares = [100 * share for share in stages[stage]]
            one.plot(range(1, _TENTHS + 1), shares, marker="o", label=CONTENDERS[name].title)
        one.set(title=stage, xlabel="tenth of the positives, by score", yscale="log")
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="share of the gradient of the boxes, %")
    axes[-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
