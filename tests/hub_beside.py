"""Loads what tools/hub.py assembled beside the installed package; both must give the same bits.

    python tests/hub_beside.py build/hub [backend]

Without a backend the loaded package chooses one. Hugging Face's ``kernels`` loads it if that is installed; otherwise
the same import does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

import alrp_triton


def load(hub: Path) -> ModuleType:
    """The package in the folder ``hub``, under the name that its metadata tell."""
    if importlib.util.find_spec("kernels"):
        from kernels import get_kernel

        os.environ["LOCAL_KERNELS"] = f"owner/alrp-triton={hub}"
        return get_kernel("owner/alrp-triton", version=0)
    variant = hub / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(package: ModuleType, backend: str) -> list[torch.Tensor]:
    """Losses and gradients of functions and of a module, with two levels and two rankings."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, rows, 3, generator=generator).requires_grad_() for rows in (20, 5)]
    labels = [torch.full((2, rows), 3) for rows in (20, 5)]
    labels[0][:, ::7], labels[1][0, 2] = 1, 0
    num_positives = sum(int((y < 3).sum()) for y in labels)
    ious = torch.rand(num_positives, generator=generator)
    boxes = (torch.rand(num_positives, 4, generator=generator) + torch.tensor([0, 0, 1, 1])).requires_grad_()
    target = torch.tensor([0.0, 0.0, 1.5, 1.5]).repeat(num_positives, 1)
    losses = [
        package.ap_loss(levels, labels, groups="image", backend=backend),
        package.rank_sort_loss(levels, labels, ious, backend=backend).total,
        package.framework.ranking_loss(levels, labels, lambda r: (r.rank / r.rank_positive).log(), backend=backend),
        package.ALRPLoss(backend=backend)(levels, labels, boxes, target).total,
    ]
    gradients = torch.autograd.grad(sum(losses), [*levels, boxes])
    return [*losses, *gradients]


if __name__ == "__main__":
    loaded, backends = load(Path(sys.argv[1])), sys.argv[2:] or ["auto", "torch"]
    assert loaded is not alrp_triton
    assert hasattr(getattr(torch.ops, loaded.__name__), "find")
    found, expected = results(loaded, backends[0]), results(alrp_triton, backends[-1])
    assert all(one.equal(other) for one, other in zip(found, expected))
    print(f"{loaded.__name__} {loaded.__version__} gives the bits of alrp_triton {alrp_triton.__version__}")
