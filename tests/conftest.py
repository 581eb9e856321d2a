"""One thread for each process: the tensors here are small, and pytest-xdist has processes enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import INTERPRETED

if TYPE_CHECKING:
    from processes import Pool

torch.set_num_threads(1)

# Tests run with the repository's root on the path, where transformers, which looks for Hugging Face's package of this
# name, would find the folder of ours.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

if INTERPRETED:
    from triton.runtime import interpreter

    prepared: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A device function within a kernel, whose launch has prepared the language already. Triton does that again at
        each call, by going through all of it, which is a third of the time of small kernels; but what else a module
        sees of the language, as Triton's own do, is prepared by the first of its functions for good."""
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Processes that rank together; started once, for the worker that has their tests."""
    from processes import SIZE, Pool

    pool = Pool(SIZE, tmp_path_factory.mktemp("store") / "store")
    yield pool
    pool.close()
