"""Self-balancing: the weight that keeps the localisation part of the aLRP loss in step with the classification part."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from ..engine.devices import is_asynchronous

__all__ = ["SelfBalance"]

_tracker = ModuleTracker()


def _recomputes() -> bool:
    """Whether this runs within a backward pass. torch.compile, which cannot look, never calls one from there."""
    return not torch.compiler.is_compiling() and _tracker.is_bw


class SelfBalance(nn.Module):
    """Weight of the localisation loss, set from the losses of the period before.

    While scores are poor the ranks are large, so that `cls` is near 1 and `loc` near 0: a detector would hardly learn
    to localise. Multiplying `loc` by the mean of (cls + loc)/loc over the previous epoch undoes this, and settles by
    itself as the scores improve. See "self-balancing" in section 4 of Oksuz, Cam, Akbas and Kalkan, "A Ranking-based,
    Balanced Loss Function Unifying Classification and Localisation in Object Detection", NeurIPS 2020
    (arXiv:2009.13592).

        balance = SelfBalance(period=3665)
        loss = cls + balance(cls, loc, has_positives) * loc

    An iteration counts if it has positives, the module is in training mode, and (cls + loc)/loc is finite: neither an
    iteration whose loss overflowed under mixed precision nor one with `loc` = 0 leaves a trace. Nor does activation
    checkpointing count one twice: what runs within a backward pass is a recomputation, and gets the weight there is.

    The state is three buffers (`weight`, float32; `sums`, float64 `[2]`, numerator and denominator of the running
    period's average; `count`, int64, its counted iterations), so it goes into checkpoints, and a run resumed within a
    period gives the same bits as one that never stopped. The buffers move with the module, but `.half()`,
    `.bfloat16()`, `.to(dtype)` and the like, on the module or on a model around it, leave their dtypes alone: a sum
    over an epoch does not survive in half precision. On the first call with losses on another device the state moves
    there; call `.to(device)` oneself before `torch.compile` or the capture of a CUDA graph.

    Nothing waits for the device: the state is read and written by tensor operations only.

    Args:
        init: weight of the first period, > 0 and finite.
        period: counted iterations in a period, >= 1. None: a period is what lies between two calls of `step_epoch`.
        average: `"ratios"`, the mean of (cls + loc)/loc (the paper), or `"means"`, (mean of cls + mean of loc) / mean
            of loc (the authors' code).

    Raises:
        TypeError: `init` is not a number, or `period` neither an int nor None.
        ValueError: `init` or `period` out of range, or an unknown `average`.
    """

    weight: Tensor
    sums: Tensor
    count: Tensor

    def __init__(self, init: float = 50.0, period: int | None = None, average: str = "ratios") -> None:
        super().__init__()
        if isinstance(init, bool) or not isinstance(init, (int, float)):
            raise TypeError(f"init: expected a finite number > 0, got {type(init).__name__}")
        if not 0 < init <= torch.finfo(torch.float32).max:
            raise ValueError(f"init: expected a finite number > 0, got {init}")
        if period is not None and (isinstance(period, bool) or not isinstance(period, int)):
            raise TypeError(f"period: expected an int >= 1 or None, got {type(period).__name__}")
        if period is not None and period < 1:
            raise ValueError(f"period: expected an int >= 1 or None, got {period}")
        if average not in ("ratios", "means"):
            raise ValueError(f"average: expected 'ratios' or 'means', got {average!r}")
        self.init = float(init)
        self.period = period
        self.average = average
        self.register_buffer("weight", torch.tensor(self.init, dtype=torch.float32))
        # float64, so that the sum of a long epoch does not stop growing. One tensor of two, since torch.compile (2.12)
        # takes a 0-dimensional float64 CPU tensor for a Python number and drops what is written to it.
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, cls: Tensor, loc: Tensor, has_positives: bool) -> Tensor:
        """Takes note of this iteration's losses and returns the weight to use in it.

        With a set `period`, the iteration that completes a period already uses the new weight, as in the authors' code.
        In evaluation mode, and without positives, the weight is returned and nothing changes.

        Args:
            cls: classification loss, a 0-dimensional floating-point tensor; neither changed nor differentiated.
            loc: localisation loss before weighting, likewise.
            has_positives: whether the batch had any positives. A bool, known on the host.

        Returns:
            The weight: a new 0-dimensional float32 tensor without gradient.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a loss that is not 0-dimensional, or losses on different devices.
        """
        self._check(cls, loc, has_positives)
        if self.weight.device != loc.device:
            # Happens once. A copy to the GPU need not be waited for; one from it must be.
            self.to(loc.device, non_blocking=is_asynchronous(loc.device))
        with torch.no_grad():
            if self.training and has_positives and not _recomputes():
                self._count(cls.double(), loc.double())
            # Not the buffer itself: autograd may keep the result for backward, and the buffer is written again.
            return self.weight.clone()

    def step_epoch(self) -> None:
        """Ends a period: from here on the weight is the average over it. With no counted iteration the weight stays.

        Raises:
            RuntimeError: this object has a set `period`, and ends its periods itself.
        """
        if self.period is not None:
            raise RuntimeError(
                f"step_epoch: expected SelfBalance(period=None), got period={self.period}, which ends each period "
                f"after {self.period} counted iterations; drop either the call or the period"
            )
        with torch.no_grad():
            self._end_period(self.count > 0)

    def extra_repr(self) -> str:
        return f"init={self.init}, period={self.period}, average={self.average!r}"

    def _count(self, cls: Tensor, loc: Tensor) -> None:
        total = cls + loc
        ratio = total / loc
        # Finite in float32, the weight's dtype: an average of such ratios is finite as well.
        counts = torch.isfinite(ratio.float())
        # Either average is a quotient of two sums: ratios over their number, or losses over localisation losses.
        terms = (ratio, torch.ones_like(ratio)) if self.average == "ratios" else (total, loc)
        self.sums.add_(torch.stack(terms).masked_fill(~counts, 0.0))
        self.count.add_(counts)
        if self.period is not None:
            self._end_period(self.count >= self.period)

    def _end_period(self, ends: Tensor) -> None:
        """Where `ends` (0-dimensional bool): set the weight and start the sums again."""
        average = (self.sums[0] / self.sums[1]).float()
        self.weight.copy_(torch.where(ends, average, self.weight))
        self.sums.masked_fill_(ends, 0.0)
        self.count.masked_fill_(ends, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelfBalance":
        # Every conversion of a module goes through here. One that changes a dtype is replaced by the move alone.
        before = {name: getattr(self, name) for name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    @staticmethod
    def _check(cls: Tensor, loc: Tensor, has_positives: bool) -> None:
        for name, loss in (("cls", cls), ("loc", loc)):
            if not isinstance(loss, Tensor):
                raise TypeError(f"{name}: expected a 0-dimensional tensor, got {type(loss).__name__}")
            if not loss.is_floating_point():
                raise TypeError(f"{name}: expected a floating-point tensor, got {loss.dtype}")
            if loss.ndim != 0:
                raise ValueError(f"{name}: expected a 0-dimensional tensor, got shape {list(loss.shape)}")
        if cls.device != loc.device:
            raise ValueError(f"loc: expected the device of cls, {cls.device}, got {loc.device}")
        if isinstance(has_positives, Tensor):
            # Its truth value would have to be fetched from the device.
            raise TypeError("has_positives: expected a bool, got a tensor")
