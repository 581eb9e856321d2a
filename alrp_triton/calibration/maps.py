"""Monotone maps from scores to probabilities, in numpy and float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..metrics.dataset import Record, read_results
from ..metrics.measures import is_number

__all__ = ["Affine", "Calibration", "Floats", "Isotonic", "check_range", "logit"]

Floats: TypeAlias = NDArray[np.float64]
# The least positive number of float32, and the largest of float64 below 1: finite logits, and no other scores of
# either type are changed.
_LOWEST, _HIGHEST = 2.0**-149, 1 - 2.0**-53


@dataclass(frozen=True)
class Affine:
    """p = sigmoid(a logit(score) + b), with a > 0, as in J. Platt, "Probabilistic Outputs for Support Vector Machines",
    1999. The identity by default.

    Raises:
        TypeError, ValueError: ``a`` or ``b`` is no finite number, or ``a`` is not above 0.
    """

    a: float = 1.0
    b: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            if not is_number(value):
                raise TypeError(f"{name}: expected a number, got {value!r}")
            if not math.isfinite(value) or (name == "a" and value <= 0):
                raise ValueError(f"{name}: expected a finite number{' above 0' if name == 'a' else ''}, got {value}")

    def probabilities(self, logits: Floats) -> Floats:
        return sigmoid(self.a * logits + self.b)

    def __str__(self) -> str:
        return f"sigmoid({self.a:.6g} logit(score) {'-' if self.b < 0 else '+'} {abs(self.b):.6g})"


@dataclass(frozen=True)
class Isotonic:
    """A monotone curve: linear between points, and constant outside them.

    Raises:
        TypeError, ValueError: there are no points, not as many logits as values, or one of them falls.
    """

    logits: tuple[float, ...]
    """[K], ascending: logits of scores."""
    values: tuple[float, ...]
    """[K], not descending, in [0, 1]: probabilities at these points."""

    def __post_init__(self) -> None:
        x, y = np.asarray(self.logits, dtype=np.float64), np.asarray(self.values, dtype=np.float64)
        if x.ndim != 1 or x.shape != y.shape or not len(x):
            raise ValueError(f"values: expected one for each logit and at least one, got {len(y)} for {len(x)}")
        if not (np.isfinite(x).all() and (np.diff(x) > 0).all()):
            raise ValueError("logits: expected finite numbers in ascending order")
        if not ((y >= 0) & (y <= 1)).all() or (np.diff(y) < 0).any():
            raise ValueError("values: expected numbers in [0, 1] that do not fall")

    def probabilities(self, logits: Floats) -> Floats:
        return np.interp(logits, self.logits, self.values)

    def __str__(self) -> str:
        return f"isotonic, {len(self.logits)} points"


@dataclass(frozen=True)
class Calibration:
    """A map for all classes and, if there are any, own maps of some classes, by category id.

    Maps keep the order of scores. Computed in float64, an affine map also keeps different float32 scores different,
    unless their probabilities are within 1e-7 of 1. An isotonic map makes the scores of a step equal.
    """

    common: Affine | Isotonic = Affine()
    per_class: Mapping[int, Affine | Isotonic] = field(default_factory=dict)

    def __call__(self, scores: Any, categories: Any = None) -> Any:
        """The probabilities of scores that come from a sigmoid.

        Args:
            scores: a tensor, an array or numbers of any shape, in [0, 1]. 0 counts as the least positive number of
                float32, and 1 as the largest number of float64 below 1.
            categories: integers of the same shape, the category ids of the scores. Needed if classes have own maps;
                a class without its own takes the common one.

        Returns:
            A new tensor or array of the same shape and dtype, without a gradient; float64 unless ``scores`` has a
            floating dtype. Rounded to float32, different probabilities may become equal, above all near 1.

        Raises:
            TypeError, ValueError: wrong types or shapes, a score outside [0, 1] or NaN, or ``categories`` is missing.
        """
        values = _array("scores", scores)
        if values.dtype.kind not in "iuf" and values.size:
            raise TypeError(f"scores: expected real numbers, got dtype {values.dtype}")
        exact = values.astype(np.float64)
        check_range("scores", exact)
        logits = logit(exact)
        found = np.array(self.common.probabilities(logits))
        if self.per_class:
            if categories is None:
                raise ValueError("categories: expected the category ids of scores, because classes have own maps")
            ids = _array("categories", categories)
            if ids.shape != values.shape:
                raise ValueError(f"categories: expected the shape of scores, {values.shape}, got {ids.shape}")
            for category, own in self.per_class.items():
                mine = ids == category
                found[mine] = own.probabilities(logits[mine])
        if isinstance(scores, Tensor):
            dtype = scores.dtype if scores.is_floating_point() else torch.float64
            return torch.from_numpy(found).to(dtype).to(scores.device)
        return found.astype(values.dtype) if values.dtype.kind == "f" else found

    def apply(self, detections: Any) -> list[Record]:
        """New COCO results with calibrated scores, as float64; the input does not change.

        Args:
            detections: COCO results as :func:`alrp_triton.metrics.evaluate` takes them, scores in [0, 1].

        Raises:
            OSError, TypeError, ValueError: a file cannot be read, or a part of the data is wrong.
        """
        results = read_results(detections, ("category_id",))
        check_results(results)
        categories = [record["category_id"] for record in results]
        scores = self([record["score"] for record in results], categories)
        return [{**record, "score": score} for record, score in zip(results, scores.tolist())]

    def to_dict(self) -> dict[str, Any]:
        """Text, numbers, lists and dicts, ready for JSON."""
        per_class = {str(category): _plain(own) for category, own in self.per_class.items()}
        return {"common": _plain(self.common), "per_class": per_class}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """The inverse of :meth:`to_dict`.

        Raises:
            TypeError, ValueError: ``values`` does not describe a calibration.
        """
        if not isinstance(values, Mapping) or set(values) != {"common", "per_class"}:
            raise ValueError(f"values: expected a dict of 'common' and 'per_class', got {values!r}")
        per_class = {int(category): _map(own) for category, own in values["per_class"].items()}
        return cls(_map(values["common"]), per_class)

    def __str__(self) -> str:
        lines = [f"class {category}: {own}" for category, own in self.per_class.items()]
        return "\n".join([f"{'other' if lines else 'all'} classes: {self.common}", *lines])


def logit(scores: Floats) -> Floats:
    """Finite logits of scores in [0, 1]."""
    inside = np.clip(scores, _LOWEST, _HIGHEST)
    found: Floats = np.log(inside) - np.log1p(-inside)
    return found


def sigmoid(logits: Floats) -> Floats:
    """Accurate relative to the result, and without overflow."""
    found: Floats = np.exp(-np.logaddexp(0.0, -logits))
    return found


def check_range(name: str, scores: Floats) -> None:
    wrong = ~((scores >= 0) & (scores <= 1))
    if wrong.any():
        raise ValueError(f"{name}: expected numbers in [0, 1], got {scores[wrong][0]}")


def check_results(results: list[Record]) -> None:
    for i, record in enumerate(results):
        if not 0 <= record["score"] <= 1:
            raise ValueError(f"detections[{i}]['score']: expected a number in [0, 1], got {record['score']}")


def _array(name: str, values: Any) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        return np.asarray(values)
    except ValueError:
        raise ValueError(f"{name}: expected numbers of one shape") from None


def _plain(one: Affine | Isotonic) -> dict[str, Any]:
    if isinstance(one, Affine):
        return {"a": one.a, "b": one.b}
    return {"logits": list(one.logits), "values": list(one.values)}


def _map(values: Any) -> Affine | Isotonic:
    if isinstance(values, Mapping) and set(values) == {"a", "b"}:
        return Affine(**values)
    if isinstance(values, Mapping) and set(values) == {"logits", "values"}:
        return Isotonic(tuple(values["logits"]), tuple(values["values"]))
    raise ValueError(f"values: expected a map, of 'a' and 'b' or of 'logits' and 'values', got {values!r}")
