"""Draw the figures of the documentation.

    python docs/make_figures.py [--output docs/images]

Needs matplotlib. The same versions of matplotlib and PyTorch give the same files.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch

from alrp_triton import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine.knots import make_knots
from alrp_triton.reference import difference, ramp

POSITIVES = torch.tensor([-1.5, 0.1, 0.9, 3.9], dtype=torch.float64)
NEGATIVES = torch.linspace(-3.3, 5.6, 24, dtype=torch.float64)
LOC_ERRORS = torch.tensor([0.6, 0.4, 0.3, 0.2], dtype=torch.float64)
DELTA = 1.0
RANGE = (-3.6, 6.2)
# Apart for the colour-blind, too (Okabe and Ito).
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]
INK, GREY = "#222222", "#8A8A8A"
STYLE = {"font.size": 10, "mathtext.fontset": "cm", "axes.spines.top": False, "axes.spines.right": False}

# For the comparison of the members: most negatives low and a few at the top; a positive far down, and one near the top
# that is badly localised.
COMPARED_POSITIVES = torch.tensor([-0.4, 1.2, 2.3, 3.4, 4.6], dtype=torch.float64)
COMPARED_IOUS = torch.tensor([0.7, 0.9, 0.6, 0.3, 0.8], dtype=torch.float64)
COMPARED_NEGATIVES = torch.cat(
    [
        1.2 * torch.special.ndtri((torch.arange(20, dtype=torch.float64) + 0.5) / 20) - 0.8,
        torch.tensor([2.6, 3.2, 3.9, 4.4, 5.0, 6.1], dtype=torch.float64),
    ]
)
MEMBERS = {"aLRP": "#0072B2", "AP": "#E69F00", "Rank & Sort": "#CC79A7", "NDCG": "#009E73"}


def piecewise(path: Path) -> None:
    """The gradient of a negative as a function of its score: the ramps it is made of, their sum, and the knots."""
    logits = torch.cat([POSITIVES, NEGATIVES]).requires_grad_()
    labels = torch.cat([torch.ones(len(POSITIVES)), torch.zeros(len(NEGATIVES))]).long()
    cls, _, _ = alrp_loss(logits, labels, LOC_ERRORS, delta=DELTA)
    (gradient,) = torch.autograd.grad(cls, logits)

    # w_i / P: the excess c_i of a positive, which is its own gradient, over its false positives.
    num_fp = ramp(difference(NEGATIVES, POSITIVES), DELTA).sum(dim=1)
    weights = -gradient[: len(POSITIVES)] / num_fp
    t = torch.cat(
        [
            torch.tensor([RANGE[0]]),
            make_knots(POSITIVES, DELTA).table.thresholds[: 2 * len(POSITIVES)],
            torch.tensor([RANGE[1]]),
        ]
    )
    ramps = weights[:, None] * ramp(difference(t, POSITIVES), DELTA)

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.6, 6.0), sharex=True, height_ratios=[1, 1.75], layout="constrained"
    )
    for i, (colour, p) in enumerate(zip(COLOURS, POSITIVES.tolist())):
        top.plot(t, ramps[i], color=colour, linewidth=1.8)
        top.plot(p, weights[i] / 2, "o", color=colour, markersize=5)
        top.annotate(
            f"$i={i + 1}$", (p + DELTA, weights[i]), (4, 4), textcoords="offset points", color=colour, fontsize=11
        )
    top.set_ylabel(r"$\frac{1}{P}\,w_i\,H(t-p_i)$", fontsize=13)
    top.set_ylim(0, 1.18 * float(weights.max()))
    top.set_title("One ramp for each positive (dot: its own score)", loc="left", fontsize=10.5)

    begins, ends = POSITIVES - DELTA, POSITIVES + DELTA
    height = 1.1 * float(ramps.sum(dim=0).max())
    for axes in (top, bottom):
        for x in torch.cat([begins, ends]).tolist():
            axes.axvline(x, color=GREY, linewidth=0.7, linestyle=(0, (2, 3)), zorder=0)
    bottom.plot(t, ramps.sum(dim=0), color=INK, linewidth=2, label="$g(t)$, the sum of the ramps", zorder=2)
    bottom.plot(
        NEGATIVES,
        gradient[len(POSITIVES) :],
        "o",
        markersize=4.5,
        markerfacecolor="white",
        markeredgecolor=INK,
        markeredgewidth=0.9,
        label="negatives, with the gradients that the loss returns",
        zorder=3,
    )
    floor = -0.055 * height
    for colour, low, high in zip(COLOURS, begins.tolist(), ends.tolist()):
        bottom.plot(low, floor, marker="^", color=colour, markersize=7, clip_on=False)
        bottom.plot(high, floor, marker="v", color=colour, markersize=7, clip_on=False)
    bottom.plot([], [], linestyle="none", marker="^", color=GREY, label=r"knot $p_i-\delta$: a ramp begins")
    bottom.plot([], [], linestyle="none", marker="v", color=GREY, label=r"knot $p_i+\delta$: a ramp ends")
    edges = t.tolist()
    for b, (low, high) in enumerate(pairwise(edges)):
        name = str(b) if b else "bucket 0"
        bottom.text((low + high) / 2, height, name, ha="center", va="center", color=GREY, fontsize=9)
        if b % 2:
            bottom.axvspan(low, high, color="#000000", alpha=0.035, linewidth=0, zorder=0)
    bottom.set_ylim(-0.1 * height, height * 1.06)
    bottom.set_xlim(*RANGE)
    bottom.set_ylabel("$g(t)$", fontsize=13)
    bottom.set_xlabel("score $t$ of a negative", fontsize=11)
    bottom.legend(loc="upper left", bbox_to_anchor=(0, 0.9), framealpha=1, edgecolor="none", fontsize=9.5)
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def members(path: Path) -> None:
    """What each member of the family sends to the same scores: to negatives as a function of score, to positives."""
    logits = torch.cat([COMPARED_POSITIVES, COMPARED_NEGATIVES]).requires_grad_()
    num_pos = len(COMPARED_POSITIVES)
    labels = (torch.arange(len(logits)) < num_pos).long()
    ranking, sorting = rank_sort_loss(logits, labels, COMPARED_IOUS, delta=DELTA)
    losses = {
        "aLRP": alrp_loss(logits, labels, 1 - COMPARED_IOUS, delta=DELTA).cls,
        "AP": ap_loss(logits, labels, delta=DELTA),
        "Rank & Sort": ranking,
        "NDCG": ndcg_loss(logits, labels, delta=DELTA),
    }
    num_fp = ramp(difference(COMPARED_NEGATIVES, COMPARED_POSITIVES), DELTA).sum(dim=1)
    edges = torch.tensor([-3.6, 6.8], dtype=torch.float64)
    t = torch.cat(
        [edges[:1], make_knots(COMPARED_POSITIVES, DELTA).table.thresholds[: 2 * len(COMPARED_POSITIVES)], edges[1:]]
    )
    ramps = ramp(difference(t, COMPARED_POSITIVES), DELTA)

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.6, 6.4), sharex=True, height_ratios=[1.3, 1], layout="constrained"
    )
    for place, (name, colour) in enumerate(MEMBERS.items()):
        (gradient,) = torch.autograd.grad(losses[name], logits, retain_graph=True)
        # In what a positive sends to its false positives, each of these has the share H / N_FP.
        curve = (-gradient[:num_pos] / num_fp) @ ramps
        top.plot(t, curve, color=colour, linewidth=1.8, label=name)
        top.plot(COMPARED_NEGATIVES, gradient[num_pos:], "o", color=colour, markersize=3.2)
        if name == "Rank & Sort":
            gradient = gradient + torch.autograd.grad(sorting, logits)[0]
        x = COMPARED_POSITIVES + 0.11 * (place - 1.5)
        bottom.vlines(x, 0, gradient[:num_pos], color=colour, linewidth=1.2)
        bottom.plot(x, gradient[:num_pos], "o", color=colour, markersize=4.5)
    top.set_ylim(bottom=0)
    top.set_ylabel("gradient of a negative")
    top.set_title("Negatives (dots): the gradient is one function of the score", loc="left", fontsize=10.5)
    top.legend(loc="upper left", frameon=False, fontsize=10)
    bottom.spines["bottom"].set_visible(False)
    bottom.tick_params(axis="x", length=0)
    bottom.set_ylim(-0.205, 0.02)
    bottom.axhline(0, color=INK, linewidth=0.8)
    bottom.set_title(
        "Positives: bars side by side belong to one positive, at the score in their middle", loc="left", fontsize=10.5
    )
    bottom.set_ylabel("gradient of a positive")
    bottom.set_xlabel("score", fontsize=11)
    for p, iou in zip(COMPARED_POSITIVES.tolist(), COMPARED_IOUS.tolist()):
        bottom.annotate(f"IoU {iou}", (p, 0), (0, 5), textcoords="offset points", ha="center", color=GREY, fontsize=9)
    bottom.set_xlim(*edges.tolist())
    figure.savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    piecewise(output / "piecewise.png")
    members(output / "members.png")
