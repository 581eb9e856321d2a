"""RankSortLoss: boxes, weighted by scores, and as much as the rest."""

import pytest
import torch
from dialect import KERNELS, NAN, assert_close, assert_same_bits, by_backend

from alrp_triton import RankSortLoss, RankSortLossOutput, boxes, rank_sort_loss, reference


def boxes_of(num_pos, overlap=True, seed=0):
    """Predicted and target boxes; the former of random offset, or apart altogether."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num_pos, 2, generator=generator) * 50
    target = torch.cat([corner, corner + 10], dim=1)
    return target + torch.rand(num_pos, 4, generator=generator) * 3 + (0 if overlap else 20), target


def problem(classes=True, dtype=torch.float32):
    """Logits ``[2, 30, 4]``, labels by classes or by logits, boxes, and the highest logit of each positive's row."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 30, 4, generator=generator).to(dtype)
    by_row = torch.randint(-1, 10, (2, 30), generator=generator).clamp(max=4)
    labels = torch.nn.functional.one_hot(by_row.clamp(min=0), 5)[..., :4].masked_fill(by_row[..., None] == -1, -1)
    if not classes:
        # Two positives in one row, and ignored logits beside a positive.
        row = int(((by_row >= 0) & (by_row < 4)).flatten().nonzero()[0])
        labels.view(-1, 4)[row] = torch.tensor([1, 1, -1, 0])
    rows = (labels == 1).nonzero()[:, :2].unbind(1)
    pred, target = boxes_of(len(rows[0]))
    return logits, by_row if classes else labels, pred, target, logits[rows].amax(-1).float()


def direct(pred, target, highest, kind="giou"):
    """Localisation loss before it is balanced: mean error by the sigmoid of the highest score of the row."""
    weights = highest.sigmoid()
    return (boxes.box_error(pred, target, kind, 0.0) * weights).sum() / weights.sum()


def run(criterion, logits, labels, pred, target, **arguments):
    """Outputs; gradients of the classification part by logits, of the rest by predicted boxes."""
    x, b = logits.clone().requires_grad_(), pred.clone().requires_grad_()
    output = criterion(x, labels, b, target, **arguments)
    (by_logits,) = torch.autograd.grad(output.cls, x, retain_graph=True)
    (by_boxes,) = torch.autograd.grad(output.loc, b, retain_graph=True)
    return output, by_logits, by_boxes, (x, b)


@by_backend
@pytest.mark.parametrize("box_error", ["iou"] if KERNELS else ["iou", "giou", "diou", "ciou"])
@pytest.mark.parametrize("classes", [True, False])
def test_boxes_count_by_their_scores_and_as_much_as_the_rest(classes, box_error, backend):
    logits, labels, pred, target, highest = problem(classes)
    found, by_logits, by_boxes, (x, b) = run(
        RankSortLoss(0.25, box_error, backend=backend), logits, labels, pred, target
    )
    expected = rank_sort_loss(x, labels, boxes.iou(pred, target), delta=0.25, backend=backend)
    assert_same_bits("ranking", found.ranking, expected.ranking)
    assert_same_bits("sorting", found.sorting, expected.sorting)
    assert_same_bits("cls", found.cls, found.ranking + found.sorting)
    assert_same_bits("by logits", by_logits, torch.autograd.grad(sum(expected), x)[0])
    # In value the boxes are half of the loss; their gradient is scaled alike.
    assert_close("loc", found.loc, found.cls, 1e-6)
    loc = direct(b, target, highest, box_error)
    assert loc > 0.1
    (gradient,) = torch.autograd.grad(loc, b)
    assert_close("by boxes", by_boxes, gradient * (found.cls / loc).detach(), 1e-6)
    unbalanced = run(RankSortLoss(0.25, box_error, False, backend=backend), logits, labels, pred, target)
    assert_close("loc", unbalanced[0].loc, loc, 1e-6)
    assert_close("by boxes", unbalanced[2], gradient, 1e-6)


@by_backend
def test_neither_part_reaches_what_the_other_trains(backend):
    logits, labels, pred, target, _ = problem()
    output, by_logits, by_boxes, (x, b) = run(RankSortLoss(backend=backend), logits, labels, pred, target)
    for loss, leaf in ((output.loc, x), (output.cls, b)):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True)
        assert gradient is None or not gradient.any()
    (output.cls + output.loc).backward()
    assert_same_bits("by logits", x.grad, by_logits)
    assert_same_bits("by boxes", b.grad, by_boxes)


@by_backend
def test_levels_and_flat_logits(backend):
    """A row is the last axis; of logits [M], each is a row of its own."""
    logits, labels, pred, target, highest = problem()
    whole = run(RankSortLoss(backend=backend), logits, labels, pred, target)
    levels = [logits[0], logits[:0], logits[1].view(5, 6, 4)]
    output = RankSortLoss(backend=backend)(levels, [labels[0], labels[:0], labels[1].view(5, 6)], pred, target)
    for one, other in zip(output, whole[0]):
        assert_close("levels", one, other, 1e-6)
    unbalanced = RankSortLoss(self_balance=False, backend=backend)
    per_logit = problem(False)[1]
    is_pos = (torch.arange(4) == labels[..., None]).flatten()
    flat = is_pos.long().masked_fill((labels == -1)[..., None].expand(logits.shape).flatten(), -1)
    assert per_logit.shape == logits.shape
    loc = unbalanced(logits.flatten(), flat, pred, target).loc
    assert_close("flat", loc, direct(pred, target, logits.flatten()[is_pos]), 1e-6)
    assert_close("rows", unbalanced(logits, labels, pred, target).loc, direct(pred, target, highest), 1e-6)
    assert (loc - direct(pred, target, highest)).abs() > 1e-3


@by_backend
def test_groups_are_as_the_mean_of_separate_calls(backend):
    """But for the ratio that balances, which is common. Groups are neither sorted nor as large as one another."""
    logits, labels, pred, target, _ = problem()
    groups = (
        torch.tensor([7, -3]).repeat(30)[torch.randperm(60, generator=torch.Generator().manual_seed(0))].view(2, 30)
    )
    groups[0, :7] = 5
    at = torch.arange(60).view(2, 30)[(labels >= 0) & (labels < 4)]
    mine = groups.flatten()[at]
    assert 0 < (mine == 7).sum() != (mine == -3).sum() > 0
    for balanced in (False, True):
        criterion = RankSortLoss(self_balance=balanced, backend=backend)
        inputs = [each.detach().clone().requires_grad_() for each in (logits, pred)]
        whole = criterion(inputs[0], labels, inputs[1], target, groups)
        parts = [
            criterion(inputs[0], labels.masked_fill(groups != one, -1), inputs[1][mine == one], target[mine == one])
            for one in mine.unique()
        ]
        for name, got, *each in zip(("ranking", "sorting", "loc"), whole, *parts):
            assert_close(name, got, sum(each) / len(parts), 1e-6)
        compared = [whole.cls] if balanced else [whole.cls, whole.loc]
        for i, got in enumerate(compared):
            mean = sum((part.cls, part.loc)[i] for part in parts) / len(parts)
            for one, other in zip(*(torch.autograd.grad(x, inputs[i], retain_graph=True) for x in (got, mean))):
                assert_close("gradient", one, other, 1e-6)
    expected = rank_sort_loss(logits, labels, boxes.iou(pred, target), groups=groups, backend=backend)
    assert_same_bits("ranking", whole.ranking, expected.ranking)
    assert_same_bits("sorting", whole.sorting, expected.sorting)


@by_backend
def test_boxes_that_overlap_nothing_remain_positives(backend):
    """Whatever their IoU: all negatives are to be below them."""
    logits, labels, _, _, highest = problem()
    pred, target = boxes_of(len(highest), overlap=False)
    assert not boxes.iou(pred, target).any()
    output, by_logits, by_boxes, _ = run(RankSortLoss(backend=backend), logits, labels, pred, target)
    flat = labels[..., None].expand(logits.shape)
    is_pos = (torch.arange(4) == flat).flatten()
    kinds = is_pos.long().masked_fill((flat == -1).flatten(), -1)
    expected = reference.rank_sort(logits.flatten(), kinds, torch.zeros(len(highest)))
    assert_close("ranking", output.ranking, expected.ranking, 1e-6)
    assert output.sorting == 0
    assert_close("by logits", by_logits.flatten(), expected.grad_ranking, 1e-6)
    assert (by_logits.flatten()[is_pos] < 0).any()
    assert by_boxes.abs().sum(1).all()


@by_backend
@pytest.mark.parametrize("without", ["errors", "weights"])
def test_nothing_to_balance(without, backend):
    """No division by 0, in value and in gradient; not NaN as published, where all weights underflow."""
    logits, labels, pred, target, _ = problem()
    pred, logits, kind = (target, logits, "iou") if without == "errors" else (pred, logits - 500, "giou")
    output, by_logits, by_boxes, _ = run(RankSortLoss(box_error=kind, backend=backend), logits, labels, pred, target)
    assert output.loc == 0
    assert output.ranking > 0.1
    assert by_logits.any()
    assert by_logits.isfinite().all()
    assert by_boxes.isfinite().all()
    assert without == "errors" or not by_boxes.any()


@by_backend
@pytest.mark.parametrize("self_balance", [True, False])
def test_no_positives(self_balance, backend):
    criterion = RankSortLoss(self_balance=self_balance, backend=backend)
    # Boxes of none may come without a graph.
    for labels, graph in ((torch.tensor([4, 4, -1]), True), (torch.full((3,), -1), True), (torch.full((3,), 4), False)):
        x, b = torch.randn(3, 4).requires_grad_(), torch.empty(0, 4, requires_grad=graph)
        output = criterion(x, labels, b, torch.empty(0, 4))
        assert output == (0, 0, 0)
        (output.cls + output.loc).backward()
        assert not x.grad.any()
        assert not graph or b.grad.shape == (0, 4)


@by_backend
@pytest.mark.parametrize("where", ["a positive", "a negative", "a box", "a target"])
def test_nan_is_not_hidden(where, backend):
    logits, labels, pred, target, _ = problem()
    if where in ("a box", "a target"):
        (pred if where == "a box" else target)[2, 1] = NAN
    else:
        row = ((labels.flatten() == 4) if where == "a negative" else (labels.flatten() < 4)).nonzero()[-1]
        logits.view(-1, 4)[row, labels.flatten()[row].clamp(0, 3)] = NAN
    output, by_logits, by_boxes, _ = run(RankSortLoss(backend=backend), logits, labels, pred, target)
    for value in output:
        assert value.isnan()
    assert by_logits[labels != -1].isnan().all()
    assert by_boxes.isnan().any()


@by_backend
def test_ignored_logits_have_no_effect(backend):
    """Not even in the row of a positive."""
    logits, labels, pred, target, _ = problem(classes=False)
    expected = run(RankSortLoss(backend=backend), logits.masked_fill(labels == -1, -9.0), labels, pred, target)
    found = run(RankSortLoss(backend=backend), logits.masked_fill(labels == -1, NAN), labels, pred, target)
    assert ((labels == -1).any(-1) & (labels == 1).any(-1)).any()
    for one, other in zip((*found[0], *found[1:3]), (*expected[0], *expected[1:3])):
        assert_same_bits("result", one, other)


@by_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, backend):
    """Scores and boxes each in their own; losses in float32, or float64 for such scores."""
    logits, labels, pred, target, highest = problem(dtype=dtype)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for box_dtype in (torch.float32, dtype):
        b = pred.to(box_dtype)
        output, by_logits, by_boxes, _ = run(RankSortLoss(backend=backend), logits, labels, b, target.to(box_dtype))
        assert [value.dtype for value in output] == [wanted] * 3
        assert by_logits.dtype == dtype
        assert by_boxes.dtype == box_dtype
        assert_close("loc", output.loc, output.cls, 1e-6)
        unbalanced = RankSortLoss(self_balance=False, backend=backend)(logits, labels, b, target.to(box_dtype))
        assert_close("loc", unbalanced.loc, direct(b, target.to(box_dtype), highest), 2e-6)


def test_errors_of_ones_own_of_any_scale():
    logits, labels, pred, target, _ = problem()

    def distance(pred, target):
        return (pred - target).abs().mean(1)

    one, other = (
        run(RankSortLoss(box_error=lambda p, t, k=k: k * distance(p, t)), logits, labels, pred, target)
        for k in (1.0, 1000.0)
    )
    assert_close("loc", other[0].loc, one[0].loc, 1e-6)
    assert_close("by boxes", other[2], one[2], 1e-6)
    assert_close("ranking", one[0].ranking, RankSortLoss()(logits, labels, pred, target).ranking, 1e-7)


def test_there_is_no_state():
    logits, labels, pred, target, _ = problem()
    criterion = RankSortLoss()
    first = criterion(logits, labels, pred, target)
    criterion(logits * 3, labels, pred + 5, target)
    for one, other in zip(criterion(logits, labels, pred, target), first):
        assert_same_bits("result", one, other)
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    assert isinstance(first, RankSortLossOutput)
    assert RankSortLossOutput._fields == ("ranking", "sorting", "loc")


def test_module_says_what_it_was_made_of():
    assert repr(RankSortLoss()) == (
        "RankSortLoss(delta=0.5, box_error='giou', self_balance=True, ignore_index=-1, backend='auto')"
    )
    assert repr(RankSortLoss(1.0, "iou", False, ignore_index=255, backend="torch")) == (
        "RankSortLoss(delta=1.0, box_error='iou', self_balance=False, ignore_index=255, backend='torch')"
    )


def test_wrong_arguments_of_the_module(looking):
    for wrong in (None, 1, 50.0, "yes"):
        with pytest.raises(TypeError, match=r"^self_balance: expected a bool"):
            RankSortLoss(self_balance=wrong)
    with pytest.raises(ValueError, match="expected one of"):
        RankSortLoss(box_error="liou")
    with pytest.raises(TypeError, match="expected a string or a callable"):
        RankSortLoss(box_error=0.5)
    logits, labels, pred, target, _ = problem()
    for wrong in ({"delta": -1.0}, {"delta": "1"}, {"ignore_index": 0.5}, {"backend": "cuda"}):
        with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))}: expected"):
            RankSortLoss(**wrong)(logits, labels, pred, target)
    with pytest.raises(ValueError, match=r"^pred_boxes: expected one for each positive"):
        RankSortLoss()(logits, labels, pred[1:], target[1:])
    with pytest.raises(ValueError, match=r"^groups: expected"):
        RankSortLoss()(logits, labels, pred, target, torch.zeros(3, dtype=torch.int64))
    with pytest.raises((TypeError, ValueError), match="boxes"):
        RankSortLoss()(logits, labels, pred[:, :3], target[:, :3])
