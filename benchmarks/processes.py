"""One ranking over several processes against one process with the whole batch: what differs, and what is sent.

    python -m benchmarks.processes [--shares 70 29 1] [--regime middle] [--device cpu]

The anchors of one batch are shared out unevenly; every loss is differentiated by each process for its part, with
``group=True``, and by one process for all. Gradients are compared as DistributedDataParallel leaves them, which takes
the mean over the processes. The last column says how far off a loss is if each process ranks its part alone instead.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss

from .report import claim, environment, print_claims, print_environment, print_table
from .workloads import REGIMES, make_workload

LOSSES: dict[str, Callable[..., Any]] = {
    "aLRP": ALRPLoss,
    "Rank & Sort": RankSortLoss,
    "AP": APLoss,
    "NDCG": NDCGLoss,
}
_WITH_BOXES = ("aLRP", "Rank & Sort")


class Part(NamedTuple):
    """What a process has of the batch."""

    logits: Tensor
    """``[anchors, C]``."""
    class_labels: Tensor
    """``[anchors]``, C for background."""
    boxes: Tensor
    """``[P, 4]`` predicted."""
    targets: Tensor
    """``[P, 4]``."""


class Found(NamedTuple):
    """Of one loss."""

    loss: Tensor
    by_logits: Tensor
    by_boxes: Tensor
    """``[0, 4]`` for a loss without boxes."""
    sent: int
    """Bytes that this process gave to collectives."""


def make_batch(regime: str, num_logits: int, num_positives: int, seed: int) -> Part:
    """A whole batch; the same arguments give the same numbers."""
    work, generator = make_workload(regime, num_logits, num_positives, seed), torch.Generator().manual_seed(seed)
    corners = 100 * torch.rand(num_positives, 2, generator=generator)
    targets = torch.cat([corners, corners + 40], 1)
    boxes = targets + 8 * torch.randn(num_positives, 4, generator=generator)
    return Part(work.logits.detach(), work.class_labels, boxes, targets)


def cut(batch: Part, shares: Sequence[float]) -> list[Part]:
    """The anchors, in order, in these proportions; boxes go with their positives."""
    ends = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    places = (ends / ends[-1] * len(batch.logits)).round().long().tolist()
    parts, begin, first = [], 0, 0
    for end in places:
        labels = batch.class_labels[begin:end]
        last = first + int((labels < batch.logits.shape[1]).sum())
        parts.append(Part(batch.logits[begin:end], labels, batch.boxes[first:last], batch.targets[first:last]))
        begin, first = end, last
    return parts


def evaluate(name: str, part: Part, device: torch.device, group: bool | None) -> Found:
    """A loss and its gradients."""
    logits, boxes = (x.to(device, copy=True).requires_grad_() for x in (part.logits, part.boxes))
    given = (boxes, part.targets.to(device)) if name in _WITH_BOXES else ()
    with _counting() as sent:
        out = LOSSES[name](group=group)(logits, part.class_labels.to(device), *given)
        loss = out if isinstance(out, Tensor) else out.cls + out.loc
        loss.backward()
    assert logits.grad is not None
    by_boxes = torch.zeros(0, 4) if boxes.grad is None else boxes.grad.cpu()
    return Found(loss.detach().cpu(), logits.grad.cpu(), by_boxes, sum(sent))


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Bytes given to each collective."""
    sent: list[int] = []
    gather, add = dist.all_gather, dist.all_reduce

    def counted_gather(out: list[Tensor], mine: Tensor, **further: Any) -> Any:
        sent.append(mine.nbytes)
        return gather(out, mine, **further)

    def counted_add(mine: Tensor, **further: Any) -> Any:
        sent.append(mine.nbytes)
        return add(mine, **further)

    with patch.object(dist, "all_gather", counted_gather), patch.object(dist, "all_reduce", counted_add):
        yield sent


def _serve(rank: int, parts: list[Part], device: str, store: str, pipe: Any) -> None:
    """A process: every loss over all of them, and alone."""
    torch.set_num_threads(1)
    at = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(at)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=Path(store).as_uri(), rank=rank, world_size=len(parts))
    try:
        # By value: file descriptors of shared memory would have to outlive this process.
        found = [[evaluate(name, parts[rank], at, group) for group in (True, None)] for name in LOSSES]
        pipe.send([[[x.numpy() if isinstance(x, Tensor) else x for x in each] for each in two] for two in found])
    finally:
        dist.destroy_process_group()


def run(parts: list[Part], device: str) -> list[dict[str, tuple[Found, Found]]]:
    """For each process: by the name of the loss, what it found with the others, and alone."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(len(parts)):
            mine, theirs = context.Pipe()
            arguments = (rank, parts, device, str(Path(folder, "store")), theirs)
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(mine)
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()

    def restore(fields: list[Any]) -> Found:
        loss, by_logits, by_boxes, sent = fields
        return Found(torch.as_tensor(loss), torch.as_tensor(by_logits), torch.as_tensor(by_boxes), sent)

    return [{name: (restore(a), restore(b)) for name, (a, b) in zip(LOSSES, answer)} for answer in answers]


def compare(parts: list[Found], whole: Found) -> tuple[float, float, float, bool]:
    """Largest differences of loss, score and box gradients, relative to the largest element of the whole; and whether
    all processes have the same bits of the loss."""
    size = len(parts)

    def largest(mine: Tensor, theirs: Tensor) -> float:
        off = float((mine.double() - theirs.double()).abs().max() / theirs.abs().max()) if theirs.numel() else 0.0
        return off if math.isfinite(off) else math.inf  # which compares, as NaN does not

    return (
        max(largest(part.loss, whole.loss) for part in parts),
        largest(torch.cat([part.by_logits for part in parts]) / size, whole.by_logits),
        largest(torch.cat([part.by_boxes for part in parts]) / size, whole.by_boxes),
        all(torch.equal(part.loss, parts[0].loss) for part in parts),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where anything is off by more than rounding."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[70, 29, 1], help="of the anchors, by process")
    parser.add_argument("--regime", choices=REGIMES, default="middle", help="of training (default: %(default)s)")
    parser.add_argument("--logits", type=int, default=800_000, help="M of all (default: %(default)s)")
    parser.add_argument("--positives", type=int, default=500, help="P of all (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one for each process")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    batch = make_batch(options.regime, options.logits, options.positives, options.seed)
    parts = cut(batch, options.shares)
    print_environment(environment("benchmarks.processes"))
    of = [(f"process {rank}", f"{part.logits.numel():,}", len(part.boxes)) for rank, part in enumerate(parts)]
    print_table("Parts of the batch", ["", "logits", "positives"], of)
    found, rows, worst, same = run(parts, options.device), [], 0.0, True
    for name in LOSSES:
        whole = evaluate(name, batch, torch.device(options.device), None)
        loss, scores, boxes, equal = compare([answer[name][0] for answer in found], whole)
        alone = torch.stack([answer[name][1].loss for answer in found]).mean()
        off = float((alone - whole.loss).abs() / whole.loss)
        sent = max(answer[name][0].sent for answer in found)
        by_boxes = f"{boxes:.1e}" if name in _WITH_BOXES else "-"
        rows.append((name, f"{loss:.1e}", f"{scores:.1e}", by_boxes, f"{sent:,}", f"{100 * off:.1f} %"))
        worst, same = max(worst, loss, scores, boxes), same and equal
    columns = ["loss", "loss differs by", "score gradient", "box gradient", "bytes sent by each", "ranked apart"]
    caption = "Relative differences from one process; the last column: the mean loss if each process ranks alone."
    print_table(f"{len(parts)} processes", columns, rows, caption)
    # A third of three times a float32 is not that number.
    claims = [claim("largest relative difference, in 1e-7", 1e7 * worst, "<=", 3)]
    claims.append(claim("losses with the same bits in all processes, share", float(same), ">=", 1))
    print_claims(claims)
    return 0 if all(entry["met"] for entry in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
