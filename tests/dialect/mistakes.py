"""A mistake: a call, and what is said of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest

Mistake = tuple[Callable[..., Any], type[Exception], tuple[str, ...]]
"""A call, what it raises or warns by, and parts of the text: what came, what was expected, what to write instead."""


def says(mistake: Mistake, *given: Any) -> None:
    """Check what is said of a mistake; ``given`` are the arguments of its call."""
    call, kind, parts = mistake
    if issubclass(kind, Warning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(*given)
        (said,) = (str(one.message) for one in caught)
    else:
        with pytest.raises(kind) as raised:
            call(*given)
        said = str(raised.value)
    for part in parts:
        assert part in said, said
    if kind in (ValueError, UserWarning):
        assert re.match(r"[\w\[\]]+: expected |labels of image ", said), said
