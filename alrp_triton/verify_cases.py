"""The cases of the checks: scores at stages of a training, and difficult inputs."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping
from functools import cache, cached_property
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, verify_losses

_IGNORED = -1


class Size(NamedTuple):
    """The size of cases, and the number of runs and timings of each."""

    logits: int
    positives: int
    repeats: int


FULL, QUICK, INTERPRETED = Size(20_000, 100, 3), Size(3_000, 30, 1), Size(1_500, 20, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem on the CPU.

    Attributes:
        name: what is special about it.
        logits: the levels, of one dtype, any strides.
        labels: for each level a label for each logit (1 positive, 0 negative, -1 ignored), or for each row (a class
            index, the number of classes for background, -1 ignored).
        loc_errors: ``[P]`` float32.
        arguments: further arguments of the loss.
        loss: one of :data:`alrp_triton.verify_losses.LOSSES`.
        missing: why the case cannot run; it is then empty.
    """

    name: str
    logits: list[Tensor]
    labels: list[Tensor]
    loc_errors: Tensor
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""
    loss: str = "aLRP"

    @cached_property
    def exact(self) -> reference.ReferenceALRP:
        """The results and gradients in float64, flat."""
        # A label for each logit by one_hot, independent of the engine, which is checked.
        flat = [y if y.dim() == x.dim() else _label_each(y, x.shape[-1]) for x, y in zip(self.logits, self.labels)]
        logits, labels = (torch.cat([t.reshape(-1) for t in level]) for level in (self.logits, flat))
        return verify_losses.exact(self.loss, logits, labels, self.loc_errors, **self.arguments)


@cache
def cases(size: Size) -> tuple[Case, ...]:
    """All cases of about this size, the same ones in every process."""
    early, middle, late = (_scores(regime, size) for regime in _REGIMES)
    return (
        early,
        middle,
        late,
        _rounded("ties", middle),
        _rounded("delta 0", middle, delta=0.0),
        dataclasses.replace(middle, name="smooth", arguments={"loc_ranking": "smooth"}),
        *(_converted(case, dtype) for dtype in (torch.float16, torch.bfloat16) for case in (early, middle, late)),
        _converted(middle, torch.float64),
        _pyramid(size),
        _infinities(middle),
        *detector_cases(size),
        _grouped(middle),
        *(dataclasses.replace(middle, name=loss, loss=loss) for loss in verify_losses.LOSSES[1:]),
        *(_rounded(f"{loss} groups", _grouped(middle), loss=loss) for loss in verify_losses.LOSSES[1:]),
    )


# Mean and standard deviation of the negatives' and of the positives' scores.
_REGIMES = {
    "early": ((-4.6, 0.05), (-4.6, 0.05)),
    "middle": ((-4.0, 1.0), (-2.5, 1.0)),
    "late": ((-6.5, 1.5), (0.5, 3.0)),
}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2020)


def _scores(regime: str, size: Size) -> Case:
    """Normally distributed scores, one in twenty ignored."""
    generator = _generator()
    labels = torch.zeros(size.logits, dtype=torch.int64)
    places = torch.randperm(size.logits, generator=generator)
    labels[places[: size.positives]] = 1
    labels[places[-(size.logits // 20) :]] = _IGNORED
    (neg_mean, neg_std), (pos_mean, pos_std) = _REGIMES[regime]
    noise = torch.randn(size.logits, generator=generator)
    logits = torch.where(labels == 1, pos_mean + pos_std * noise, neg_mean + neg_std * noise)
    return Case(regime, [logits], [labels], torch.rand(size.positives, generator=generator))


def _rounded(name: str, case: Case, loss: str = "aLRP", **arguments: Any) -> Case:
    """Scores in steps of 1/4: many are equal, and many lie exactly at the end of a ramp."""
    logits = [(level * 4).round() / 4 for level in case.logits]
    return dataclasses.replace(case, name=name, logits=logits, arguments=case.arguments | arguments, loss=loss)


def _grouped(case: Case) -> Case:
    """Five groups, one for every fifth logit."""
    groups = 10**10 * (torch.arange(len(case.logits[0])) % 5 - 2)
    return dataclasses.replace(case, name="groups", arguments={"groups": groups})


def _converted(case: Case, dtype: torch.dtype) -> Case:
    name = f"{case.name} {str(dtype).removeprefix('torch.')}"
    return dataclasses.replace(case, name=name, logits=[level.to(dtype) for level in case.logits])


def _infinities(case: Case) -> Case:
    """Every seventh score is infinite, for positives and negatives."""
    logits = case.logits[0].clone()
    logits[::14], logits[7::14] = math.inf, -math.inf
    positives = (case.labels[0] == 1).nonzero().squeeze(1)
    logits[positives[::7]], logits[positives[3::7]] = math.inf, -math.inf
    return dataclasses.replace(case, name="infinities", logits=[logits])


def _pyramid(size: Size) -> Case:
    """Three channel-first levels, as from a head's convolutions, with a class label for each anchor. One row in ten is
    ignored and holds a NaN, which must have no effect."""
    generator = _generator()
    anchors, classes = 3, 10
    side = max(4, int((size.logits / (anchors * classes * 21 / 16)) ** 0.5))
    logits, labels = [], []
    for width in (side, side // 2, side // 4):
        x = -3 + 1.5 * torch.randn(1, anchors * classes, width, width, generator=generator)
        x = x.view(1, anchors, classes, width, width).permute(0, 3, 4, 1, 2)
        y = torch.full(x.shape[:-1], classes)
        kind = torch.rand(y.shape, generator=generator)
        is_pos, is_ignored = kind < size.positives * classes / size.logits, kind > 0.9
        y[is_pos] = torch.randint(classes, (int(is_pos.sum()),), generator=generator)
        y[is_ignored] = _IGNORED
        x[..., 0][is_ignored] = math.nan
        logits.append(x)
        labels.append(y)
    num_pos = sum(int(((y >= 0) & (y < classes)).sum()) for y in labels)
    return Case("pyramid", logits, labels, torch.rand(num_pos, generator=generator))


def detector_cases(size: Size) -> list[Case]:
    """Scores and labels of the demo's detector at three times of its training, in float32."""
    file = resources.files(__package__) / "data" / "detector_logits.npz"
    try:
        content = io.BytesIO(file.read_bytes())
    except OSError:
        missing = f"{file} is missing: it is a part of the package, which needs to be installed again"
        return [Case("detector", [], [], torch.empty(0), missing=missing)]
    with np.load(content) as arrays:
        return [_detector_case(f"detector {time}", size, *_arrays(arrays, time)) for time in _REGIMES]


def _arrays(arrays: Mapping[str, Any], time: str) -> list[Tensor]:
    return [torch.from_numpy(arrays[f"{time}_{key}"]) for key in ("logits", "labels", "loc_errors")]


def _detector_case(name: str, size: Size, logits: Tensor, labels: Tensor, loc_errors: Tensor) -> Case:
    """All rows that are positive or ignored, and as many others as fit."""
    classes = logits.shape[-1]
    logits, labels = logits.reshape(-1, classes).float(), labels.reshape(-1)
    is_background = labels == classes
    kept = ~is_background | (torch.arange(len(labels)) % math.ceil(logits.numel() / size.logits) == 0)
    return Case(name, [logits[kept]], [labels[kept]], loc_errors.float())


def _label_each(labels: Tensor, classes: int) -> Tensor:
    """Class labels ``[...]`` to a label for each logit ``[..., C]``."""
    each = F.one_hot(labels.long().clamp(min=0), classes + 1)[..., :classes]
    return torch.where(labels[..., None] == _IGNORED, _IGNORED, each)
