"""Both passes of the compiled backend against those of PyTorch, bit for bit, and inputs for them."""

from __future__ import annotations

from unittest.mock import patch

import torch
from cases import INF, NAN
from checks import assert_same_bits

from alrp_triton.engine import Levels, fixed_point
from alrp_triton.engine.backends import torch as by_torch
from alrp_triton.engine.knots import Ramps, make_knots, ramp_coefficients
from alrp_triton.engine.positives import find_positives


def assert_same_passes(levels: Levels, delta: float = 1.0, ignore_index: int = -1) -> None:
    """Both passes, directly: also what no loss makes anything of."""
    from alrp_triton.engine.backends import numba as by_numba

    index, pos_logits, groups = find_positives(levels, None, ignore_index, "num_positives", "torch")
    pos_groups = groups if levels.groups else None
    knots = make_knots(pos_logits, delta, pos_groups)
    ramps = Ramps(knots.thresholds, knots.threshold_groups, delta, "")
    scale = 2.0 ** fixed_point.fraction_bits(levels.num_logits)
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(2, len(index), generator=generator, dtype=torch.float64)
    coefficients = ramp_coefficients(knots, weights)
    counted, written = [], []
    with patch.object(by_numba, "_RUN", 0):  # in loops, however groups alternate
        for backend in (by_torch, by_numba):
            counted.append(backend.count_negatives(levels, ramps, pos_logits, pos_groups, ignore_index, scale))
            tables = coefficients[None], index, gradients[None]
            written.append(backend.write_gradient(levels, ramps, *tables, ignore_index, torch.ones(1)))
    expected, found = counted
    # Of NaN only the number means anything.
    assert_same_bits("totals", found[:, :-1], expected[:, :-1])
    assert_same_bits("NaN", found[0, -1], expected[0, -1])
    for one, other in zip(written[1], written[0]):
        assert one.stride() == other.stride()
        assert_same_bits("gradient", one, other)


def layouts() -> dict[str, Levels]:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(-1, 60, (2, 90), generator=generator).clamp(max=5)
    x = torch.randn(2, 90, 5, generator=generator)
    labels = torch.where(torch.rand(x.shape, generator=generator) < 0.1, 1, 0)
    images = torch.arange(2)[:, None].expand(2, 90)
    return {
        "classes": Levels([x], [classes]),
        "uint8": Levels([x], [classes.clamp(min=0).to(torch.uint8)]),
        "permuted": Levels([torch.randn(5, 2, 90, generator=generator).permute(1, 2, 0)], [classes.int()]),
        "transposed": Levels([x.transpose(0, 1)], [labels.transpose(0, 1).to(torch.int8)]),
        "steps": Levels([torch.randn(2, 90, 10, generator=generator)[..., ::2]], [labels.to(torch.int16)]),
        "expanded": Levels([x[:1].expand(2, 90, 5)], [labels]),
        "images": Levels([x], [classes], [images]),
        "images of halves": Levels([x.half()], [classes], [images]),
        "groups of logits": Levels([x], [labels], [labels.cumsum(1).to(torch.int8)]),
        "levels": Levels([x, x[:0], x[0, 0], 2 * x], [classes, classes[:0], torch.tensor(3), labels]),
    }  # fmt: skip


def late_levels(num_rows: int = 700, columns: int = 41, dtype: torch.dtype = torch.float32) -> Levels:
    """Scores of which few reach a ramp, labelled by row, some rows ignored; and what is easily lost where stretches are
    skipped: the last score of all, the last of a block, infinities, and NaN, one of them ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, columns, generator=generator, dtype=torch.float64) * 1.5 - 9
    classes = torch.full((num_rows,), columns)
    classes[::50] = 3
    x[::50, 3] = torch.linspace(-1.0, 4.0, len(classes[::50]), dtype=torch.float64)
    classes[7::90] = -1
    flat = x.view(-1)
    flat[[1023, 1024, 8191, 8192, 9215, 20_000, -1]] = torch.tensor([1.0, 0.5, 2.0, 0.0, -1.5, INF, 1.25]).double()
    x[7, 5], x[97, 6], x[12], flat[12_345] = 3.0, NAN, -INF, NAN
    return Levels([x.to(dtype)], [classes])
