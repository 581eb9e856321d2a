"""Where the virtual GPU keeps what it builds and compiles."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """``$VIRTUAL_GPU_CACHE``, or a folder of this user among the temporary files, which is made if need be."""
    chosen = os.environ.get("VIRTUAL_GPU_CACHE")
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir(), f"virtual-gpu-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # What lies there is run.
    if not chosen and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; name a folder of your own by VIRTUAL_GPU_CACHE")
    return folder.resolve()
