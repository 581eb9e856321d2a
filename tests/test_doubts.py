"""Warnings of what is allowed and usually a mistake: in debug mode always, on the CPU in a module's first forward."""

import warnings

import pytest
import torch
from dialect import COMPILED_FOR, imprecision, random_case
from torch._subclasses.fake_tensor import FakeTensorMode

from alrp_triton import ALRPLoss, APLoss, NDCGLoss, RankSortLoss, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.boxes import box_error
from alrp_triton.framework import RankingLoss, ranking_loss

CASE = random_case(1200, 4)
BOXES = torch.tensor([0.0, 0.0, 2.0, 1.0]).repeat(4, 1)
INVERTED = BOXES.clone()
INVERTED[1], INVERTED[2] = torch.tensor([2.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 3.0, 1.0, 2.0])
FUNCTIONS = {
    "alrp": lambda x, y, p: alrp_loss(x, y, torch.full((p,), 0.5)),
    "ap": lambda x, y, p: ap_loss(x, y, num_positives=p),
    "ndcg": lambda x, y, p: ndcg_loss(x, y, num_positives=p),
    "rank_sort": lambda x, y, p: rank_sort_loss(x, y, torch.full((p,), 0.5)),
    "own": lambda x, y, p: ranking_loss(x, y, imprecision, num_positives=p),
}
MODULE_CALLS = {
    "ALRPLoss": (ALRPLoss, lambda criterion, x, y, p: criterion(x, y, BOXES[:p], BOXES[:p])),
    "APLoss": (APLoss, lambda criterion, x, y, p: criterion(x, y, p)),
    "NDCGLoss": (NDCGLoss, lambda criterion, x, y, p: criterion(x, y, p)),
    "RankSortLoss": (RankSortLoss, lambda criterion, x, y, p: criterion(x, y, BOXES[:p], BOXES[:p])),
    "RankingLoss": (lambda: RankingLoss(imprecision), lambda criterion, x, y, p: criterion(x, y, p)),
}
by_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
by_call = pytest.mark.parametrize(("make", "call"), MODULE_CALLS.values(), ids=MODULE_CALLS)
on_cpu = pytest.mark.skipif(COMPILED_FOR, reason="tensors count as a GPU's, for which nothing waits")

PROBABLE = r"^logits: expected scores before the sigmoid, got 1200 from 0\.\d+ to 0\.\d+"
IGNORED = r"^labels: expected some that are not ignored, got ignore_index, -1, everywhere"
BOXED = r"^target_boxes: expected \(x1, y1, x2, y2\) .* got 2 of 4 otherwise"
BACKGROUND = (
    r"^labels: expected 4, the number of classes in logits, for the background, got ignore_index, -1, in 98\.7%"
)
OF_ROWS = torch.full((300,), -1)
OF_ROWS[::75] = torch.arange(4)
ARGUMENTS = {
    PROBABLE: (CASE.logits.sigmoid(), CASE.labels, 4),
    IGNORED: (CASE.logits, torch.full_like(CASE.labels, -1), 0),
    BACKGROUND: (CASE.logits.view(300, 4), OF_ROWS, 4),
}
by_doubt = pytest.mark.parametrize(
    ("text", "arguments"), ARGUMENTS.items(), ids=["probabilities", "ignored", "background"]
)


def warned(call, *arguments):
    """The texts of the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    return [str(one.message) for one in caught]


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("ALRP_TRITON_DEBUG", "1")


@by_doubt
@by_function
def test_functions_warn_in_debug_mode(function, text, arguments, debug, monkeypatch):
    for _ in range(2):
        with pytest.warns(UserWarning, match=text):
            function(*arguments)
    monkeypatch.delenv("ALRP_TRITON_DEBUG")
    assert not warned(function, *arguments)


@by_function
def test_what_is_no_mistake(function, debug):
    few = slice(0, 900)
    scores = CASE.logits.sigmoid()
    number = int((CASE.labels[few] == 1).sum())
    assert not warned(function, CASE.logits, CASE.labels, 4)
    assert not warned(function, scores[few], CASE.labels[few], number)
    assert not warned(function, scores - 1e-3, CASE.labels, 4)
    assert not warned(function, torch.zeros(1200), CASE.labels, 4)
    assert not warned(function, scores.masked_fill(CASE.labels == 1, torch.nan), CASE.labels, 4)
    assert not warned(function, torch.zeros(0), CASE.labels[:0], 0)
    assert not warned(function, CASE.logits, torch.zeros(1200, dtype=torch.uint8), 0)


@by_function
def test_levels_are_looked_at_together(function, debug):
    scores, labels = CASE.logits.sigmoid(), list(CASE.labels.split(500))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert len(warned(function, list(scores.to(dtype).split(500)), labels, 4)) == 1
    assert not warned(function, [*scores.split(500)[:2], CASE.logits[1000:]], labels, 4)


@on_cpu
@by_doubt
@by_call
def test_modules_warn_in_their_first_forward(make, call, text, arguments):
    criterion = make()
    with pytest.warns(UserWarning, match=text):
        call(criterion, *arguments)
    assert not warned(call, criterion, *arguments)
    criterion = make()
    call(criterion, CASE.logits, CASE.labels, 4)
    assert not warned(call, criterion, *arguments)
    assert not criterion.state_dict() or isinstance(criterion, ALRPLoss)


@by_doubt
@by_call
def test_modules_warn_in_debug_mode_once_a_call(make, call, text, arguments, debug):
    criterion = make()
    for _ in range(2):
        assert len(warned(call, criterion, *arguments)) == 1


@pytest.mark.parametrize("make", [ALRPLoss, RankSortLoss])
def test_constants_are_seen_without_values(make):
    """So on a GPU as on the CPU, once."""
    criterion, logits = make(), CASE.logits.clone().requires_grad_()
    for target, said in ((BOXES, "detached"), (BOXES.clone().requires_grad_(), "swapped")):
        (text,) = warned(make(), logits, CASE.labels, BOXES, target)
        assert text.startswith("pred_boxes: expected ")
        assert said in text
    assert len(warned(criterion, CASE.logits, CASE.labels, BOXES.clone().requires_grad_(), BOXES)) == 1
    assert not warned(criterion, CASE.logits, CASE.labels, BOXES.clone().requires_grad_(), BOXES)


@pytest.mark.parametrize("make", [ALRPLoss, RankSortLoss])
def test_inverted_targets(make, debug, monkeypatch):
    def call(criterion):
        return criterion(CASE.logits, CASE.labels, BOXES, INVERTED)

    for _ in range(2):
        with pytest.warns(UserWarning, match=BOXED):
            call(make())
    # Predictions may be anything.
    assert not warned(make(), CASE.logits, CASE.labels, INVERTED, BOXES)
    assert not warned(make(), CASE.logits, CASE.labels, BOXES, BOXES[:, [0, 1, 0, 1]])
    monkeypatch.delenv("ALRP_TRITON_DEBUG")
    if not COMPILED_FOR:
        criterion = make()
        with pytest.warns(UserWarning, match=BOXED):
            call(criterion)
        assert not warned(call, criterion)


def test_errors_of_boxes_warn_in_debug_mode(debug):
    for kind in ("giou", lambda pred, target: (pred - target).abs().sum(1)):
        with pytest.warns(UserWarning, match=BOXED):
            box_error(BOXES, INVERTED, kind, 0.5)
    volumes = torch.tensor([[0.0, 0, 2, 1, 1, 1], [0.0, 0, 0, 1, 1, 1]])
    with pytest.warns(UserWarning, match=r"^target_boxes: expected \(x1, y1, z1, x2, y2, z2\) .* got 1 of 2 otherwise"):
        box_error(volumes, volumes, "giou", 0.5)
    assert not warned(box_error, volumes[1:], volumes[1:], "giou", 0.5)


def test_ious_above_1_are_an_error_in_debug_mode(debug, monkeypatch):
    percentages = torch.tensor([70.0, 50.0, 0.5, 1.0])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^ious: expected IoUs, at most 1, got 70$"):
            rank_sort_loss(CASE.logits, CASE.labels, percentages)
    # One that is rounded in bfloat16.
    rank_sort_loss(CASE.logits, CASE.labels, torch.tensor([1.0, 1.0078125, 0.0, torch.nan]))
    monkeypatch.delenv("ALRP_TRITON_DEBUG")
    rank_sort_loss(CASE.logits, CASE.labels, percentages)


@on_cpu
def test_fake_tensors_have_no_values():
    with FakeTensorMode():
        boxes = torch.rand(3, 4)
        loss = ALRPLoss(backend="torch")(torch.rand(2000), torch.ones(2000, dtype=torch.int64), boxes, boxes)
    assert loss.total.shape == ()


@on_cpu
@by_call
def test_a_compiled_module_looks_at_nothing(make, call, debug):
    torch._dynamo.reset()
    criterion, arguments = make(), ARGUMENTS[PROBABLE]
    compiled = torch.compile(criterion, backend="eager", fullgraph=True)
    assert not warned(call, compiled, *arguments)
    with pytest.warns(UserWarning, match=PROBABLE):
        call(criterion, *arguments)
