"""What is wrong with an installation, and how to mend it. ``alrp-triton doctor`` prints it.

Each function looks at one thing, and yields lines of text and the faults that it finds. They change nothing, but those
that run kernels or loops fill the caches of Triton and Numba.
"""

from __future__ import annotations

import getpass
import importlib.metadata
import itertools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from . import __version__, doctor_devices, info, verify
from .doctor_devices import Fault, Findings, one_line
from .engine.passes import BACKENDS

SECONDS = 20.0
"""After these no check of results begins."""

_FRAMEWORKS = (
    *("torchvision", "mmdet", "onedl-mmdetection", "mmengine", "mmcv", "mmcv-lite", "monai", "transformers"),
    *("accelerate", "detectron2", "ultralytics", "rfdetr", "libreyolo", "effdet", "lightning"),
    *("pycocotools", "torchmetrics", "scikit-learn", "rich"),
)
_ENVIRONMENT = (
    *info.ENVIRONMENT,
    *("TRITON_CACHE_DIR", "NUMBA_CACHE_DIR", "NUMBA_DISABLE_JIT", "CC", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
)
_AGAIN = "pip install --force-reinstall --no-deps alrp-triton, or in a checkout pip install -e ."


def examine() -> Iterator[tuple[str, Findings]]:
    """Titles, and what there is to say under each: lines, and faults. Paths do not name the user."""
    for title, look in _LOOKS.items():
        yield title, map(_without_user, _surviving(look))


def _surviving(look: Callable[[], Findings]) -> Findings:
    """What it yields; an error that nobody has thought of is a fault, too."""
    try:
        yield from look()
    except Exception as error:
        yield Fault(f"this could not be examined: {one_line(error)}", "please report it, with this output")


def _versions() -> Findings:
    found = info.versions()
    drivers = {line.rpartition(", ")[2] for line in doctor_devices.gpus_of_driver()}
    found["nvidia driver"] = ", ".join(sorted(drivers)) or None
    yield from (f"{name:<14}{version or '-'}" for name, version in found.items())
    installed = {name: version for name in _FRAMEWORKS if (version := _version(name))}
    yield f"{'frameworks':<14}{', '.join(f'{name} {version}' for name, version in installed.items()) or 'none'}"
    oldest = _oldest()
    for name, version in {**found, **installed}.items():
        if version and _numbers(version) < oldest.get(name, ()):
            wanted = ".".join(map(str, oldest[name]))
            yield Fault(f"{name}: expected {wanted} or later, got {version}", f"pip install '{name}>={wanted}'")


def _oldest() -> dict[str, tuple[int, ...]]:
    """The oldest versions of other packages that are supported, as this one's metadata give them."""
    try:
        required = importlib.metadata.requires("alrp-triton") or []
    except importlib.metadata.PackageNotFoundError:  # of which _package tells
        return {}
    found = (re.match(r"([\w-]+)[^;]*>=([\d.]+)", line) for line in required)
    return {match[1]: _numbers(match[2]) for match in found if match}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Of a release: 2.9 of 2.9.0a1+cu128."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def _package() -> Findings:
    imported = Path(__file__).resolve().parent
    yield f"imported from {imported}"
    installed = list(distributions(name="alrp-triton"))
    places = {imported, *(place.resolve() for place in _copies(installed))}
    if len(places) > 1:
        others = ", ".join(map(str, sorted(places - {imported})))
        mend = "keep one: pip uninstall alrp-triton until pip knows none, then install again; start Python elsewhere"
        yield Fault(f"another copy of the package is on the path, and may be taken instead: {others}", mend)
    if not installed:
        yield Fault("the package is not installed, but imported from a folder", "pip install . in that folder")
    for version in {each.version for each in installed} - {__version__}:
        yield Fault(f"pip knows version {version}, and Python imports {__version__}", _AGAIN)
    if find_spec(doctor_devices.KERNELS) is None:
        yield Fault(f"{doctor_devices.KERNELS} is missing, which Triton's backends and the command info need", _AGAIN)


def _copies(installed: list[Distribution]) -> Iterator[Path]:
    """Folders of the package that Python may import."""
    for folder in map(Path, sys.path):
        if (folder / "alrp_triton" / "__init__.py").is_file():
            yield folder / "alrp_triton"
    for each in installed:
        direct = json.loads(each.read_text("direct_url.json") or "{}")
        if direct.get("dir_info", {}).get("editable"):
            yield Path(url2pathname(urlparse(direct["url"]).path)) / "alrp_triton"


def _results() -> Findings:
    """Cases of ``alrp-triton verify --quick``, one of each backend in turn, so that no slow one keeps others out."""
    checks, _ = verify.plan(BACKENDS, info.devices(), quick=True)
    by_backend = [list(group) for _, group in itertools.groupby(checks, lambda check: (check.backend, check.device))]
    begin, rows = time.perf_counter(), list[verify.Row]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of infinities, which are part of cases
        for check in filter(None, itertools.chain(*itertools.zip_longest(*by_backend))):
            if time.perf_counter() - begin > SECONDS:
                break
            rows.append(check.run())
    for group in by_backend:
        backend, device = group[0].backend, str(group[0].device)
        own = [row for row in rows if (row.backend, row.device) == (backend, device)]
        passed = sum(not row.misses for row in own)
        left = f"; {len(group) - len(own)} left out after {SECONDS:.0f} s" if len(own) < len(group) else ""
        yield f"{backend} on {device}: {passed} of {len(own)} checks against float64 passed{left}"
        if passed < len(own):
            row = next(row for row in own if row.misses)
            what = f"{backend} on {device} gives wrong results, such as in {row.case}: {'; '.join(row.misses)}"
            yield Fault(what, "take another backend, and please report it, with this output")


def _environment() -> Findings:
    given = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    yield from given or ["no variable is set that counts"]


_LOOKS: dict[str, Callable[[], Findings]] = {
    "Versions": _versions,
    "Package": _package,
    "Devices": doctor_devices.devices,
    "Kernels": doctor_devices.kernels,
    "Results": _results,
    "Caches": doctor_devices.caches,
    "Environment": _environment,
}


def _without_user(finding: str | Fault) -> str | Fault:
    """Without the name of the user, who may show this to others."""
    if isinstance(finding, Fault):
        return Fault(*(str(_without_user(text)) for text in finding))
    home = os.path.expanduser("~")
    if home.strip("/\\~"):
        finding = finding.replace(home, "~")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, where nobody has a name
        return finding
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|$)", "<user>", finding)
