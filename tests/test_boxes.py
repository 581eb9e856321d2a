"""Box similarities and errors: hand-worked values, torchvision as a peer, degenerate boxes, gradients."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from alrp_triton.boxes import box_error, ciou, diou, giou, iou

SIMILARITIES = {"iou": iou, "giou": giou, "diou": diou, "ciou": ciou}
KINDS = list(SIMILARITIES)
LARGEST_ERROR = {"iou": 1.0, "giou": 1.0, "diou": 1.0, "ciou": 1.25}  # times 1/(1 - tau)


def random_boxes(num_pairs=200, seed=0, dtype=torch.float64):
    """Pairs of valid boxes, of which most overlap, some are far apart, and some nested."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(2, num_pairs, 2, generator=generator, dtype=torch.float64) * 60
    size = torch.rand(2, num_pairs, 2, generator=generator, dtype=torch.float64) * 80 + 0.5
    pred, target = torch.cat([corner, corner + size], -1).to(dtype)
    return pred, target


def errors_and_gradients(pred, target, kind, tau=0.5):
    pred = pred.clone().requires_grad_()
    target = target.clone().requires_grad_()
    errors = box_error(pred, target, kind, tau)
    return errors.detach(), *torch.autograd.grad(errors.sum(), (pred, target))


def test_hand_worked_values():
    # Two squares of side 2 that share a unit square; and two 2 x 1 rectangles crossed at a corner.
    pred = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 1, 1]], dtype=torch.float64)
    target = torch.tensor([[1.0, 1, 3, 3], [0, 0, 1, 2], [2, 0, 3, 1]], dtype=torch.float64)
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    expected = {
        "iou": [1 / 7, 1 / 3, 0],
        "giou": [1 / 7 - 2 / 9, 1 / 3 - 1 / 4, -1 / 3],
        "diou": [1 / 7 - 2 / 18, 1 / 3 - 0.5 / 8, -4 / 10],
        "ciou": [1 / 7 - 2 / 18, 1 / 3 - 0.5 / 8 - v * v / (2 / 3 + v), -4 / 10],
    }
    for kind, similarity in SIMILARITIES.items():
        value = similarity(pred, target)
        torch.testing.assert_close(value, torch.tensor(expected[kind], dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("tau", [0, 0.5, 0.7])
def test_error_is_normalised_by_the_range_and_by_tau(tau):
    pred, target = random_boxes()
    for kind, similarity in SIMILARITIES.items():
        expected = (1 - similarity(pred, target)) / (1 if kind == "iou" else 2) / (1 - tau)
        torch.testing.assert_close(box_error(pred, target, kind, tau), expected, rtol=1e-14, atol=0)


def test_similarities_agree_with_torchvision():
    ops = pytest.importorskip("torchvision.ops")
    peers = {
        "iou": ops.box_iou,
        "giou": ops.generalized_box_iou,
        "diou": ops.distance_box_iou,
        "ciou": ops.complete_box_iou,
    }
    pred, target = random_boxes()
    for kind, similarity in SIMILARITIES.items():
        # The peers add 1e-7 to some denominators.
        torch.testing.assert_close(similarity(pred, target), peers[kind](pred, target).diagonal(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["giou", "diou", "ciou"])
def test_gradients_agree_with_torchvision(kind):
    ops = pytest.importorskip("torchvision.ops")
    peer = {
        "giou": ops.generalized_box_iou_loss,
        "diou": ops.distance_box_iou_loss,
        "ciou": ops.complete_box_iou_loss,
    }
    pred, target = random_boxes(seed=1)
    _, pred_gradient, target_gradient = errors_and_gradients(pred, target, kind, tau=0.5)
    pred.requires_grad_()
    target.requires_grad_()
    # (1 - S)/2/(1 - 0.5) is the peer's 1 - S.
    expected = torch.autograd.grad(peer[kind](pred, target).sum(), (pred, target))
    torch.testing.assert_close(pred_gradient, expected[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(target_gradient, expected[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradcheck(kind):
    pred, target = (boxes.requires_grad_() for boxes in random_boxes(20, seed=2))
    assert torch.autograd.gradcheck(lambda p, t: box_error(p, t, kind, 0.5), (pred, target))


def test_gradcheck_of_ciou_with_alpha_held_constant():
    pred, target = random_boxes(20, seed=2)
    v = 4 / math.pi**2 * (aspect(target) - aspect(pred)) ** 2
    alpha = v / (1 - iou(pred, target) + v)

    def with_constant_alpha(p, t):
        return diou(p, t) - alpha * 4 / math.pi**2 * (aspect(t) - aspect(p)) ** 2

    pred.requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(with_constant_alpha, (pred, target))
    torch.testing.assert_close(ciou(pred, target), with_constant_alpha(pred, target), rtol=1e-13, atol=1e-15)
    ours = torch.autograd.grad(ciou(pred, target).sum(), (pred, target))
    expected = torch.autograd.grad(with_constant_alpha(pred, target).sum(), (pred, target))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-15)


def aspect(boxes):
    return torch.atan((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]))


# Coordinates that collide often, so that sides of length 0, touching, nested, equal and inverted boxes all come up.
coordinates = st.one_of(
    st.sampled_from([0.0, 1.0, 1.5, 10.0, -3.0, 1e4, 1e6, -1e6, 1e-7, 1e-20, 1e-45]),
    st.floats(-1e6, 1e6, width=32),
)
boxes_and_scale = st.tuples(
    st.lists(st.lists(coordinates, min_size=8, max_size=8), max_size=6), st.sampled_from([1.0, 1e-6, 1e-30])
)


@settings(max_examples=150, deadline=None)
@example(drawn=([[0.0, 0, 1, 1] * 2], 1e-20), dtype=torch.float32, kind="iou")
@example(drawn=([[0.0, 0, 1, 1] * 2], 1e-20), dtype=torch.float32, kind="ciou")
@example(drawn=([[0.0, 0, 1, 1, 1, 0, 2, 1]], 1e-20), dtype=torch.float32, kind="giou")
@given(drawn=boxes_and_scale, dtype=st.sampled_from([torch.float32, torch.float64]), kind=st.sampled_from(KINDS))
def test_any_finite_boxes_give_bounded_errors_and_finite_gradients(drawn, dtype, kind):
    rows, scale = drawn
    pred, target = (torch.tensor(rows, dtype=dtype).reshape(-1, 8) * scale).split(4, -1)
    errors, *gradients = errors_and_gradients(pred, target, kind, tau=0.5)
    assert errors.shape == (len(rows),)
    assert (errors >= 0).all()
    assert (errors <= 2 * LARGEST_ERROR[kind] * (1 + 1e-6)).all()
    assert all(gradient.isfinite().all() for gradient in gradients)
    # A box against itself: no error at all if it has an area, which it must not lose to rounding.
    errors, *gradients = errors_and_gradients(pred, pred, kind, tau=0.5)
    sides = (pred[:, 2:] - pred[:, :2]).clamp(min=0)
    has_area = sides.prod(-1) > torch.finfo(dtype).eps ** 2
    assert (errors[has_area] == 0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_values_of_degenerate_boxes():
    square, point, line = [0.0, 0, 2, 2], [1.0, 1, 1, 1], [0.0, 0, 0, 2]
    inverted, far = [2.0, 2, 0, 0], [6.0, 0, 8, 2]
    pairs = [(point, point), (point, square), (line, line), (inverted, square), (inverted, inverted), (inverted, far)]
    pred, target = (torch.tensor(boxes) for boxes in zip(*pairs))
    assert iou(pred, target).tolist() == [0] * 6
    # Enclosing areas: none, 4 (all of it the square), none, 4, 4 (all of it empty), 16 (4 of it the far square).
    assert giou(pred, target).tolist() == [0, 0, 0, 0, -1, -0.75]
    torch.testing.assert_close(diou(pred, target), torch.tensor([0, 0, 0, 0, 0, -36 / 68]))
    # Aspect angles: points count as squares, pi/4; so v is 0 everywhere, but the two lines agree as well.
    torch.testing.assert_close(ciou(pred, target), torch.tensor([0, 0, 0, 0, 0, -36 / 68]))
    # A line, angle 0, against the square, pi/4: v = 4/pi^2 (pi/4)^2 = 1/4, alpha = (1/4)/(5/4); centres 1 apart of 8.
    value = ciou(torch.tensor([line]), torch.tensor([square]))
    torch.testing.assert_close(value, torch.tensor([-1 / 8 - 0.25 * 0.2]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_flat_box_inside_its_target_learns_to_grow(kind):
    _, gradient, _ = errors_and_gradients(torch.tensor([[1.0, 0, 1, 2]]), torch.tensor([[0.0, 0, 2, 2]]), kind)
    assert gradient[0, 2] < 0 < gradient[0, 0]


def test_boxes_without_a_union_have_no_gradient_of_iou():
    line = torch.tensor([[0.0, 0, 0, 1e4]])
    _, *gradients = errors_and_gradients(line, line, "iou")
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_equal_boxes_have_no_negative_error(dtype):
    # A few units in the last place between the two, where rounding is as large as the error itself.
    target = random_boxes(20_000, dtype=dtype)[0]
    towards = torch.randint(-1, 2, (3, *target.shape), generator=torch.Generator().manual_seed(5)) * math.inf
    pred = target
    for direction in towards.to(dtype):
        pred = torch.where(direction.isnan(), pred, torch.nextafter(pred, direction))
    for kind in KINDS:
        errors = box_error(pred, target, kind, 0.0)
        assert errors.min() == 0
        assert errors.max() < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["pred", "target"])
@pytest.mark.parametrize("columns", [[0], [1], [2], [3], [0, 2], [0, 1, 2, 3]])
def test_nan_is_not_hidden(kind, side, columns):
    box, other, sound = [0.0, 0, 2, 2], [1.0, 1, 3, 3], [5.0, 5, 6, 6]
    bad = torch.tensor([box, sound])
    bad[0, columns] = math.nan
    pred, target = (bad, torch.tensor([other, sound]))[:: 1 if side == "pred" else -1]
    errors, *gradients = errors_and_gradients(pred, target, kind)
    assert errors[0].isnan()
    assert errors[1] == 0
    gradient = gradients[0 if side == "pred" else 1]
    assert gradient[0, columns].isnan().all()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    pred, target = random_boxes(dtype=dtype)
    expected = errors_and_gradients(pred.float(), target.float(), kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = errors_and_gradients(pred, target, kind)
    assert actual[0].dtype == torch.float32
    assert torch.equal(actual[0], expected[0])
    for gradient, wide in zip(actual[1:], expected[1:]):
        assert torch.equal(gradient, wide.to(dtype))
    # Areas beyond the largest half, 65504.
    huge = torch.tensor([[0, 0, 6e4, 6e4]], dtype=dtype)
    assert box_error(huge, huge, kind, 0.5).item() == 0


def test_dtype_of_the_result_is_the_wider_of_the_two():
    pred, target = random_boxes(3)
    for kind in KINDS:
        assert box_error(pred, target, kind, 0.5).dtype == torch.float64
        assert box_error(pred.float(), target.float(), kind, 0.5).dtype == torch.float32
        assert box_error(pred.half(), target.double(), kind, 0.5).dtype == torch.float64
        assert box_error(pred.half(), target.bfloat16(), kind, 0.5).dtype == torch.float32


def test_a_callable_is_used_as_it_is():
    pred, target = random_boxes(5, dtype=torch.float16)
    seen = []

    def l1(p, t):
        seen.extend([p.dtype, t.dtype])
        return (p - t).abs().mean(-1)

    errors = box_error(pred, target, l1, 0.9)
    assert seen == [torch.float32, torch.float32]
    assert torch.equal(errors, (pred.float() - target.float()).abs().mean(-1))


def good(num_pairs=3):
    return torch.zeros(num_pairs, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([[0, 0, 1, 1]], good(), "iou", 0.5),
            TypeError,
            r"pred_boxes: expected a tensor \[P, 4\] or \[P, 6\], got list",
        ),
        ((good(), None, "iou", 0.5), TypeError, r"target_boxes: expected a tensor \[P, 4\] or \[P, 6\], got NoneType"),
        ((good().long(), good(), "iou", 0.5), TypeError, r"pred_boxes: expected float16.* got torch.int64"),
        ((good(), good().to(torch.complex64), "iou", 0.5), TypeError, r"target_boxes: .* got torch.complex64"),
        (
            (torch.zeros(4), good(), "iou", 0.5),
            ValueError,
            r"pred_boxes: expected shape \[P, 4\] or \[P, 6\], got \[4\]",
        ),
        ((good(), torch.zeros(3, 5), "iou", 0.5), ValueError, r"target_boxes: expected shape .* got \[3, 5\]"),
        ((good(3), good(1), "iou", 0.5), ValueError, r"target_boxes: .* \[3, 4\], got \[1, 4\]"),
        ((good(), good().to("meta"), "iou", 0.5), ValueError, r"target_boxes: .* cpu, got meta"),
        ((good(), good(), "l1", 0.5), ValueError, r"box_error: expected one of 'iou', .* got 'l1'"),
        ((good(), good(), 3, 0.5), TypeError, r"box_error: expected a string or a callable, got int"),
        ((good(), good(), "iou", 1.0), ValueError, r"tau: expected a number in \[0, 1\), got 1.0"),
        ((good(), good(), "iou", -0.1), ValueError, r"tau: .* got -0.1"),
        ((good(), good(), "iou", math.nan), ValueError, r"tau: .* got nan"),
        ((good(), good(), "iou", "0.5"), TypeError, r"tau: .* got str"),
        ((good(), good(), "iou", torch.tensor(0.5)), TypeError, r"tau: .* got Tensor"),
        ((good(), good(), lambda p, t: p.sum(), 0.5), ValueError, r"box_error: .* shape \[3\] on cpu, got \[\] on cpu"),
        ((good(), good(), lambda p, t: p.sum(1).to("meta"), 0.5), ValueError, r"box_error: .* got \[3\] on meta"),
        ((good(), good(), lambda p, t: 0.0, 0.5), TypeError, r"box_error: .* return a tensor \[P\], got float"),
        (
            (good(), good(), lambda p, t: p[:, 0].long(), 0.5),
            TypeError,
            r"box_error: .* floating-point .* got torch.int64",
        ),
        (([[1.0]], good(), iou, 0.5), TypeError, r"pred_boxes: .* got list"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        box_error(*arguments)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind):
    pred, target = random_boxes(7, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(box_error, backend="aot_eager", fullgraph=True)
    for tau in (0.5, 0.7):
        p, q = pred.clone().requires_grad_(), pred.clone().requires_grad_()
        errors, expected = compiled(p, target, kind, tau), box_error(q, target, kind, tau)
        torch.testing.assert_close(errors, expected)
        torch.testing.assert_close(*torch.autograd.grad(errors.sum(), p), *torch.autograd.grad(expected.sum(), q))


def test_reads_no_value_on_the_host():
    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode():
        for kind in KINDS:
            pred = torch.rand(5, 4, requires_grad=True)
            box_error(pred, torch.rand(5, 4), kind, 0.5).sum().backward()
            assert pred.grad.shape == (5, 4)


def in_volumes(boxes, low=0.0, high=1.0):
    """Boxes of these sides along a third axis."""
    ends = boxes.new_tensor([low, high]).expand(len(boxes), 2)
    return torch.cat([boxes[:, :2], ends[:, :1], boxes[:, 2:], ends[:, 1:]], 1)


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_boxes_of_equal_depth_are_as_in_the_plane(kind):
    pred, target = random_boxes(seed=3)
    flat = errors_and_gradients(pred, target, kind)
    deep = errors_and_gradients(in_volumes(pred), in_volumes(target), kind)
    torch.testing.assert_close(deep[0], flat[0], rtol=1e-14, atol=1e-15)
    for gradient, expected in zip(deep[1:], flat[1:]):
        torch.testing.assert_close(gradient[:, [0, 1, 3, 4]], expected, rtol=1e-12, atol=1e-14)


def test_hand_worked_values_in_volumes():
    """Two cubes of side 2 that share a unit cube; two unit cubes a cube apart; and one in the other."""
    pred = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0, 0, 0, 1, 1, 1], [0, 0, 0, 2, 2, 2]], dtype=torch.float64)
    target = torch.tensor([[1.0, 1, 1, 3, 3, 3], [2, 0, 0, 3, 1, 1], [0, 0, 0, 1, 1, 1]], dtype=torch.float64)
    expected = {
        "iou": [1 / 15, 0, 1 / 8],
        "giou": [1 / 15 - 12 / 27, -1 / 3, 1 / 8],
        "diou": [1 / 15 - 3 / 27, -4 / 11, 1 / 8 - 0.75 / 12],
    }
    for kind, values in expected.items():
        found = SIMILARITIES[kind](pred, target)
        torch.testing.assert_close(found, torch.tensor(values, dtype=torch.float64), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_boxes_in_volumes_that_are_empty_inverted_or_nan(kind):
    boxes = torch.tensor([[0.0, 0, 0, 0, 0, 0], [3, 3, 3, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, torch.nan]])
    for target in (boxes, boxes.flip(0), torch.zeros_like(boxes)):
        errors, *gradients = errors_and_gradients(boxes[:3], target[:3].nan_to_num(2.0), kind)
        assert errors.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients)
    errors, gradient, _ = errors_and_gradients(boxes[3:], boxes[2:3], kind)
    assert errors.isnan()
    assert gradient.isnan().any()


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradients_in_volumes_by_differences(kind):
    pred, target = (torch.cat([x, y], 1) for x, y in zip(random_boxes(30, seed=4), random_boxes(30, seed=5)))
    pred, target = (x[:, [0, 1, 4, 2, 3, 6]].requires_grad_() for x in (pred, target))
    assert torch.autograd.gradcheck(lambda a, b: box_error(a, b, kind, 0.5), (pred, target))


def test_boxes_in_volumes_have_no_aspect_ratio():
    with pytest.raises(ValueError, match=r"pred_boxes: expected shape \[P, 4\] for 'ciou'"):
        ciou(torch.ones(2, 6), torch.ones(2, 6))
    with pytest.raises(ValueError, match="target_boxes: expected the shape of pred_boxes"):
        giou(torch.ones(2, 6), torch.ones(2, 4))
