"""Whether what a call gave is what the float64 reference gives, and how near the reference may be taken at its word.

The rules, from narrow to wide:

* A NaN that takes part makes every result NaN, but the gradients of ignored logits, which are 0.
* Otherwise results agree to 1e-6 (float64 logits: 1e-9) of their norm and of their largest element, or, in half
  precision, are the exact ones rounded. Results beyond a dtype's range are infinite.
* Negatives that add up to less than some 1e-5 of a false positive are known only as far as the fixed point of pass 1
  resolves them (the pairwise form: float32): what their positive sends is shared out among them that much less exactly.
* False positives that add up to ``eps`` to the last digit may be on either side of it: gradients are not compared.
* Values that are infinite, or so large that their sums leave float64 or gradients leave float32: what depends on them
  is NaN or infinite, never a number; the rest agrees, or is NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from dialect import Results
from fuzz_cases import Problem
from torch import Tensor

from alrp_triton import reference
from alrp_triton.engine.scans import fraction_bits

LARGEST_VALUE, LARGEST_GRADIENT = 1e250, 1e27


class Wrong(AssertionError):
    """A result that is not what it should be."""


def judge(problem: Problem, found: Results) -> str:
    """Raise :class:`Wrong`, or say how the results were judged.

    Args:
        problem: what was asked.
        found: of the components by their names, and of ``"<component> by <leaf>"`` and ``"all by <leaf>"`` what there
            is; gradients of logits flat, with NaN at those that were not asked for.
    """
    flat, labels, groups = problem.flat_logits, problem.flat_labels, problem.flat_groups
    values = _as_compared(problem)
    taking_part = labels != -1
    arguments = {k: v for k, v in problem.arguments.items() if k not in ("ignore_index", "num_positives")}

    def ask(values: Tensor) -> Results:
        return _with_sums(problem.member.judge(flat, labels, values, groups=groups, **arguments), problem)

    if flat[taking_part].isnan().any() or (problem.member.takes and values.isnan().any()):
        for results, who in ((ask(values), "the reference"), (found, "the loss")):
            _all_nan(results, taking_part, who)
        return "NaN"
    if problem.member.takes and bool((values.abs() > LARGEST_VALUE).any()):
        return _judge_extreme(problem, found, ask, values)
    expected = ask(values)
    for name, wanted in expected.items():
        if not wanted.isfinite().all():
            raise Wrong(f"{name}: the reference is not finite: {wanted}")
    slack = Slack(problem, expected, values)
    for name, actual in found.items():
        by = name.endswith("by logits")
        if by and slack.at_the_gate:
            continue
        kept = _asked_for(problem) if by else ...
        _agree(name, actual[kept], expected[name][kept], problem, slack.of(name))
        if by and (actual[kept & ~taking_part] != 0).any():
            raise Wrong(f"{name}: not 0 where ignored")
    return "at eps" if slack.at_the_gate and any("by logits" in name for name in found) else "agreed"


def _as_compared(problem: Problem) -> Tensor:
    """Values in float64; IoUs are taken in the dtype of the scores first."""
    values = problem.values.detach()
    return (values.to(_compute_dtype(problem)) if problem.member.takes == "ious" else values).double()


def _compute_dtype(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.double else torch.float32


def _with_sums(results: Results, problem: Problem) -> Results:
    """With what one backward of all components gives."""
    results = dict(results)
    for leaf in {leaf for _, leaf in problem.member.derivatives}:
        parts = [results[f"{component} by {name}"] for component, name in problem.member.derivatives if name == leaf]
        results[f"all by {leaf}"] = torch.stack(parts).sum(0)
    return {name: problem.upstream * result if " by " in name else result for name, result in results.items()}


def _asked_for(problem: Problem) -> Tensor:
    each = zip(problem.logits, problem.requires_grad)
    return torch.cat([torch.full((x.numel(),), wanted) for x, wanted in each])


def _all_nan(results: Results, taking_part: Tensor, who: str) -> None:
    for name, result in results.items():
        of = result[taking_part] if name.endswith("by logits") else result
        if not of.isnan().all():
            raise Wrong(f"{name}: {who} hides a NaN: {of}")
        if name.endswith("by logits"):
            # Those that were not asked for are NaN.
            ignored = result[~taking_part]
            if (ignored[~ignored.isnan()] != 0).any():
                raise Wrong(f"{name}: {who} gives ignored logits {ignored}")


class Slack:
    """By how much results may be off for what the engine's numbers resolve."""

    def __init__(self, problem: Problem, expected: Results, values: Tensor) -> None:
        num_pos = int((problem.flat_labels == 1).sum())
        self.scale = max(1.0, float(values.abs().max())) if problem.member.takes and num_pos else 1.0
        self.problem, self.num_pos = problem, max(1, num_pos)
        found, resolved = _false_positives(problem)
        eps = problem.arguments.get(
            "eps", {"alrp": 1e-5, "rank_sort": 1e-10, "ape": 1e-10, "weighted": 0.3}.get(problem.member.name, 0)
        )
        self.at_the_gate = bool((((found - eps).abs() <= 1e-6 * eps + resolved) & (found > 0) & (eps > 1e-9)).any())
        self.lost = resolved.max().item() if num_pos else 0.0
        self.gradient = 0.0
        for name, result in expected.items():
            if name.endswith("by logits") and num_pos:
                sent = result[problem.flat_labels == 1].abs()
                share = torch.where(found > 0, resolved / found, 0.0).clamp(max=1)
                self.gradient = max(self.gradient, float((sent * share).sum()))
        # Differences of scores, and their sums, are rounded in the dtype of the scores.
        self.rounding = (1e-12 if problem.double else 2e-7) * self.scale

    def of(self, name: str) -> float:
        """Absolute, for a result."""
        sorts = self.problem.member.takes == "ious" and ("sorting" in name or "all" in name)
        sorting = self.rounding if sorts else 0.0
        upstream = abs(self.problem.upstream) if " by " in name else 1.0
        if name.endswith("by logits"):
            return upstream * (self.gradient + (self.lost * self.scale + 4 * sorting) / self.num_pos)
        return upstream * (1e-9 + self.lost * self.scale + 1e-13 * self.num_pos * self.scale + sorting)


def _false_positives(problem: Problem) -> tuple[Tensor, Tensor]:
    """N_FP of each positive, and by how much it may be off: ``[P]`` each."""
    flat, labels, groups = problem.flat_logits.double(), problem.flat_labels, problem.flat_groups
    positive, negative = labels == 1, labels == 0
    delta = problem.arguments["delta"]
    h = reference.ramp(reference.difference(flat[negative], flat[positive]), delta)
    if groups is not None:
        h = torch.where(groups[negative] == groups[positive][:, None], h, 0.0)
    inside = ((h > 0) & (h < 1)).sum(1)
    unit = 2.0 ** -fraction_bits(max(1, len(flat)))
    if problem.backend == "pairwise":
        unit = 1.2e-7
    if problem.backend == "reference":
        return h.sum(1), 1e-15 * inside
    return h.sum(1), inside * unit + 1e-14 * len(flat) * max(1, int(positive.sum())) + 1e-10 * (inside > 0)


def _agree(name: str, actual: Tensor, wanted: Tensor, problem: Problem, slack: float) -> None:
    tolerance = 1e-9 if actual.dtype == torch.float64 and problem.double else 1e-6
    if actual.shape != wanted.shape:
        raise Wrong(f"{name}: shape {list(actual.shape)}, expected {list(wanted.shape)}")
    if actual.numel() == 0:
        return
    margin = tolerance * wanted.norm() + slack
    # What is made of float32 numbers, some of which are not finite, need not be so either.
    excused = ~actual.isfinite() & (not problem.double and bool(wanted.abs().max() > LARGEST_GRADIENT))
    if actual.dtype in (torch.float16, torch.bfloat16):
        low, high = (wanted - margin).to(actual.dtype), (wanted + margin).to(actual.dtype)
        bad = ~((low <= actual) & (actual <= high)) & ~excused
    else:
        rounded = wanted.to(actual.dtype).double()
        largest = torch.where(rounded.isfinite(), wanted, 0.0).abs().max()
        error = torch.where(actual.double() == rounded, 0.0, (actual.double() - wanted).abs())
        error = error.masked_fill(excused, 0)
        bad = ~(error <= tolerance * largest + slack)
        if not bad.any() and not error.norm() <= margin:
            raise Wrong(f"{name}: norm of the error {error.norm():.3g}, allowed {margin:.3g}")
    if bad.any():
        at = int(bad.reshape(-1).int().argmax())
        one, other = actual.reshape(-1)[at], wanted.reshape(-1)[at]
        raise Wrong(f"{name}: at {at} got {one:.9g}, expected {other:.9g}; norm {wanted.norm():.3g}, slack {slack:.2g}")


def _judge_extreme(problem: Problem, found: Results, ask: Any, values: Tensor) -> str:
    """What depends on extreme values is told by asking for others that stand in the same order: two that are near to
    the rest, and one that is far, which shows what depends on them by a little."""
    usual = values[values.abs() <= LARGEST_VALUE]
    top = float(usual.abs().max()) if len(usual) else 1.0

    def instead(extreme: float) -> Tensor:
        return torch.where(values.abs() <= LARGEST_VALUE, values, values.sign() * extreme)

    one = instead(top + 1)
    first, second, far = ask(one), ask(instead(top + 2)), ask(instead(max(1e200, 2 * top)))
    slack = Slack(problem, first, one)
    for name, actual in found.items():
        if name.endswith("by logits") and slack.at_the_gate:
            continue
        kept = _asked_for(problem) if name.endswith("by logits") else ...
        limits = torch.finfo(actual.dtype)
        actual, a, b, c = actual[kept].double(), first[name][kept], second[name][kept], far[name][kept]
        if actual.numel() == 0:
            continue
        moved, largest = (b - a).abs(), torch.maximum(a.abs().max(), b.abs().max())
        independent = (moved <= 1e-13 * largest) & ((c - a).abs() <= 1e-6 * a.abs().max())
        depends = moved > 1e-6 * largest
        wrong = depends & actual.isfinite() & (actual.abs() < 1e100)
        wrong |= (
            independent
            & ~actual.isnan()
            & ~(
                (actual - a).abs()
                <= max(1e-5, limits.eps) * largest + slack.of(name) + limits.smallest_normal * limits.eps
            )
        )
        if wrong.any():
            at = int(wrong.reshape(-1).int().argmax())
            raise Wrong(f"{name}, extreme values: at {at} got {actual.reshape(-1)[at]}, by others {a.reshape(-1)[at]}")
    return "extreme"
