"""Forward + backward of every loss of the family on the CPU: against aLRP Loss, and against the loops as published.

    python -m benchmarks.family

All contenders of a regime take turns, as in ``benchmarks.cpu``, and medians are compared. Groups are timed in the same
way: one call for a batch of images ranked one by one, against a call for each image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from alrp_triton import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.framework import ranking_loss

from .baselines import ap_loop, per_positive_loop, rank_sort_loop
from .cpu import CLOCKS, LARGEST_ERROR, parse, time_turns
from .report import claim, environment, print_claims, print_environment, print_table, write
from .workloads import NUM_CLASSES, Workload, make_workload

LARGEST_RATIO = 1.3

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of logits, labels, and a number for each positive (localisation error or IoU)."""


def _added(first: Tensor, second: Tensor) -> Tensor:
    return first + second


MEMBERS: dict[str, Loss] = {
    "aLRP": lambda x, y, e: _added(*alrp_loss(x, y, e, backend="torch")[:2]),
    "AP": lambda x, y, e: ap_loss(x, y, backend="torch"),
    "AP, plain": lambda x, y, e: ap_loss(x, y, interpolated=False, backend="torch"),
    "Rank & Sort": lambda x, y, e: _added(*rank_sort_loss(x, y, e, backend="torch")),
    "NDCG": lambda x, y, e: ndcg_loss(x, y, backend="torch"),
    "your own": lambda x, y, e: ranking_loss(x, y, lambda r: (r.num_false_positives / r.rank).sqrt(), backend="torch"),
}
LOOPS: dict[str, Loss] = {
    "aLRP": lambda x, y, e: per_positive_loop(x, y, e.detach())[0],
    "AP": lambda x, y, e: ap_loop(x, y),
    "Rank & Sort": lambda x, y, e: rank_sort_loop(x, y, e.detach()),
}


def run(loss: Loss, workload: Workload, labels: Tensor) -> None:
    """Forward and backward."""
    loss(workload.logits, labels, workload.loc_errors).backward()


def gradient(loss: Loss, workload: Workload, labels: Tensor) -> Tensor:
    """The gradient of the scores, in float64."""
    workload.logits.grad = None
    run(loss, workload, labels)
    assert workload.logits.grad is not None
    return workload.logits.grad.double()


def compare(regime: str, args: argparse.Namespace) -> dict[str, Any]:
    """All members and loops on one regime."""
    workload = make_workload(regime, args.logits, args.positives, args.seed)
    labels = workload.logit_labels()
    errors = {}
    for name, loop in LOOPS.items():
        expected = gradient(loop, workload, labels)
        errors[name] = float((gradient(MEMBERS[name], workload, labels) - expected).norm() / expected.norm())
        if not errors[name] <= LARGEST_ERROR:
            sys.exit(f"{name}, {regime}: our gradient is off the loop's by {errors[name]:.1e} of its norm")
    contenders: dict[str, tuple[Callable[[], None], int]]
    contenders = {name: (partial(run, loss, workload, labels), args.repeats) for name, loss in MEMBERS.items()}
    contenders |= {
        f"{name}, loop": (partial(run, loop, workload, labels), args.loop_repeats) for name, loop in LOOPS.items()
    }
    seconds = time_turns(contenders, [workload.logits], CLOCKS[args.clock])
    return {"regime": regime, "gradient_error": errors, "seconds": seconds}


def compare_groups(regime: str, args: argparse.Namespace) -> dict[str, Any]:
    """One call with a ranking for each image, against a call for each image."""
    images, per_image = args.images, args.logits // NUM_CLASSES // args.images * NUM_CLASSES
    parts = [make_workload(regime, per_image, args.positives // images, args.seed + k) for k in range(images)]
    logits = torch.stack([part.logits.detach() for part in parts]).requires_grad_()
    labels = torch.stack([part.logit_labels() for part in parts])
    errors = torch.cat([part.loc_errors.detach() for part in parts])
    groups = torch.arange(images)[:, None].expand(labels.shape[:-1])

    def together() -> None:
        alrp_loss(logits, labels, errors, groups=groups, backend="torch").cls.backward()

    def one_by_one() -> None:
        calls = zip(logits, labels, errors.chunk(images))
        torch.stack([alrp_loss(*call, backend="torch").cls for call in calls]).mean().backward()

    def as_one_ranking() -> None:
        alrp_loss(logits, labels, errors, backend="torch").cls.backward()

    gradients: list[Tensor] = []
    for step in (together, one_by_one):
        logits.grad = None
        step()
        assert logits.grad is not None
        gradients.append(logits.grad.double())
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    if not error <= LARGEST_ERROR:
        sys.exit(f"groups, {regime}: one call is off {images} calls by {error:.1e} of the gradient's norm")
    contenders = {
        "one call, groups": (together, args.repeats),
        f"{images} calls": (one_by_one, args.repeats),
        "one ranking": (as_one_ranking, args.repeats),
    }
    seconds = time_turns(contenders, [logits], CLOCKS[args.clock])
    return {"regime": regime, "images": images, "gradient_error": error, "seconds": seconds}


def main() -> None:
    """Parse, check, time, print, write."""
    args = parse("family", __doc__.splitlines()[0], loop_repeats=2, images=(16, "groups"))
    about = environment("benchmarks.family")
    print_environment(about)

    claims, rows, compared = [], [], [compare(regime, args) for regime in args.regimes]
    for result in compared:
        regime, middle = result["regime"], {name: median(values) for name, values in result["seconds"].items()}
        for name in MEMBERS:
            ratio, loop = middle[name] / middle["aLRP"], middle.get(f"{name}, loop")
            error = result["gradient_error"].get(name)
            rows.append(
                [
                    f"{regime}: {name}",
                    f"{1e3 * middle[name]:.0f}",
                    f"{ratio:.2f}",
                    f"{1e3 * loop:.0f}" if loop else "",
                    f"{loop / middle[name]:.1f}" if loop else "",
                    f"{error:.1e}" if error is not None else "",
                ]
            )
            if name != "aLRP":
                claims.append(claim(f"{name} / aLRP, {regime}", ratio, "<=", LARGEST_RATIO))
    print_table(
        f"Forward + backward, M = {args.logits:,}, P = {args.positives:,}",
        ["loss", "ms", "of aLRP", "loop ms", "loop/ours", "error"],
        rows,
        f"Medians of {args.clock} milliseconds, which are this machine's, now. Error: our gradient against the loop's, "
        "relative norm.",
    )

    rows, grouped = [], [compare_groups(regime, args) for regime in args.regimes]
    for result in grouped:
        together, calls, one = (median(values) for values in result["seconds"].values())
        rows.append(
            [
                result["regime"],
                *(f"{1e3 * seconds:.0f}" for seconds in (together, calls, one)),
                f"{calls / together:.2f}",
                f"{together / one:.2f}",
                f"{result['gradient_error']:.1e}",
            ]
        )
    print_table(
        f"aLRP, {args.images} images ranked one by one: one call with groups, or a call for each",
        ["regime", "groups", "calls", "one ranking", "calls/groups", "groups/one ranking", "error"],
        rows,
        f"Medians of {args.clock} milliseconds. Error: one call against {args.images}, relative norm of the gradient.",
    )
    print_claims(claims)
    note = "seconds are machine-dependent; compare ratios within one run only"
    write(args.output, {"environment": about, "note": note, "compared": compared, "grouped": grouped, "claims": claims})


if __name__ == "__main__":
    main()
