"""Sees what would make the host wait for a GPU, without one."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.launches import Operators

# A value that the host reads, and a result whose size depends on values.
_WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Copies to the host and from its memory, for which no operator is called on the CPU, or none that tells them apart.
_COPIES = [(Tensor, name) for name in ("__array__", "cpu", "numpy", "tolist")]
_COPIES += [(torch, name) for name in ("as_tensor", "from_numpy", "tensor")]


class Waiting(Operators):
    """Those for which the host would wait."""

    def counted(self, name: str, schema: Any, args: Any, kwargs: Any) -> bool:
        by_mask = name in _INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        # Where all get the same number nobody has to know how many they are.
        by_mask = by_mask and not (len(args) > 2 and args[2].numel() == 1)
        repeats = name == "repeat_interleave" and kwargs.get("output_size") is None
        return name in _WAITS or by_mask or repeats


@contextlib.contextmanager
def waiting() -> Iterator[Counter[str]]:
    """What would wait meanwhile, by name."""
    mode = Waiting()

    def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            mode.counts[name] += 1
            return original(*given, **named)

        return call

    with contextlib.ExitStack() as stack:
        for owner, name in _COPIES:
            stack.enter_context(patch.object(owner, name, noted(name, getattr(owner, name))))
        stack.enter_context(mode)
        yield mode.counts
