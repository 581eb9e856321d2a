"""Assembles what Hugging Face's ``kernels`` library loads: the losses with their engine and kernels.

    python tools/hub.py build/hub

The files are the package's own, unchanged, without those that need NumPy. The library imports them as
``_alrp_triton_<backend>_<hash>``, which is the namespace of their operators, too; so they may stand beside an installed
``alrp_triton`` or another version of themselves.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from alrp_triton import __version__

ROOT = Path(__file__).resolve().parent.parent
NAME, LICENSE = "alrp-triton", "apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
# The library counts by one number, of which 0 promises nothing.
VERSION = int(__version__.partition(".")[0])

BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
CARD = f"""---
library_name: kernels
license: {LICENSE}
---

# {NAME}

Ranking-based losses for object detection: aLRP, AP, Rank & Sort, APE and NDCG Loss, exact in linear time, in Triton
kernels and in PyTorch. This is version {__version__} of the Python package {NAME}, without its integrations.

```python
import torch
from kernels import get_kernel

losses = get_kernel("<owner>/{NAME}", version={VERSION}, trust_remote_code=True)
logits = torch.randn(2, 1000, 80, device="cuda", requires_grad=True)
labels = torch.full((2, 1000), 80, device="cuda")  # background
labels[:, :5] = 3
losses.ap_loss(logits, labels).backward()
```
"""


def sources() -> Iterator[tuple[str, Path]]:
    """Names in the assembled package, and the files."""
    package = ROOT / "alrp_triton"
    modules = [
        package / f"{name}.py" for name in ("__init__", "boxes", "compiling", "framework", "positives", "reference")
    ]
    for path in (*modules, *package.glob("engine/**/*.py"), *package.glob("losses/**/*.py")):
        if not path.name.startswith("numba"):
            yield path.relative_to(package).as_posix(), path
    for path in (ROOT / "kernels").glob("**/*.py"):
        yield path.relative_to(ROOT).as_posix(), path


def assemble(target: Path) -> None:
    """Write the folder ``target``, which must not exist."""
    files = dict(sorted(sources()))
    hashed = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    unique = hashlib.sha256(repr(hashed).encode()).hexdigest()[:7]
    digest = {"algorithm": "sha256", "files": {name: base64.b64encode(h).decode() for name, h in hashed.items()}}
    target.mkdir(parents=True)
    (target / "build.toml").write_text(BUILD, encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", target)
    for backend in BACKENDS:
        variant = target / "build" / f"torch-{backend}"
        for name, path in files.items():
            (variant / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, variant / name)
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
            "version": VERSION,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
            "digest": digest,
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (target / "build" / "CARD.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    assemble(Path(sys.argv[1]))
