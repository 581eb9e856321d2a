"""Choices of cases and contenders."""

from __future__ import annotations

from typing import NamedTuple

from .workloads import REAL, REGIMES, Case


class Preset(NamedTuple):
    """What to measure."""

    about: str
    seconds: float  # for the runs of one contender on one case
    repeats: int  # at the most
    parts: dict[str, tuple[Case, ...]]
    """Cases for each set of contenders (:func:`~.peers.of_set`). The set "large" runs once."""
    memory: bool = False  # measure memory on the CPU in place of time


def _regimes(*cases: Case) -> tuple[Case, ...]:
    return tuple(case._replace(regime=regime) for case in cases for regime in REGIMES)


def _real(*cases: Case) -> tuple[Case, ...]:
    return tuple(case._replace(regime=regime) for case in cases for regime in REAL)


# 8 images of 512 x 512 in RetinaNet: 31.4 million logits. One of them for a CPU: 3.93 million.
LARGE = Case("retinanet", batch=8, num_positives=1000)
LARGE_HALF = LARGE._replace(dtype="bfloat16")
ON_CPU = Case("retinanet", batch=1, num_positives=500)
# As many logits as 16 images.
IMAGES = Case("retinanet", image=128, batch=16, num_positives=500)
# 6 images of 1024 x 1024: 1.57 million.
SMALL = Case("proposals", "middle", image=1024, batch=6, num_positives=300)
MEMORY = _regimes(Case("retinanet", num_positives=1000, num_logits=10**8))

_HEADS = (
    Case("atss", batch=16, layout="levels"),
    Case("second-stage", batch=16),
    Case("lvis", batch=4),
    Case("proposals", batch=16, image=800, layout="levels-last"),
)
_POSITIVES = tuple(LARGE._replace(num_positives=p) for p in (1, 10, 100, 5_000, 20_000))
_DECADES = tuple(10**k for k in range(5, 10))
_GPU_SCALE = tuple(
    Case("retinanet", dtype=dtype, num_positives=20_000, num_logits=m)
    for dtype in ("bfloat16", "float32")
    for m in _DECADES
)
_CPU_SCALE = (
    *(Case("retinanet", num_positives=1000, num_logits=m) for m in _DECADES),
    *(Case("retinanet", num_positives=p, num_logits=10**7) for p in (10, 100, 10_000, 100_000)),
)
_SMOKE = (
    Case("retinanet", "middle", image=64, batch=2, num_positives=20),
    Case("atss", "late", image=64, batch=2, num_positives=20, dtype="bfloat16", layout="levels"),
)
_CPU_SWEEPS = (
    *_real(ON_CPU),
    *(ON_CPU._replace(num_positives=p) for p in (1, 50, 5_000)),
    *(ON_CPU._replace(image=image) for image in (128, 256, 768)),
    ON_CPU._replace(layout="levels"),
    Case("atss", batch=2, dtype="bfloat16", layout="levels"),
    Case("proposals", batch=2),
    Case("second-stage", batch=2),
)
_FULL = (
    *(Case("retinanet", batch=b, num_positives=1000) for b in (2, 4, 16)),
    *_regimes(*_HEADS, *(LARGE._replace(layout=layout) for layout in ("levels", "levels-last"))),
    *(case._replace(dtype=dtype) for case in _HEADS for dtype in ("bfloat16", "float16")),
    *_regimes(LARGE._replace(dtype="float16")),
)
_STEPS = tuple(Case(model, "early", image=256, batch=2) for model in ("RetinaNet", "FCOS", "Faster R-CNN"))
_GPU = {"all": _regimes(LARGE, LARGE_HALF), "eager": (SMALL, *_real(LARGE), *_POSITIVES), "large": _GPU_SCALE}

PRESETS = {
    "smoke": Preset("seconds on a CPU, to see whether all of it runs", 0.1, 5, {"eager": _SMOKE}),
    "cpu": Preset("two cores, about 10 minutes", 6.0, 15, {"all": _regimes(ON_CPU), "eager": _CPU_SWEEPS}),
    "cpu-scale": Preset("four decades of logits and of positives; takes 10 GB", 1.0, 1, {"large": _CPU_SCALE}),
    "family": Preset("every loss, and a ranking for each image", 6.0, 15, {"family": _regimes(IMAGES)}),
    "memory": Preset("memory on a CPU at 100 million logits", 0.0, 1, {"memory": MEMORY}, memory=True),
    "step-share": Preset("the loss's share of torchvision's training steps", 20.0, 7, {"step": _STEPS}),
    "h100": Preset("what is claimed of a GPU, below 8 minutes on an H100", 0.5, 50, _GPU),
    "full": Preset("every head, regime, dtype and layout", 1.0, 50, {**_GPU, "eager": (*_GPU["eager"], *_FULL)}),
}
