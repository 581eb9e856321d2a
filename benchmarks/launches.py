"""Count what an iteration launches on a GPU, without one.

    TRITON_INTERPRET=1 python -m benchmarks.launches [--positives P] [--levels L] [--details LOSS]

Kernels run in Triton's interpreter, the code around them takes the paths it takes on a GPU, and whatever PyTorch
operation would launch something there is counted once: views, allocations and questions of shape are not. Some, as a
sort, launch more than one kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alrp_triton import alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine import Statistics
from alrp_triton.framework import ranking_loss

from .report import print_table

# Beside views.
_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view")
# Where the code asks whether a device should not be waited for.
_ASKING = ("positives", "fused", "sorting", "backends.torch", "backends.search", "backends.tables")


def _imprecision(ranking: Statistics) -> Tensor:
    """A formula that the kernels do not know."""
    return ranking.num_false_positives / ranking.rank


Loss = Callable[[list[Tensor], list[Tensor], Tensor], Sequence[Tensor]]
LOSSES: dict[str, Loss] = {
    "alrp": lambda x, y, v: alrp_loss(x, y, v, backend="triton")[:2],
    "ap": lambda x, y, v: [ap_loss(x, y, num_positives=len(v), backend="triton")],
    "ndcg": lambda x, y, v: [ndcg_loss(x, y, num_positives=len(v), backend="triton")],
    "rank_sort": lambda x, y, v: rank_sort_loss(x, y, v, backend="triton"),
    "own": lambda x, y, v: [ranking_loss(x, y, _imprecision, num_positives=len(v), backend="triton")],
}
"""The scalars of a loss, of levels of logits ``[M, C]``, class labels, and a number for each positive."""


class Launches(TorchDispatchMode):
    """Counts by name while it is entered; sees into registered operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self._in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._in_kernel:
            return func(*args, **kwargs)
        if func.namespace == "alrp_triton":
            with self:
                return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        aliases = [returned.alias_info for returned in func._schema.returns]
        computes = any("Tensor" in str(returned.type) for returned in func._schema.returns)
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if computes and not is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **kwargs)

    def kernel(self, name: str, run: Callable[[], Any]) -> Any:
        """Count a kernel, and not what its interpreter does."""
        self.counts[name] += 1
        self._in_kernel = True
        try:
            return run()
        finally:
            self._in_kernel = False


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """What is launched meanwhile, by name."""
    from triton.runtime.interpreter import GridExecutor

    launches, interpret = Launches(), GridExecutor.__call__

    def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return launches.kernel(executor.fn.__name__, lambda: interpret(executor, *args, **kwargs))

    with contextlib.ExitStack() as stack:
        for module in _ASKING:
            asking = importlib.import_module(f"alrp_triton.engine.{module}")
            stack.enter_context(patch.object(asking, "waits_for_nothing", lambda device: True))
        stack.enter_context(patch.object(GridExecutor, "__call__", call))
        stack.enter_context(launches)
        yield launches.counts


def launches_of(loss: Loss, num_pos: int = 300, num_levels: int = 1) -> tuple[Counter[str], Counter[str]]:
    """What forward and backward of a loss launch, for levels of logits with class labels. What its caller launches to
    add the scalars up, and to make the gradient of their sum, is not counted."""
    generator = torch.Generator().manual_seed(0)
    rows = num_pos + 20 * num_levels
    logits = [x.clone().requires_grad_() for x in torch.randn(rows, 3, generator=generator).tensor_split(num_levels)]
    labels = list(torch.where(torch.arange(rows) < num_pos, 1, 3).tensor_split(num_levels))
    values = torch.rand(num_pos, generator=generator).requires_grad_()
    with counting() as forward:
        scalars = loss(logits, labels, values)
    ones = [torch.ones_like(scalar) for scalar in scalars]
    with counting() as backward:
        torch.autograd.backward(scalars, ones)
    return forward, backward


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positives", type=int, default=300, help="P (default: %(default)s)")
    parser.add_argument("--levels", type=int, default=1, help="levels of a pyramid (default: %(default)s)")
    parser.add_argument("--details", choices=LOSSES, help="list what this loss launches")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("set TRITON_INTERPRET=1, which Triton reads when it is first imported")
    rows = []
    for name in [options.details] if options.details else LOSSES:
        counts = launches_of(LOSSES[name], options.positives, options.levels)
        numbers = [count.total() for count in counts]
        rows.append([name, *map(str, numbers), str(sum(numbers))])
        if options.details:
            for part, count in zip(("forward", "backward"), counts):
                print(f"{part}: " + ", ".join(f"{key} {number}" for key, number in count.most_common()))
    title = f"Launches, P = {options.positives}, levels: {options.levels}"
    print_table(title, ["loss", "forward", "backward", "both"], rows)


if __name__ == "__main__":
    main()
