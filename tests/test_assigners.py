"""ATSS: against a plain reading of the paper, object by object, and what random boxes miss."""

import copy
import pickle

import pytest
import torch
from torch import tensor

from alrp_triton.assigners import ATSS


def squares(size, stride, sides, shift=0.0):
    """Square anchors at every ``stride`` pixels, one after the other for each side."""
    line = torch.arange(0, size, stride) + shift
    y, x = torch.meshgrid(line, line, indexing="ij")
    centres = torch.stack([x, y], -1).reshape(-1, 1, 2)
    half = tensor(sides).view(1, -1, 1) / 2
    return torch.cat([centres - half, centres + half], -1).reshape(-1, 4)


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(area) - width * height)


def by_hand(levels, gt_boxes, topk):
    """Numbers of Python, one object after the other."""
    anchors = torch.cat(levels).tolist()
    matched, largest = [-1] * len(anchors), [0.0] * len(anchors)
    for number, box in enumerate(gt_boxes.tolist()):
        candidates, first = [], 0
        for level in levels:
            order = sorted(
                range(first, first + len(level)),
                key=lambda i: sum((anchors[i][k] + anchors[i][k + 2] - box[k] - box[k + 2]) ** 2 for k in (0, 1)),
            )
            candidates += order[:topk]
            first += len(level)
        overlaps = [overlap(anchors[i], box) for i in candidates]
        mean = sum(overlaps) / len(overlaps)
        variance = sum((value - mean) ** 2 for value in overlaps) / (len(overlaps) - 1)
        for i, value in zip(candidates, overlaps):
            x, y = ((anchors[i][k] + anchors[i][k + 2]) / 2 for k in (0, 1))
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if value >= mean + variance**0.5 and inside and value > largest[i]:
                matched[i], largest[i] = number, value
    return matched


def random_boxes(num, size, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = size * torch.rand(num, 2, generator=generator)
    sides = 4 + size * torch.rand(num, 2, generator=generator) ** 2
    return torch.cat([centres - sides / 2, centres + sides / 2], 1)


@pytest.mark.parametrize("topk", [1, 9, 40])  # 40 is more than the coarse levels have
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_plain_reading(seed, topk):
    # One anchor at a location: no two are equally near, of which one would be as right as the other.
    levels = [squares(128, stride, [8.0 * stride], shift=0.37) for stride in (8, 16, 32)]
    gt_boxes = random_boxes(12, 128, seed)
    matched = ATSS(topk)(levels, gt_boxes)
    assert matched.dtype == torch.int64
    assert matched.tolist() == by_hand(levels, gt_boxes, topk)
    assert (matched >= 0).sum() > 5
    flat = torch.cat(levels)
    assert torch.equal(ATSS(topk)(flat, gt_boxes, [len(level) for level in levels]), matched)
    if topk == 9:
        assert not torch.equal(ATSS(topk)(flat, gt_boxes), matched)  # one level only


def test_double_precision_and_half():
    levels = [squares(64, 8, [32.0]), squares(64, 16, [64.0])]
    gt_boxes = tensor([[8.0, 8, 40, 44], [20, 10, 60, 62]])
    matched = ATSS()(levels, gt_boxes)
    assert {0, 1} <= set(matched.tolist())
    assert torch.equal(ATSS()([level.double() for level in levels], gt_boxes.double()), matched)
    # These coordinates are whole numbers, which half precision has exactly; IoUs are computed in float32.
    assert torch.equal(ATSS()([level.half() for level in levels], gt_boxes.half()), matched)
    assert torch.equal(ATSS()(levels, gt_boxes.bfloat16()), matched)


def test_two_anchors_at_each_location():
    """The published setting: ties of distance everywhere. Each chosen anchor is one of the nearest."""
    levels = [squares(128, stride, [4.0 * stride, 4 * 2**0.5 * stride]) for stride in (8, 16, 32)]
    gt_boxes = tensor([[16.0, 16, 64, 64], [40, 40, 100, 110]])
    matched = ATSS()(levels, gt_boxes)
    assert torch.equal(matched, ATSS()(levels, gt_boxes))
    assert {0, 1} <= set(matched.tolist())
    anchors = torch.cat(levels)
    for number, box in enumerate(gt_boxes):
        centres = (anchors[matched == number, :2] + anchors[matched == number, 2:]) / 2
        assert ((centres > box[:2]) & (centres < box[2:])).all()


@pytest.mark.parametrize("levels", [[torch.rand(0, 4), squares(32, 8, [16.0])], [torch.rand(0, 4)]])
@pytest.mark.parametrize("num_objects", [0, 2])
def test_nothing_to_assign(levels, num_objects):
    matched = ATSS()(levels, tensor([[0.0, 0, 20, 20], [4, 4, 28, 28]])[:num_objects])
    assert matched.shape == (sum(map(len, levels)),)
    assert (matched >= 0).any() == (num_objects > 0 and len(matched) > 0)
    assert set(matched.tolist()) <= {-1, 0, 1}


def test_a_single_candidate_is_a_positive_where_it_is_inside():
    anchor = tensor([[0.0, 0, 10, 10]])
    assert ATSS()(anchor, tensor([[1.0, 1, 40, 40]])).tolist() == [0]
    assert ATSS(1)(anchor, tensor([[6.0, 6, 40, 40]])).tolist() == [-1]  # its centre, (5, 5), is outside


def test_the_centre_has_to_be_inside_by_more_than_a_hundredth_of_a_pixel():
    anchor = tensor([[0.0, 0, 10, 10]])
    for left, expected in [(4.995, -1), (4.985, 0)]:
        assert ATSS()(anchor, tensor([[left, 0.0, 30.0, 10.0]])).tolist() == [expected]
        assert ATSS()(anchor, tensor([[0.0, -20.0, 10.0, 10 - left]])).tolist() == [expected]


def test_an_anchor_wanted_twice_goes_to_the_larger_overlap():
    anchor = tensor([[0.0, 0, 10, 10]])
    small, large = [2.0, 2, 8, 8], [0.0, 0, 10, 11]
    assert ATSS()(anchor, tensor([small, large])).tolist() == [1]
    assert ATSS()(anchor, tensor([large, small])).tolist() == [0]
    assert ATSS()(anchor, tensor([small, large, large])).tolist() == [1]  # of identical boxes the first


def test_identical_anchors_reach_their_own_threshold():
    anchors = tensor([[0.0, 0, 10, 10]]).repeat(2, 1)
    assert ATSS()(anchors, tensor([[0.0, 0, 12, 12]])).tolist() == [0, 0]


def test_boxes_far_away_or_without_area_get_none():
    levels = [squares(32, 8, [16.0])]
    boxes = tensor([[900.0, 900, 950, 950], [8, 8, 8, 8], [20, 20, 10, 10], [float("nan")] * 4])
    assert ATSS()(levels, boxes).tolist() == [-1] * 16
    assert 4 in ATSS()(levels, torch.cat([boxes, tensor([[0.0, 0, 20, 20]])])).tolist()


def test_inputs_stay_as_they_are_and_get_no_gradient():
    anchors, boxes = squares(32, 8, [16.0]), tensor([[0.0, 0, 20, 20]], requires_grad=True)
    before = anchors.clone(), boxes.detach().clone()
    assert not ATSS()(anchors, boxes).requires_grad
    assert torch.equal(anchors, before[0])
    assert torch.equal(boxes, before[1])


def test_copies():
    assert pickle.loads(pickle.dumps(ATSS(4))) == copy.deepcopy(ATSS(4)) == ATSS(4) != ATSS()


BOXES = torch.rand(3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((BOXES.numpy(), BOXES), TypeError, r"anchors: .*ndarray"),
        (([BOXES, None], BOXES), TypeError, r"anchors\[1\]: .*NoneType"),
        (([], BOXES), ValueError, r"anchors: .*none"),
        ((BOXES.long(), BOXES), TypeError, r"anchors: .*int64"),
        ((BOXES[0], BOXES), ValueError, r"anchors: .*\[4\]"),
        ((BOXES, torch.rand(2, 5)), ValueError, r"gt_boxes: .*\[2, 5\]"),
        ((BOXES, [[0, 0, 1, 1]]), TypeError, r"gt_boxes: .*list"),
        ((BOXES.to("meta"), BOXES), ValueError, r"anchors: .*cpu.*meta"),
        ((BOXES, BOXES, [1, 1]), ValueError, r"num_anchors_per_level: .*3 anchors, got 2"),
        (([BOXES], BOXES, [3]), TypeError, r"num_anchors_per_level: expected None"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ATSS()(*arguments)


@pytest.mark.parametrize(("topk", "error"), [(0, ValueError), (True, TypeError), (9.0, TypeError)])
def test_wrong_topk(topk, error):
    with pytest.raises(error, match="topk: expected an int >= 1"):
        ATSS(topk)
