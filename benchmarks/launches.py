"""Count what an iteration launches on a GPU, without one.

    python -m benchmarks.launches [--positives P] [--levels L] [--negatives N]

Kernels run compiled, on the virtual GPU of the tests; the code around them takes the paths it takes on a GPU. Each
PyTorch operation that would launch something there counts once, though some, such as a sort, launch several kernels;
views, allocations and questions of shape do not count.

A loss takes scores, labels and a number for each positive. A criterion, such as ``ALRPLoss``, takes boxes: its launches
include those for their errors, and for the balance between its components.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine import Statistics
from alrp_triton.engine.registered import FUNCTIONS
from alrp_triton.framework import ranking_loss

from .counting import counting_gpu
from .report import print_table

# Beside views.
_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view")


def _imprecision(ranking: Statistics) -> Tensor:
    """A formula that the kernels do not know."""
    return ranking.num_false_positives / ranking.rank


class Given(NamedTuple):
    """What a loss or criterion may take."""

    logits: list[Tensor]  # `[rows, C]` of each level
    labels: list[Tensor]  # classes of the rows
    values: Tensor  # `[P]`, of the positives
    boxes: tuple[Tensor, Tensor]  # `[P, 4]` predicted and target


Loss = Callable[[Given], Sequence[Tensor]]


def _of_scores(function: Callable[..., Tensor], **settings: Any) -> Loss:
    return lambda g: [function(g.logits, g.labels, num_positives=len(g.values), **settings)]


def _of_boxes(criterion: Callable[..., Any]) -> Loss:
    return lambda g: [*criterion(g.logits, g.labels, *g.boxes)]


LOSSES: dict[str, Loss] = {
    "alrp": lambda g: alrp_loss(g.logits, g.labels, g.values, backend="triton")[:2],
    # Any integers of each row will do.
    "alrp, groups": lambda g: alrp_loss(g.logits, g.labels, g.values, groups=g.labels, backend="triton")[:2],
    "ap": _of_scores(ap_loss, backend="triton"),
    "ndcg": _of_scores(ndcg_loss, backend="triton"),
    "rank_sort": lambda g: rank_sort_loss(g.logits, g.labels, g.values, backend="triton"),
    "own": _of_scores(lambda x, y, **how: ranking_loss(x, y, _imprecision, **how), backend="triton"),
}
"""By name; what they return, other than ranks, is differentiated."""
CRITERIA: dict[str, Loss] = {
    "ALRPLoss": _of_boxes(ALRPLoss(backend="triton")),
    "RankSortLoss": _of_boxes(RankSortLoss(backend="triton")),
    "APLoss": _of_scores(APLoss(backend="triton")),
    "NDCGLoss": _of_scores(NDCGLoss(backend="triton")),
}
"""The same of the modules as they come: GIoU, and self-balancing where there is any."""


class Operators(TorchDispatchMode):
    """Counts some of PyTorch's operators by name while it is entered; sees into registered ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def counted(self, name: str, schema: Any, args: Any, kwargs: Any) -> bool:
        """Whether a call is one of those."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "alrp_triton":
            with self:
                return FUNCTIONS[func._schema.name.split("::")[1]](*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if self.counted(name, func._schema, args, kwargs):
            self.counts[name] += 1
        return func(*args, **kwargs)


class Launches(Operators):
    """Those that launch something on a GPU."""

    def counted(self, name: str, schema: Any, args: Any, kwargs: Any) -> bool:
        aliases = [returned.alias_info for returned in schema.returns]
        computes = any("Tensor" in str(returned.type) for returned in schema.returns)
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        return computes and not is_view and name not in _FREE

    def kernel(self, about: Any) -> None:
        """Count a kernel; what Triton calls before it launches one."""
        self.counts[about.get()["name"]] += 1


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """What is launched meanwhile, by name."""
    from triton import knobs

    launches = Launches()
    hooks = knobs.runtime.launch_enter_hook
    hooks.add(launches.kernel)
    try:
        with launches:
            yield launches.counts
    finally:
        hooks.remove(launches.kernel)


def launches_of(
    loss: Loss, num_pos: int = 300, num_levels: int = 1, num_neg: int = 100
) -> tuple[Counter[str], Counter[str]]:
    """What forward and backward of a loss launch, for levels of logits with class labels; ``num_neg`` rows are
    background. What its caller launches to add the scalars up and to make the gradient of their sum is not counted."""
    given = given_to(num_pos, num_levels, num_neg)
    with counting() as forward:
        returned = loss(given)
    scalars = [value for value in returned if value.requires_grad]
    ones = [torch.ones_like(scalar) for scalar in scalars]
    with counting() as backward:
        torch.autograd.backward(scalars, ones)
    return forward, backward


def given_to(num_pos: int, num_levels: int, num_neg: int) -> Given:
    generator = torch.Generator().manual_seed(0)
    rows = num_pos + num_neg
    logits = [x.clone().requires_grad_() for x in torch.randn(rows, 3, generator=generator).tensor_split(num_levels)]
    labels = list(torch.where(torch.arange(rows) < num_pos, 1, 3).tensor_split(num_levels))
    values = torch.rand(num_pos, generator=generator).requires_grad_()
    corners = 100 * torch.rand(num_pos, 2, generator=generator)
    target_boxes = torch.cat([corners, corners + 10], dim=1)
    pred_boxes = (target_boxes + torch.randn(num_pos, 4, generator=generator)).requires_grad_()
    return Given(logits, labels, values, (pred_boxes, target_boxes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--positives", type=int, default=300, help="P (default: %(default)s)")
    parser.add_argument("--levels", type=int, default=1, help="levels of a pyramid (default: %(default)s)")
    # From 65,536 logits on, of three for each row, pass 1 takes two launches more.
    parser.add_argument("--negatives", type=int, default=22_000, help="rows of background (default: %(default)s)")
    options = parser.parse_args(arguments)
    rows = []
    for name, loss in (LOSSES | CRITERIA).items():
        with counting_gpu(90):
            counted = launches_of(loss, options.positives, options.levels, options.negatives)
        numbers = [count.total() for count in counted]
        rows.append([name, *map(str, numbers), str(sum(numbers))])
    logits = 3 * (options.positives + options.negatives)
    title = f"Launches, M = {logits:,}, P = {options.positives}, levels: {options.levels}"
    print_table(title, ["loss or criterion", "forward", "backward", "both"], rows)


if __name__ == "__main__":
    main()
