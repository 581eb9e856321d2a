"""The numbers of :func:`alrp_triton.metrics.evaluate` as a TorchMetrics metric; needs torchmetrics, and pycocotools.

metric = LocalisationRecallPrecision()
for images, targets in batches:
    metric.update(model(images), targets)
metric.compute()["olrp"]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .evaluation import COCO_AREA_RANGES, evaluate
from .results import Scores

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat
except ImportError as error:
    raise ImportError("LocalisationRecallPrecision needs torchmetrics: pip install torchmetrics") from error

__all__ = ["LocalisationRecallPrecision"]

# The columns of each state.
_STATES = {
    "detections": ("label", "score", "x", "y", "width", "height"),
    "objects": ("label", "iscrowd", "area", "x", "y", "width", "height"),
    "counts": ("detections", "objects"),
}
_MEANS = ("ap", "ap50", "ap75", "ap90", "olrp", "olrp_loc", "olrp_fp", "olrp_fn", "rho")
_AT_THRESHOLD = ("lrp", "lrp_loc", "lrp_fp", "lrp_fn")
_PER_CLASS = ("ap", "olrp", "olrp_threshold", "rho")


class LocalisationRecallPrecision(Metric):  # type: ignore[misc]  # without types where it is not installed
    """AP, optimal LRP and rank correlation of boxes, in TorchMetrics' format of detections.

    ``compute()`` returns a dict of float64 scalars, NaN if undefined: ``ap``, ``ap50``, ``ap75``, ``ap90``, ``olrp``,
    ``olrp_loc``, ``olrp_fp``, ``olrp_fn``, ``rho``; ``ap_at_0.65`` for 0.65 among ``iou_thresholds``; ``ap_small`` and
    ``olrp_small`` for each area range; with ``score_threshold`` also ``lrp``, ``lrp_loc``, ``lrp_fp``, ``lrp_fn``.
    With ``class_metrics`` also ``classes`` [K], the labels that occur on either side, in ascending order, and for these
    [K] each ``ap_per_class``, ``olrp_per_class``, ``olrp_threshold_per_class`` and ``rho_per_class``; TorchMetrics
    makes scalars if there is only one class. :class:`~alrp_triton.metrics.DetectionMetrics` explains the numbers.

    TorchMetrics gathers the states of a distributed run; processes may have different numbers of images.

    Args:
        box_format: ``"xyxy"``, ``"xywh"`` or ``"cxcywh"``, in pixels.
        tau, max_detections, iou_thresholds, score_threshold, area_ranges: as for :func:`~alrp_triton.metrics.evaluate`.
        class_metrics: whether to give the numbers of each class.
        **kwargs: those of ``torchmetrics.Metric``.

    Raises:
        ImportError: pycocotools is not installed.
        TypeError, ValueError: an argument is wrong; the message says which.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    detections: list[Tensor] | Tensor
    objects: list[Tensor] | Tensor
    counts: list[Tensor] | Tensor

    def __init__(
        self,
        box_format: str = "xyxy",
        *,
        tau: float = 0.5,
        max_detections: int = 100,
        iou_thresholds: Iterable[float] = (),
        score_threshold: float | Mapping[int, float] | None = None,
        area_ranges: Mapping[str, tuple[float, float]] = COCO_AREA_RANGES,
        class_metrics: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if box_format not in ("xyxy", "xywh", "cxcywh"):
            raise ValueError(f"box_format: expected 'xyxy', 'xywh' or 'cxcywh', got {box_format!r}")
        if not isinstance(class_metrics, bool):
            raise TypeError(f"class_metrics: expected a bool, got {type(class_metrics).__name__}")
        self.box_format = box_format
        self.class_metrics = class_metrics
        self.settings: dict[str, Any] = {
            "tau": tau,
            "max_detections": max_detections,
            "iou_thresholds": tuple(iou_thresholds),
            "score_threshold": score_threshold,
            # A plain dict, because the default cannot be pickled.
            "area_ranges": dict(area_ranges),
        }
        # Raise for wrong settings here, not after an epoch.
        evaluate({"images": [], "annotations": []}, [], **self.settings)
        for state in _STATES:
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def update(self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Tensor]]) -> None:
        """Add images. Only ``compute()`` reads values, so this does not wait for a device.

        Args:
            preds: for each image ``boxes`` [N, 4], ``scores`` [N] and integer ``labels`` [N]; N may be 0.
            target: for each image ``boxes`` [G, 4] and integer ``labels`` [G]; optionally ``iscrowd`` [G], 0 or 1, and
                ``area`` [G] instead of that of the boxes; G may be 0.

        Raises:
            TypeError, ValueError: the message says which entry of which image is wrong.
        """
        for name, items in (("preds", preds), ("target", target)):
            if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
                raise TypeError(f"{name}: expected a list of dicts, got {type(items).__name__}")
        if len(preds) != len(target):
            raise ValueError(f"target: expected as many images as preds, {len(preds)}, got {len(target)}")
        detections = [self._rows(f"preds[{i}]", item, {"scores": None}) for i, item in enumerate(preds)]
        # NaN means the area of the box.
        optional = {"iscrowd": 0.0, "area": torch.nan}
        objects = [self._rows(f"target[{i}]", item, optional) for i, item in enumerate(target)]
        if preds:
            self._append("detections", torch.cat(detections))
            self._append("objects", torch.cat(objects))
            sizes = [[len(found), len(truth)] for found, truth in zip(detections, objects)]
            self._append("counts", torch.tensor(sizes, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """The numbers for all images so far; see the class."""
        detections, objects, counts = (self._table(state) for state in _STATES)
        truth: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        starts = [0, 0]
        for image, sizes in enumerate(counts.tolist()):
            ends = [start + size for start, size in zip(starts, sizes)]
            for label, score, *box in detections[starts[0] : ends[0]].tolist():
                found.append({"image_id": image, "category_id": int(label), "score": score, "bbox": box})
            for label, crowd, area, *box in objects[starts[1] : ends[1]].tolist():
                record = {"image_id": image, "category_id": int(label), "iscrowd": crowd, "bbox": box, "area": area}
                if math.isnan(area):
                    del record["area"]
                truth.append(record)
            starts = ends
        labels = sorted({record["category_id"] for record in [*truth, *found]})
        dataset = {
            "images": [{"id": image} for image in range(len(counts))],
            "categories": [{"id": label} for label in labels],
            "annotations": truth,
        }
        metrics = evaluate(dataset, found, **self.settings)
        values = {name: getattr(metrics, name) for name in _MEANS}
        for threshold in self.settings["iou_thresholds"]:
            values[f"ap_at_{threshold:g}"] = metrics.ap_at[round(threshold, 9)]
        if self.settings["score_threshold"] is not None:
            values |= {name: getattr(metrics, name) for name in _AT_THRESHOLD}
        for area_name, means in metrics.by_area.items():
            values |= {f"ap_{area_name}": means.ap, f"olrp_{area_name}": means.olrp}
        numbers = {name: self._tensor(value) for name, value in values.items()}
        if self.class_metrics:
            numbers["classes"] = torch.tensor(labels, dtype=torch.int64, device=self.device)
            classes: list[Scores] = list(metrics.per_class.values())
            for name in _PER_CLASS:
                numbers[f"{name}_per_class"] = self._tensor([getattr(one, name) for one in classes])
        return numbers

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes, as TorchMetrics does."""
        # For a process without images TorchMetrics would send a tensor of other shape and dtype than the others' rows.
        for state in _STATES:
            if len(getattr(self, state)) == 0:
                self._append(state, self._table(state))
        super().sync(*args, **kwargs)

    def _rows(self, name: str, item: Mapping[str, Tensor], others: Mapping[str, float | None]) -> Tensor:
        """One row for each box: label, ``others`` (by name, with a default unless required), x, y, w, h."""
        if not isinstance(item, Mapping):
            raise TypeError(f"{name}: expected a dict, got {type(item).__name__}")
        for key in ("boxes", "labels", *others):
            if key not in item:
                if others.get(key) is None:
                    raise ValueError(f"{name}: expected the key {key!r}, got {', '.join(map(repr, item)) or 'none'}")
            elif not isinstance(item[key], Tensor):
                raise TypeError(f"{name}[{key!r}]: expected a tensor, got {type(item[key]).__name__}")
        boxes, labels = item["boxes"], item["labels"]
        if labels.ndim != 1:
            raise ValueError(f"{name}['labels']: expected shape [N], got {list(labels.shape)}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{name}['labels']: expected integers, got {labels.dtype}")
        if boxes.shape != (len(labels), 4) and boxes.numel() + len(labels):
            raise ValueError(f"{name}['boxes']: expected shape [{len(labels)}, 4], got {list(boxes.shape)}")
        columns = [labels]
        for key, default in others.items():
            column = item.get(key)
            if column is None:
                assert default is not None
                column = torch.full_like(labels, default, dtype=torch.float64)
            elif column.shape != labels.shape:
                raise ValueError(f"{name}[{key!r}]: expected shape [{len(labels)}], got {list(column.shape)}")
            columns.append(column)
        first, second = boxes.detach().reshape(-1, 4).to(self.device, torch.float64).split(2, dim=1)
        if self.box_format == "xyxy":
            second = second - first
        elif self.box_format == "cxcywh":
            first = first - second / 2
        leading = [column.detach().to(self.device, torch.float64)[:, None] for column in columns]
        return torch.cat([*leading, first, second], dim=1)

    def _append(self, state: str, rows: Tensor) -> None:
        # After gathering, a state is one tensor.
        value = getattr(self, state)
        setattr(self, state, [*([value] if isinstance(value, Tensor) else value), rows])

    def _table(self, state: str) -> Tensor:
        """All rows of a state."""
        value = getattr(self, state)
        if len(value):
            rows: Tensor = dim_zero_cat(value)
            return rows
        dtype = torch.int64 if state == "counts" else torch.float64
        return torch.zeros(0, len(_STATES[state]), dtype=dtype, device=self.device)

    def _tensor(self, value: float | list[float]) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)
