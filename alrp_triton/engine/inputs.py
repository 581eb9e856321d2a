"""Validation: errors name the argument, what was expected and what was given."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import hints
from .named_groups import named_groups
from .processes import Processes, processes_of
from .transforms import refuse_transforms

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Outside this range 1 / (2 delta) is not a normal float32.
DELTAS = (1e-30, 1e30)
LABEL_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
# Also for labels in the shape of the logits, where 0 and 1 are false and true.
TRUTH_DTYPES = (torch.bool, *FLOAT_DTYPES)


class Levels(NamedTuple):
    """Logits and labels, level by level."""

    logits: list[Tensor]
    labels: list[Tensor]
    groups: Sequence[Tensor] = ()
    """The ranking of each logit, or of each row; empty if all are ranked together."""
    ignore_index: int = -1
    """The label of ignored logits."""
    processes: Processes | None = None
    """The processes that rank together with this one."""

    def each(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Logits, labels and groups of each level."""
        groups: Iterable[Tensor | None] = self.groups or repeat(None)
        return zip(self.logits, self.labels, groups)

    # Methods, since torch.compile of PyTorch 2.9 does not look into properties of tuples.
    def num_logits(self) -> int:
        """M, over all levels."""
        return sum(level.numel() for level in self.logits)

    def compute_dtype(self) -> torch.dtype:
        """The dtype scores are compared in, see :func:`compute_dtype`."""
        return compute_dtype(self.logits[0].dtype)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores of a dtype are compared: half precision and float32 in float32, float64 in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def debug_checks() -> bool:
    """Whether ``ALRP_TRITON_DEBUG=1`` turns on checks for which the host waits for the GPU."""
    return os.environ.get("ALRP_TRITON_DEBUG", "0") not in ("", "0")


def check_inputs(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor | Sequence[Tensor],
    *,
    delta: float,
    ignore_index: int,
    groups: Tensor | Sequence[Tensor] | str | None = None,
    per_positive: Mapping[str, Tensor] | None = None,
    num_positives: int | None = None,
    eps: float = 0.0,
    process_group: Any = None,
) -> Levels:
    """Check everything that can be checked without reading a tensor.

    Args:
        logits: ``[..., C]`` or ``[M]``, or a sequence of such tensors.
        labels: integers like ``logits``, or without the last axis; one tensor for each of ``logits``. Those like
            ``logits`` may also be bools, or floats of 0, 1 and ``ignore_index``; they are returned as integers.
        delta: half width of the ramp: 0, or from 1e-30 to 1e30.
        ignore_index: the label of ignored logits.
        groups: integers of the logits' shape, or without the last axis, one tensor for each of ``logits``; or a name,
            see :func:`named_groups`. None for one ranking of all.
        per_positive: by name, ``[P]`` floats, one for each positive.
        num_positives: P, if the caller gives it.
        eps: positives with at most this many false positives send nothing; >= 0.
        process_group: its processes rank together: a process group, True for the default one, or :class:`Processes`.
            None for this process alone.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given.
        RuntimeError: within a transform of ``torch.func`` or forward-mode differentiation.
    """
    if num_positives is not None and (isinstance(num_positives, bool) or not isinstance(num_positives, int)):
        hint = (
            "; ALRPLoss and RankSortLoss take boxes"
            if isinstance(num_positives, Tensor) and num_positives.dim()
            else ""
        )
        raise TypeError(f"num_positives: expected an int or None, got {type(num_positives).__name__}{hint}")
    processes = None if process_group is None else processes_of(process_group)
    scores = check_tensors("logits", logits)
    if isinstance(groups, str):
        groups = named_groups(groups, scores, processes)
    ids = () if groups is None else check_tensors("groups", groups)
    levels = Levels(scores, check_tensors("labels", labels), ids, ignore_index, processes)
    for name, given in (("logits", levels.logits), ("labels", levels.labels), ("groups", levels.groups)):
        refuse_transforms(name, given)
    for name, tensors in (("labels", levels.labels), ("groups", levels.groups)):
        if len(tensors) != len(levels.logits) and (name == "labels" or groups is not None):
            raise ValueError(
                f"{name}: expected one tensor for each of the {len(levels.logits)} logits, got {len(tensors)}"
            )
    if not levels.logits:
        raise ValueError("logits: expected at least one tensor, got an empty sequence")
    first = levels.logits[0]
    for i, (x, y, z) in enumerate(levels.each()):
        at = f"[{i}]" if len(levels.logits) > 1 else ""
        if x.dtype not in FLOAT_DTYPES:
            hint = hints.for_dtype_of_logits(x, y)
            raise TypeError(f"logits{at}: expected float16, bfloat16, float32 or float64, got {x.dtype}{hint}")
        if x.dim() == 0:
            raise ValueError(f"logits{at}: expected at least one dimension, got a scalar")
        if y.dtype not in LABEL_DTYPES and (y.dtype not in TRUTH_DTYPES or y.shape != x.shape):
            raise TypeError(
                f"labels{at}: expected integers, or bools or floats of 0, 1 and ignore_index in the shape of the "
                f"logits, {list(x.shape)}; got {y.dtype} of shape {list(y.shape)}{hints.for_dtype_of_labels(x, y)}"
            )
        if x.dtype != first.dtype:
            raise TypeError(f"logits{at}: expected the dtype of the first level, {first.dtype}, got {x.dtype}")
        if y.shape != x.shape and y.shape != x.shape[:-1]:
            raise ValueError(
                f"labels{at}: expected shape {list(x.shape)} (a label for each logit) or {list(x.shape[:-1])} "
                f"(a class index for each row), got {list(y.shape)}{hints.for_shape_of_labels(x, y)}"
            )
        if z is not None and z.dtype not in LABEL_DTYPES:
            raise TypeError(f"groups{at}: expected an integer dtype, got {z.dtype}")
        for what, tensor in (("logits", x), ("labels", y), ("groups", z)):
            if tensor is not None:
                _check_layout(f"{what}{at}", tensor)
        if z is not None and z.shape != x.shape and z.shape != x.shape[:-1]:
            raise ValueError(
                f"groups{at}: expected shape {list(x.shape)} (a group for each logit) or {list(x.shape[:-1])} "
                f"(for each row), got {list(z.shape)}"
            )
        for what, tensor in (("logits", x), ("labels", y), ("groups", z)):
            if tensor is not None and tensor.device != first.device:
                raise ValueError(
                    f"{what}{at}: expected device {first.device}, as the first logits, got {tensor.device}"
                )
    if num_positives is not None and num_positives < 0:
        raise ValueError(f"num_positives: expected an int >= 0 or None, got {num_positives}")
    num_logits = sum(level.numel() for level in levels.logits)
    if num_positives is not None and num_positives > num_logits:
        raise ValueError(
            f"num_positives: expected at most one for each of the {num_logits} logits, got {num_positives}"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: expected a number, got {type(eps).__name__}")
    # An int may be larger than the largest float.
    if not eps >= 0 or (isinstance(eps, int) and eps > sys.float_info.max):
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    for name, values in (per_positive or {}).items():
        _check_per_positive(name, values, first.device)
    if isinstance(delta, bool) or not isinstance(delta, (int, float)):
        raise TypeError(f"delta: expected a number, got {type(delta).__name__}")
    if delta != 0 and not DELTAS[0] <= delta <= DELTAS[1]:
        raise ValueError(f"delta: expected 0 or a number from {DELTAS[0]} to {DELTAS[1]}, got {delta}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index: expected an int of 64 bits, got {ignore_index}")
    return levels._replace(labels=[_as_integers(y, ignore_index) for y in levels.labels])


def _as_integers(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels of logits as integers, without reading a value on the host. Bools keep their memory. A float that is none
    of 0, 1 and ``ignore_index`` becomes an integer that is none of them, so that it is found out where integers are."""
    if labels.dtype in LABEL_DTYPES:
        return labels
    if labels.dtype == torch.bool:
        return labels.view(torch.uint8)
    # All integers up to this are floats of the dtype.
    exact = abs(ignore_index) <= 2 / torch.finfo(labels.dtype).eps
    kept = [0, 1, *([ignore_index] if exact else [])]
    dtype = next(dtype for dtype in (torch.int8, torch.int64) if abs(kept[-1]) <= torch.iinfo(dtype).max)
    integers = torch.full_like(labels, 2 if ignore_index != 2 else 3, dtype=dtype)
    for value in kept:
        integers.masked_fill_(labels == value, value)
    return integers


def _check_per_positive(name: str, values: Tensor, device: torch.device) -> None:
    """Check a ``[P]`` float tensor that holds one number for each positive."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(values).__name__}{hints.for_no_tensor(values)}")
    refuse_transforms(name, [values])
    if values.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating-point dtype, got {values.dtype}")
    _check_layout(name, values)
    if values.dim() != 1:
        raise ValueError(
            f"{name}: expected shape [P], one for each positive, got {list(values.shape)}{hints.for_values(values)}"
        )
    if values.device != device:
        raise ValueError(f"{name}: expected device {device}, as the logits, got {values.device}")


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {tensor.layout}")


def check_tensors(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """A tensor, or each of a sequence of tensors, as a list; without what subclasses carry with their data."""
    if isinstance(value, Tensor):
        return [plain(value)]
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, dict)) or hasattr(value, "__array__"):
        kind = type(value).__name__
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors, got {kind}{hints.for_no_tensor(value)}")
    tensors = list(value)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            hint = hints.for_no_tensor(tensor)
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(tensor).__name__}{hint}")
    return [plain(tensor) for tensor in tensors]


def plain(tensor: Tensor) -> Tensor:
    """The tensor without the class of one that only carries more with it, such as MONAI's MetaTensor, whose methods are
    not those of a tensor. Others, such as fake tensors, are their own."""
    if type(tensor) in (Tensor, Parameter) or torch.compiler.is_compiling():
        return tensor
    is_data = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return tensor.as_subclass(Tensor) if is_data else tensor
