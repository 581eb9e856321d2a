"""Checks of every backend on this machine against the float64 reference; prints nothing.

A check runs one backend on one case, forward and backward, several times. It passes if every error is within
:data:`BOUND` and every run gives the same bits. On the CPU the Triton backends run only in Triton's interpreter, which
must be chosen before Triton is imported; so :func:`interpreted` runs those checks in a separate process.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine.passes import has_passes, runs_triton, why_unavailable
from .verify_cases import FULL, INTERPRETED, QUICK, Case, cases
from .verify_losses import compute

BOUND = 1e-6
"""The upper limit of each error of a :class:`Row`, in any dtype."""


class Row(NamedTuple):
    """One check. Errors are relative; infinite for a NaN, or for a nonzero value instead of 0."""

    case: str
    backend: str
    device: str
    score_gradient: float = math.inf
    """|error| / |exact| (2-norms) of the gradient of the scores, all levels together; see :func:`relative_errors`."""
    worst: float = math.inf
    """Its largest error of one element, relative to the largest exact element."""
    cls: float = math.inf
    loc: float = math.inf
    rank: float = math.inf
    loc_gradient: float = math.inf
    """|error| / |exact| of the gradient of the localisation errors; likewise ``cls``, ``loc`` and ``rank``."""
    same_bits: bool = False
    """Whether all runs gave the same bits."""
    milliseconds: float = math.inf
    """Median time of forward and backward."""
    failure: str = ""
    """The reason if there are no figures."""

    @property
    def misses(self) -> list[str]:
        """The failed limits, in words; empty if the check passed."""
        if self.failure:
            return [self.failure]
        errors = {name.replace("_", " "): getattr(self, name) for name in ERRORS}
        found = [f"{name} {error:.1e} (allowed {BOUND:.0e})" for name, error in errors.items() if not error <= BOUND]
        return found if self.same_bits else [*found, "two runs differ in their bits"]

    @property
    def status(self) -> str:
        """``"ok"`` or ``"MISS"``."""
        return "MISS" if self.misses else "ok"


ERRORS = ("score_gradient", "worst", "cls", "loc", "rank", "loc_gradient")
"""The fields of a :class:`Row` that are errors."""


class Check(NamedTuple):
    """One check to be run."""

    case: Case
    backend: str
    device: torch.device
    repeats: int

    def run(self) -> Row:
        """Run it. An error of the backend becomes the row's ``failure``."""
        row = Row(self.case.name, self.backend, str(self.device), failure=self.case.missing)
        if row.failure:
            return row
        try:
            return row._replace(**self._measure())
        except Exception as error:
            return row._replace(failure=f"{type(error).__name__}: {str(error).strip() or 'no message'}")

    def _measure(self) -> dict[str, Any]:
        case, exact = self.case, self.case.exact
        arguments = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in case.arguments.items()
        }
        levels = [level.to(self.device).requires_grad_() for level in case.logits]
        labels = [level.to(self.device) for level in case.labels]
        errors = case.loc_errors.to(self.device).requires_grad_()

        def step() -> list[Tensor]:
            cls, loc, rank = compute(case.loss, levels, labels, errors, backend=self.backend, **arguments)
            gradients = torch.autograd.grad(cls + loc, [errors, *levels])
            return [cls.detach(), loc.detach(), rank, *gradients]

        first = step()
        times, same_bits = [], True
        for _ in range(self.repeats):
            milliseconds, again = _timed(step, self.device)
            times.append(milliseconds)
            same_bits &= all(_bits(one).equal(_bits(other)) for one, other in zip(first, again))
        cls, loc, rank, grad_errors, *grad_levels = first
        score_gradient, worst = relative_errors(torch.cat([g.reshape(-1) for g in grad_levels]), exact.grad_logits)
        return {
            "score_gradient": score_gradient,
            "worst": worst,
            "cls": relative_errors(cls, exact.cls)[0],
            "loc": relative_errors(loc, exact.loc)[0],
            "rank": relative_errors(rank, exact.rank)[0],
            "loc_gradient": relative_errors(grad_errors, exact.grad_loc_errors)[0],
            "same_bits": same_bits,
            "milliseconds": statistics.median(times),
        }


def plan(
    backends: Iterable[str], devices: Iterable[torch.device], *, quick: bool = False
) -> tuple[list[Check], list[tuple[str, torch.device, str]]]:
    """All checks for this machine, and those that cannot run: ``(backend, device, why)``.

    Args:
        backends: names as :func:`alrp_triton.alrp_loss` takes them, without ``"auto"``.
        devices: where to run them.
        quick: smaller cases, fewer runs.
    """
    checks, unavailable = [], []
    for device in devices:
        for backend in backends:
            reason = why_unavailable(backend, device)
            if reason is not None:
                unavailable.append((backend, device, reason))
                continue
            in_interpreter = runs_triton(backend) and os.environ.get("TRITON_INTERPRET", "0") == "1"
            size = INTERPRETED if in_interpreter else QUICK if quick else FULL
            # The reference is slow, and its exact time does not matter.
            repeats = 1 if not has_passes(backend) else size.repeats
            checks += [Check(case, backend, device, repeats) for case in cases(size)]
    return checks, unavailable


def interpreted(backends: Iterable[str]) -> Iterator[Row]:
    """Checks of Triton backends on the CPU, in Triton's interpreter, in a separate process; small cases.

    A process that ends early becomes a row that says so.
    """
    # The interpreter uses NumPy, which warns of infinities that are part of a case.
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", __name__, *backends]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield Row(**json.loads(line))
        except BaseException:  # the caller does not need the other rows
            process.terminate()
            raise
    if process.returncode != 0:
        yield Row("all", " ".join(backends), "cpu", failure=f"Triton's interpreter: exit status {process.returncode}")


def relative_errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Error of the norm, and of the worst element; in half precision beyond the rounding error.

    Args:
        actual: float16, bfloat16, float32 or float64, any shape, any device.
        exact: the same shape in float64; finite.

    Returns:
        ``(|error| / |exact|, max |error| / max |exact|)``. In float16 and bfloat16 an element's error is the least
        change of the exact value after which it would be rounded to the actual one: 0 for the value nearest to it.
    """
    exact = exact.detach().double().cpu().reshape(-1)
    found = actual.detach().double().cpu().reshape(-1)
    if found.shape != exact.shape or not found.isfinite().all():
        return math.inf, math.inf
    error = (found - exact).abs()
    if actual.dtype in (torch.float16, torch.bfloat16):
        error = (error - _rounding(found, exact, torch.finfo(actual.dtype))).clamp(min=0)
    if not error.any():
        return 0.0, 0.0
    if not exact.any():
        return math.inf, math.inf
    return float(error.norm() / exact.norm()), float(error.max() / exact.abs().max())


def _rounding(found: Tensor, exact: Tensor, dtype: torch.finfo) -> Tensor:
    """Distance from ``found``, towards ``exact``, of the numbers that are rounded to it."""
    mantissa, exponent = torch.frexp(found)
    smallest = dtype.smallest_normal * dtype.eps
    spacing = torch.ldexp(torch.full_like(found, dtype.eps), exponent - 1).clamp(min=smallest)
    spacing = torch.where(found == 0, smallest, spacing)  # 0 has no exponent
    # The spacing below a power of two is half as wide, down to the subnormal numbers.
    finer = (mantissa.abs() == 0.5) & (exact.abs() < found.abs()) & (spacing > smallest)
    return spacing / torch.where(finer, 4, 2)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _timed(step: Callable[[], list[Tensor]], device: torch.device) -> tuple[float, list[Tensor]]:
    """Milliseconds on the device, and what the step returned."""
    if device.type != "cuda":
        begin = time.perf_counter()
        result = step()
        return 1e3 * (time.perf_counter() - begin), result
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), result


def _main(backends: list[str]) -> None:
    """The process of :func:`interpreted`: prints a row of JSON for each check."""
    checks, unavailable = plan(backends, [torch.device("cpu")])
    failed = (Row("all", backend, str(device), failure=reason) for backend, device, reason in unavailable)
    for row in itertools.chain(failed, (check.run() for check in checks)):
        print(json.dumps(row._asdict()), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
