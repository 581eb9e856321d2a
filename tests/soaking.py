"""Steps of the soak: a loss of the family, forward and backward, on sizes that the number of the step decides; and
samples of what the process holds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alrp_triton import (
    ALRPLoss,
    APELoss,
    APLoss,
    NDCGLoss,
    RankSortLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    ape_loss,
    ndcg_loss,
    rank_sort_loss,
)
from alrp_triton.compat import aLRPLoss
from alrp_triton.engine.passes import why_unavailable
from alrp_triton.framework import RankingLoss, ranking_loss

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_BACKENDS = ("torch", "numba", "triton", "pairwise")
# A criterion that lives as long as the training, as users have one.
_balanced = ALRPLoss(self_balance=SelfBalance(period=100))


class Step(NamedTuple):
    """What a member of the family is called with."""

    logits: list[Tensor]
    """One to three levels ``[B, rows, C]``, leaves of the graph; 0 to ``max_logits`` logits in all."""
    labels: list[Tensor]
    """For each logit, or a class index for each row."""
    values: Tensor
    """``[P]`` in [0, 1), a leaf: localisation errors or IoUs."""
    boxes: tuple[Tensor, Tensor]
    """``[P, 4]`` predicted, a leaf, and target boxes."""
    arguments: dict[str, Any]
    """``delta``, ``backend``, ``groups``."""

    @property
    def given(self) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and labels."""
        return self.logits, self.labels


def make_step(number: int, max_logits: int, max_positives: int, device: torch.device, seed: int = 0) -> Step:
    """Draw the inputs of a step; the same arguments give the same numbers, whatever steps came before."""
    draw = random.Random(f"soak {seed} {number}")
    generator = torch.Generator(device).manual_seed(draw.getrandbits(63))
    num_levels, batch, classes = draw.randint(1, 3), draw.choice((1, 2, 4)), draw.choice((1, 2, 7, 20, 80))
    # Uniform in the logarithm, with an empty batch, or a level, now and then.
    most = max(1, max_logits // (num_levels * batch * classes))
    empty = draw.random() < 0.05
    rows = [0 if empty or draw.random() < 0.05 else int(most ** draw.random()) for _ in range(num_levels)]
    anchors = batch * sum(rows)
    num_positives = draw.choice((0, 1, draw.randint(0, max_positives), draw.randint(0, max_positives)))
    num_positives = min(num_positives, anchors)

    positives = torch.randperm(anchors, generator=generator, device=device)[:num_positives]
    class_labels = torch.full((anchors,), classes, device=device)
    class_labels[torch.rand(anchors, generator=generator, device=device) < 0.1] = -1
    class_labels[positives] = torch.randint(classes, (num_positives,), generator=generator, device=device)
    labels = [part.view(batch, -1) for part in class_labels.split([batch * n for n in rows])]
    if draw.random() < 0.5:
        numbers = torch.arange(classes, device=device)
        labels = [torch.where(y < 0, y, y == numbers).to(torch.int8) for y in (part[..., None] for part in labels)]

    dtype = draw.choice(_DTYPES)
    logits = [3 * torch.randn(batch, n, classes, generator=generator, device=device) - 2 for n in rows]
    corners = 50 * torch.rand(num_positives, 2, generator=generator, device=device)
    target = torch.cat([corners, corners + 10], 1)
    pred = target + torch.randn(num_positives, 4, generator=generator, device=device)
    backends = [name for name in _BACKENDS if why_unavailable(name, device) is None]
    arguments: dict[str, Any] = {"delta": draw.choice((0.0, 0.5, 1.0)), "backend": draw.choice(backends)}
    if draw.random() < 0.3:
        images = torch.arange(batch, device=device)[:, None]
        arguments["groups"] = [images.expand(batch, n) for n in rows]
    values = torch.rand(num_positives, generator=generator, device=device).requires_grad_()
    logits = [level.to(dtype).requires_grad_() for level in logits]
    return Step(logits, labels, values, (pred.requires_grad_(), target), arguments)


def _total(output: Any) -> Tensor:
    """What a training differentiates."""
    if isinstance(output, Tensor):
        return output
    return output.cls + output.loc if hasattr(output, "cls") else output.ranking + output.sorting


def _with_boxes(step: Step) -> Any:
    _balanced.delta, _balanced.backend = step.arguments["delta"], step.arguments["backend"]
    return _balanced(*step.given, *step.boxes, step.arguments.get("groups"))


def _weighted_error(ranking: Any, weights: Tensor) -> Tensor:
    return weights * ranking.num_false_positives / ranking.rank  # type: ignore[no-any-return]


def _pair_functions(step: Step) -> Any:
    # Functions of PyTorch alone, made anew in each step; one of them holds what is as large as the values.
    def smoothing(x: Tensor, delta: float) -> Tensor:
        return torch.sigmoid(x + 0 * step.values.detach().sum().to(x.dtype))

    criterion = RankingLoss(
        lambda ranking: ranking.num_false_positives / ranking.rank,
        smoothing=smoothing,
        distribution=lambda x, delta: torch.sigmoid(x) ** 2,
    )
    criterion.backend = step.arguments["backend"] if step.arguments["backend"] in ("torch", "numba") else "torch"
    return criterion(*step.given, num_positives=len(step.values), groups=step.arguments.get("groups"))


def _compat(step: Step) -> Tensor:
    level, labels = step.logits[0], step.labels[0]
    if labels.shape != level.shape:
        labels = labels[..., None] == torch.arange(level.shape[-1]).to(level.device)
    targets = labels.reshape(-1).float()
    errors = step.values.detach().new_full((int((targets == 1).sum()),), 0.5)
    return aLRPLoss.apply(level.reshape(-1), targets, errors)[0]


MEMBERS: dict[str, Callable[[Step], Any]] = {
    "alrp_loss": lambda s: alrp_loss(*s.given, s.values, **s.arguments),
    "alrp_loss, smooth": lambda s: alrp_loss(*s.given, s.values, loc_ranking="smooth", **s.arguments),
    "ALRPLoss": _with_boxes,
    "ap_loss": lambda s: ap_loss(*s.given, num_positives=len(s.values), **s.arguments),
    # Without P, which has to be found; and a criterion that is made anew.
    "APLoss": lambda s: APLoss(s.arguments["delta"], backend=s.arguments["backend"])(*s.given),
    "ndcg_loss": lambda s: ndcg_loss(*s.given, **s.arguments),
    "NDCGLoss": lambda s: NDCGLoss(backend=s.arguments["backend"])(*s.given),
    "rank_sort_loss": lambda s: rank_sort_loss(*s.given, s.values, **s.arguments),
    "RankSortLoss": lambda s: RankSortLoss(backend=s.arguments["backend"])(*s.given, *s.boxes),
    "ape_loss": lambda s: ape_loss(*s.given, s.values, **s.arguments),
    "APELoss": lambda s: APELoss(backend=s.arguments["backend"])(*s.given, *s.boxes),
    "ranking_loss": lambda s: ranking_loss(*s.given, _weighted_error, extras={"weights": s.values}, **s.arguments),
    "RankingLoss, pair functions": _pair_functions,
    "compat.aLRPLoss": _compat,
}
"""The family, in the order in which the soak takes them in turn."""


def take_step(number: int, max_logits: int, max_positives: int, device: torch.device, seed: int = 0) -> None:
    """Forward and backward of one member.

    Raises:
        RuntimeError: for a loss or a gradient that is not finite, or a gradient that is missing.
    """
    name = list(MEMBERS)[number % len(MEMBERS)]
    quadratic = name.endswith("pair functions")
    step = make_step(number, max_logits, max_positives // 10 if quadratic else max_positives, device, seed)
    loss = _total(MEMBERS[name](step))
    loss.backward()
    # Looked at together, so that a GPU is waited for once.
    gradients = [step.logits[0].grad] if name == "compat.aLRPLoss" else [level.grad for level in step.logits]
    if any(gradient is None for gradient in gradients):
        raise RuntimeError(f"step {number}, {name}: expected a gradient of every level, got none")
    found = torch.stack([loss.detach().double(), *(g.double().sum() for g in gradients if g is not None)])
    if not bool(found.isfinite().all()):
        raise RuntimeError(f"step {number}, {name}: expected finite numbers, got {found.tolist()}")


class Sample(NamedTuple):
    """What a process holds after some steps."""

    step: int
    seconds: float
    resident_mb: float
    objects: int
    """What the collector of cycles knows of."""
    tensors: int
    device_mb: float
    """What tensors on a GPU take; 0 without one."""


def sample(step: int, seconds: float) -> Sample:
    """Look at this process when the collector has taken what is free."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    resident = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))
    objects = gc.get_objects()
    # By the type: isinstance asks for __class__, which proxies answer by importing modules.
    tensors = sum(issubclass(type(thing), Tensor) for thing in objects)
    device = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
    return Sample(step, round(seconds, 1), resident / 1e6, len(objects), tensors, device / 1e6)


def soak(step: Callable[[int], None], last: int, every: int) -> Iterator[Sample]:
    """Take the steps 1 to ``last``; a sample after ``every`` so many."""
    began = time.perf_counter()
    for number in range(1, last + 1):
        step(number)
        if number % every == 0:
            yield sample(number, time.perf_counter() - began)
