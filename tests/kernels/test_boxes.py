"""Box errors and their derivatives by one kernel, against the same formulas in PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from alrp_triton.kernels.boxes import KINDS, Boxes, compare_boxes
from dialect import BORROWED, COMPILED_FOR, INF, NAN, assert_same_bits
from torch import Tensor

from alrp_triton import boxes
from alrp_triton.boxes import box_error, iou

by_kind = pytest.mark.parametrize("kind", KINDS)
COORDINATES = (-3.0, 0.0, 0.5, 2.0, 2.0, 7.0)


def drawn(num_pairs: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Boxes:
    """Half of them by coordinates that tie, some of them inverted, empty or equal."""
    generator = torch.Generator().manual_seed(seed)
    pred, target = 100 * torch.rand(2, num_pairs, 4, generator=generator)
    for box in (pred, target):
        box[:, 2:] += box[:, :2]
        some = torch.randint(len(COORDINATES), (num_pairs // 2, 4), generator=generator)
        box[: num_pairs // 2] = torch.tensor(COORDINATES)[some]
    target[::7] = pred[::7]
    return Boxes(pred.to(dtype), target.to(dtype))


def in_torch(pair: Boxes, kind: str, divisor: float, dtype: torch.dtype) -> tuple[Tensor, Boxes]:
    leaves = [box.to(dtype, copy=True).requires_grad_() for box in pair]
    similarity = boxes._SIMILARITIES[kind](*leaves)
    values = (1 - similarity) / divisor if divisor else similarity
    return values.detach(), Boxes(*torch.autograd.grad(values.sum(), leaves))


def check(pair: Boxes, kind: str, divisor: float = 0.0) -> None:
    dtype = torch.float64 if torch.float64 in (pair.pred.dtype, pair.target.dtype) else torch.float32
    values, gradients = compare_boxes(pair, kind, divisor, dtype, True)
    wanted, derivatives = in_torch(pair, kind, divisor, dtype)
    eps = torch.finfo(dtype).eps
    if kind == "ciou":
        torch.testing.assert_close(values, wanted, rtol=4 * eps, atol=4 * eps, equal_nan=True)
    else:
        assert_same_bits("values", values, wanted)
    # Terms of either sign, which are about as large as the derivative of a length's logarithm.
    sides = torch.cat([(box[:, 2:] - box[:, :2]).to(dtype) for box in pair], 1)
    terms = (1 / sides.masked_fill(~(sides > 0), INF)).amax(-1, keepdim=True) / (divisor or 1)
    for found, expected in zip(gradients, derivatives):
        known = ~expected.isnan()
        assert torch.equal(found.isnan().any(-1), expected.isnan().any(-1))
        scale = terms + expected.abs().nan_to_num().amax(-1, keepdim=True)
        assert ((found - expected).abs() <= 8 * eps * scale)[known & ~found.isnan()].all()


@by_kind
@pytest.mark.parametrize("num_pairs", [0, 1, 127, 128, 129, 1000])
def test_any_number_of_boxes(num_pairs: int, kind: str) -> None:
    check(drawn(num_pairs), kind)
    assert compare_boxes(drawn(num_pairs), kind, 0.0, torch.float32, False)[1] == (None, None)


@pytest.mark.thinned(2)
@by_kind
@pytest.mark.parametrize(
    ("pred", "target"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
    ],
)
def test_dtypes(pred: torch.dtype, target: torch.dtype, kind: str) -> None:
    pair = drawn(200)
    check(Boxes(pair.pred.to(pred), pair.target.to(target)), kind, 0.5)


@by_kind
def test_numbers_that_are_none(kind: str) -> None:
    """A NaN anywhere gives NaN; the other pairs do not learn of it."""
    pair = drawn(64, torch.float64)
    for i in range(8):
        pair[i // 4][40 + i, i % 4] = NAN
    check(pair, kind)
    values, gradients = compare_boxes(pair, kind, 0.0, torch.float64, True)
    assert values.isnan().tolist() == [40 <= i < 48 for i in range(64)]
    assert not gradients.pred[48:].isnan().any()


@by_kind
def test_sizes_of_any_magnitude(kind: str) -> None:
    for scale in (1e-20, 1e-6, 1e6, 1e13):
        check(Boxes(*(box * scale for box in drawn(100))), kind)


@pytest.mark.thinned(3)
@by_kind
@pytest.mark.parametrize("divisor", [0.5, 0.3, 2.0])
def test_equal_boxes_have_no_error(divisor: float, kind: str) -> None:
    box = drawn(500).pred
    box[:, 2:] = box[:, :2] + box[:, 2:].abs() + 0.1
    check(Boxes(box, box), kind, divisor)
    values, _ = compare_boxes(Boxes(box, box), kind, divisor, torch.float32, False)
    assert_same_bits("errors", values, torch.zeros(500))


def test_angles() -> None:
    """From flat to upright boxes, to the last digits of float64."""
    width = torch.tensor([10.0**k for k in range(-12, 13)], dtype=torch.float64)
    box = torch.stack([0 * width, 0 * width, width, 0 * width + 1], 1)
    square = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64).expand_as(box)
    values, _ = compare_boxes(Boxes(box, square), "ciou", 0.0, torch.float64, False)
    for found, x in zip(values.tolist(), width.tolist()):
        overlap, distance = min(x, 1) / max(x, 1), ((x - 1) / 2) ** 2 / (max(x, 1) ** 2 + 1)
        v = 4 / math.pi**2 * (math.pi / 4 - math.atan(x)) ** 2
        alpha = v / (1 - overlap + v) if v else 0
        assert found == pytest.approx(overlap - distance - alpha * v, rel=1e-14, abs=1e-14)


@pytest.mark.skipif(not COMPILED_FOR or BORROWED, reason="where kernels run, boxes are taken for those of a GPU")
def test_on_a_gpu_the_package_takes_the_kernel() -> None:
    from benchmarks.launches import counting

    pair = drawn(300)
    leaves = pair.pred.half().requires_grad_(), pair.target.requires_grad_()

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(box_error(*leaves, "giou", 0.5).sum(), leaves))

    gradients = step()
    assert [gradient.dtype for gradient in gradients] == [torch.float16, torch.float32]
    _, expected = in_torch(Boxes(*(leaf.detach() for leaf in leaves)), "giou", 1.0, torch.float32)
    for found, wanted in zip(gradients, expected):
        torch.testing.assert_close(found.float(), wanted, rtol=2e-3, atol=1e-4)
    error = box_error(pair.pred, leaves[1], "giou", 0.5)
    (gradient,) = torch.autograd.grad(error.sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
    assert not iou(*(leaf.detach() for leaf in leaves)).requires_grad
    with counting() as counts:
        step()
    assert counts["compare_boxes_kernel"] == 1
    # Beside it: the sum and its gradient, and of each box the derivatives times that; half precision is converted.
    assert counts.total() <= 6, counts


@by_kind
def test_strides_and_infinities(kind: str) -> None:
    pair = drawn(90)
    check(Boxes(pair.pred.t().contiguous().t(), pair.target.flip(0)[::2].repeat(2, 1)), kind)
    pair.pred[3, 2] = INF
    values, _ = compare_boxes(pair, kind, 0.0, torch.float32, True)
    assert values[4:].isfinite().all()
