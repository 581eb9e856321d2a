"""Both passes of the compiled backend against those of PyTorch, bit for bit, and inputs for them."""

from __future__ import annotations

from unittest.mock import patch

import torch

from alrp_triton.engine import Levels
from alrp_triton.engine.knots import make_knots, ramp_coefficients
from alrp_triton.engine.passes import Own, passes_of

from .cases import INF, NAN
from .checks import assert_same_bits


def assert_same_passes(levels: Levels, delta: float = 1.0) -> None:
    """Both passes, directly: also what no loss makes anything of."""
    from alrp_triton.engine.passes import numba

    found = passes_of("torch").find(levels, None, "num_positives")
    knots = make_knots(found.logits, delta, found.groups)
    generator = torch.Generator().manual_seed(0)
    weights, of_own = torch.randn(2, len(found.indices), generator=generator, dtype=torch.float64)
    lines, own = ramp_coefficients(knots, weights), Own(found.indices, of_own[None])
    counted, written = [], []
    # Groups in runs, however short, and one by one.
    one_by_one = [("numba", levels.num_logits() + 1)] if levels.groups else []
    for backend, run in [("torch", 0), ("numba", 0), *one_by_one]:
        passes = passes_of(backend)
        with patch.object(numba, "_RUN", run):
            counted.append(torch.zeros(2, 2 * len(found.indices) + 2, dtype=torch.int64))
            passes.count(levels, knots.table, found, counted[-1], delta, levels.num_logits())
            written.append(passes.write(levels, knots.table, lines, own, [torch.ones(())], delta))
    for totals, gradients in zip(counted[1:], written[1:]):
        # Of NaN only the number means anything; of bucket 0 nothing.
        assert_same_bits("totals", totals[:, 1:-1], counted[0][:, 1:-1])
        assert_same_bits("NaN", totals[0, -1], counted[0][0, -1])
        for one, other in zip(gradients, written[0]):
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
