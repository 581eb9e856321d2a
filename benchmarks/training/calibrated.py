"""What a threshold of 0.5 shows before and after scores are calibrated on ``val``."""

from __future__ import annotations

from pathlib import Path

from alrp_triton.calibration import fit
from alrp_triton.calibration.report import before_and_after, overall

from .contenders import CONTENDERS
from .data import Dataset
from .figures import detections_of
from .plan import Plan
from .tables import Table

_SETTINGS = {"iou": 0.5, "iou_type": "bbox", "max_detections": 100}


def table(plan: Plan, dataset: Dataset, folder: Path) -> Table:
    """For the longest run of the first seed of each loss, an affine map fitted on ``val``, and the detections of
    ``test`` before and after it; of ``val`` if there is no ``test``."""
    split = "test" if "test" in dataset.splits else "val"
    rows = []
    for name in plan.contenders:
        for run in plan.runs(name, plan.lengths[-1])[:1]:
            fitted, shown = (detections_of(folder, run, each) for each in ("val", split))
            if not (fitted.exists() and shown.exists()):
                continue
            calibration = fit(dataset.splits["val"].truth, fitted)
            matches = before_and_after(dataset.splits[split].truth, shown, calibration, **_SETTINGS)
            _, (before, after) = overall(*matches, 0.5)
            # ECE, then number, precision and recall from 0.5 on.
            rows.append([CONTENDERS[name].title, *before[2:6], *after[2:6]])
    columns = ["loss", "ECE", "shown", "precision", "recall", "ECE after", "shown", "precision", "recall"]
    objects = sum(len(sample.boxes) for sample in dataset.splits[split].samples)
    title = f"Detections on {split} that a threshold of 0.5 shows, of {objects} objects, before and after calibration"
    return Table("calibration", title, columns, rows)
