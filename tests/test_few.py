"""What is not looked at one by one: scores below all ramps, and labels of the background."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from dialect import INF, KERNELS, assert_same_passes, late_levels, layouts

from alrp_triton.engine import Levels
from alrp_triton.engine.labels import LabelKinds, positions
from alrp_triton.engine.passes import eager, numba_installed, passes_of

if KERNELS or not numba_installed():
    pytest.skip("needs Numba, and no kernel", allow_module_level=True)


@pytest.mark.parametrize("delta", [1.0, 0.0, 1e-6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_few_scores_that_reach_a_ramp(delta: float, dtype: torch.dtype) -> None:
    levels = late_levels(dtype=dtype)
    assert_same_passes(levels, delta)
    # Among others of which all do: several pieces are looked at together, or one by one.
    many, background = torch.linspace(-1, 4, 20 * 41).to(dtype).view(20, 41), torch.full((20,), 41)
    mixed = Levels([torch.cat([many, levels.logits[0], many])], [torch.cat([background, levels.labels[0], background])])
    for piece in (1 << 9, 1 << 12):
        with patch.object(eager, "_PIECE", piece):
            assert_same_passes(levels, delta)
            assert_same_passes(mixed, delta)
    assert_same_passes(levels._replace(groups=[torch.arange(700) // 300]), delta)
    # Stretches of their own, which end where a block does, one before and one after.
    for end in (1, 1023, 1024, 1025, 8191, 8192, 8193, 9217):
        few = levels.logits[0].reshape(-1)[:end]
        assert_same_passes(Levels([few, levels.logits[0]], [torch.zeros(end, dtype=torch.int8), *levels.labels]), delta)


@pytest.mark.parametrize("delta", [1.0, 0.0])
def test_nothing_reaches_a_ramp(delta: float) -> None:
    levels = late_levels()
    below = levels.logits[0].where(levels.logits[0] == levels.logits[0].amax(1, keepdim=True), torch.tensor(-50.0))
    for x in (below.nan_to_num(-50.0), torch.full_like(below, -INF), torch.full_like(below, -50.0)):
        assert_same_passes(Levels([x], levels.labels), delta)
        assert_same_passes(Levels([x], [torch.full_like(levels.labels[0], 41)]), delta)  # no positives


@pytest.mark.parametrize("name", [*layouts(), "late"])
def test_finds_the_same_positives(name: str) -> None:
    """In stretches that end anywhere, and with any label for what is ignored."""
    levels = late_levels() if name == "late" else layouts()[name]
    for ignore_index in (-1, 0, 1, 5, 255, 2**70):
        levels, found = levels._replace(ignore_index=ignore_index), []
        for backend in ("torch", "numba"):
            try:
                found.append(passes_of(backend).find(levels, None, "num_positives")[:2])
            except ValueError as error:
                found.append(str(error))
        for one, other in zip(*found):
            assert one == other if isinstance(one, str) else one.equal(other)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
@pytest.mark.parametrize("columns", [1, 80, 300])
@pytest.mark.parametrize("numpy", [True, False])
def test_positives_among_labels_of_any_dtype(
    columns: int, dtype: torch.dtype, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the label of the background is no number of the dtype."""
    monkeypatch.setattr("alrp_triton.engine.labels._NUMPY_INSTALLED", numpy)
    for size in (0, 1, 2047, 2048, 2049, 5000):
        for places in ([], [0], [-1], [0, 2046, 2047, 2048, -1]):
            for label in (-2, 0, 1, 100, columns):
                labels = torch.full((size,), min(columns, torch.iinfo(dtype).max)).to(dtype)
                labels[[k for k in places if -size <= k < size]] = torch.tensor(label).to(dtype)
                for per_class in (True, False):
                    kinds = LabelKinds(labels, columns, per_class, -1)
                    rows = kinds.positive.nonzero().squeeze(1)
                    expected = rows * columns + labels[rows].long() if per_class else rows
                    found, invalid = positions(labels, columns if per_class else 1, per_class, -1)
                    assert found.equal(expected)
                    assert invalid == bool(kinds.invalid.any())
