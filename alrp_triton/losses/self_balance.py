"""Self-balancing: a weight that gives the localisation part of the aLRP loss the scale of the classification part."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from ..engine import operators, passes
from ..engine.devices import is_asynchronous

__all__ = ["SelfBalance"]

# Iterations of an open period after which somebody has probably forgotten to end it.
_FORGOTTEN = 10_000
_tracker = ModuleTracker()


def _recomputes() -> bool:
    """Whether this runs within a backward pass. False under torch.compile, which cannot tell and never calls this from
    backward."""
    return not torch.compiler.is_compiling() and _tracker.is_bw


class SelfBalance(nn.Module):
    """Weight of the localisation loss, set from the losses of the previous period.

    While scores are poor the ranks are large, so `cls` is near 1 and `loc` near 0, and a detector would hardly learn to
    localise. The average of (cls + loc)/loc over the previous epoch as the weight of `loc` corrects this, and becomes
    smaller as the scores improve. See "self-balancing" in section 4 of Oksuz, Cam, Akbas and Kalkan, "A Ranking-based,
    Balanced Loss Function Unifying Classification and Localisation in Object Detection", NeurIPS 2020
    (arXiv:2009.13592).

        balance = SelfBalance(period=3665)
        loss = cls + balance(cls, loc, has_positives) * loc

    An iteration counts if it has positives, the module is in training mode, and (cls + loc)/loc is finite: an iteration
    whose loss overflowed under mixed precision, or with `loc` = 0, does not count. Activation checkpointing does not
    count an iteration twice: a call within a backward pass is a recomputation and gets the current weight.

    The state is three buffers (`weight`, float32; `sums`, float64 `[2]`, numerator and denominator of the current
    period's average; `count`, int64, its counted iterations). So checkpoints have it, and a run resumed within a period
    gives the same bits as a run without a stop. The buffers move with the module, but `.half()`, `.bfloat16()`,
    `.to(dtype)` and similar calls, on the module or on a model around it, do not change their dtypes: half precision
    cannot hold a sum over an epoch. On the first call with losses on another device the state moves there. Call
    `.to(device)` yourself before `torch.compile` or the capture of a CUDA graph.

    The host does not wait for the device: only tensor operations read and write the state.

    With a small data set an epoch has few iterations. The average of so few is noisy, and the weight of the first
    epochs is that of a detector that has hardly learnt. Set `period` to about the iterations of an epoch of a usual
    data set (the paper's: 3665), or, if the whole training is shorter, take a constant weight instead:
    `ALRPLoss(self_balance=1.0)`.

    Args:
        init: weight of the first period, > 0 and finite.
        period: counted iterations in a period, >= 1. None: a period ends with each call of `step_epoch`. If that is
            never called, the weight stays at `init`; after 10,000 iterations a warning says so, once (counted by
            Python, so not within compiled or CUDA graphs).
        average: `"means"`, (mean of cls + mean of loc) / mean of loc (the authors' code), or `"ratios"`, the mean of
            (cls + loc)/loc (the paper). In the first iterations of a training the ratio is some hundreds, so that the
            mean of ratios over a short epoch is far too large for the next one.

    Raises:
        TypeError: `init` is not a number, or `period` neither an int nor None.
        ValueError: `init` or `period` out of range, or an unknown `average`.
    """

    weight: Tensor
    sums: Tensor
    count: Tensor
    _open = 0
    """Iterations since the first, until an epoch ends; -1 from then on."""

    def __init__(self, init: float = 50.0, period: int | None = None, average: str = "means") -> None:
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
        # float64, so that the sum of a long epoch does not stop growing. One tensor of two elements, because
        # torch.compile (2.12) treats a 0-dimensional float64 CPU tensor as a Python number and drops writes to it.
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, cls: Tensor, loc: Tensor, has_positives: bool) -> Tensor:
        """Records the losses of this iteration and returns the weight for it.

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
            # This happens once. The host need not wait for a copy to the GPU, but must wait for one from it.
            self.to(loc.device, non_blocking=is_asynchronous(loc.device))
        with torch.no_grad():
            if self.training and has_positives and not _recomputes():
                self._notice_forgotten()
                if passes.kernels_take(loc.device):
                    state = self.weight, self.sums, self.count
                    weight: Tensor = operators.balance(cls, loc, *state, self.period or 0, self.average == "means")
                    return weight
                self._count(cls.double(), loc.double())
            # Not the buffer itself: autograd may keep the result for backward, and the buffer changes later.
            return self.weight.clone()

    def step_epoch(self) -> None:
        """Ends a period: from now on the weight is the average over it. Without counted iterations the weight stays.

        Raises:
            RuntimeError: this object has a `period` and ends its periods itself.
        """
        if self.period is not None:
            raise RuntimeError(
                f"step_epoch: expected SelfBalance(period=None), got period={self.period}, which ends each period "
                f"after {self.period} counted iterations; drop either the call or the period"
            )
        self._open = -1
        with torch.no_grad():
            self._end_period(self.count > 0)

    def _notice_forgotten(self) -> None:
        """Warn once if no epoch ever ends."""
        # A graph would depend on the number.
        if torch.compiler.is_compiling() or self.period is not None or self._open < 0:
            return
        self._open += 1
        if self._open == _FORGOTTEN:
            self._open = -1
            warnings.warn(
                f"SelfBalance: {_FORGOTTEN} iterations without step_epoch(), so the weight of the localisation loss "
                "has not changed; call step_epoch() after each epoch, or set period, the iterations after which the "
                "weight changes (ignore this if your first epoch is longer)",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return f"init={self.init}, period={self.period}, average={self.average!r}"

    def _count(self, cls: Tensor, loc: Tensor) -> None:
        total = cls + loc
        ratio = total / loc
        # Finite in float32, the dtype of the weight, so the average of such ratios is finite too.
        counts = torch.isfinite(ratio.float())
        # Each average is a quotient of two sums: ratios by their number, or losses by localisation losses.
        terms = (ratio, torch.ones_like(ratio)) if self.average == "ratios" else (total, loc)
        self.sums.add_(torch.stack(terms).masked_fill(~counts, 0.0))
        self.count.add_(counts)
        if self.period is not None:
            self._end_period(self.count >= self.period)

    def _end_period(self, ends: Tensor) -> None:
        """If `ends` (0-dimensional bool): set the weight and reset the sums."""
        average = (self.sums[0] / self.sums[1]).float()
        self.weight.copy_(torch.where(ends, average, self.weight))
        self.sums.masked_fill_(ends, 0.0)
        self.count.masked_fill_(ends, 0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelfBalance":
        # Every conversion of a module calls this. If it changes a dtype, only the move is kept.
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
            # The host would have to wait for its truth value.
            raise TypeError("has_positives: expected a bool, got a tensor")
