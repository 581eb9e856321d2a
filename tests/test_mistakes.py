"""Mistakes of people who are new: each message says what came, what was expected and what to write instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dialect import COMPILED_FOR
from dialect.mistakes import Mistake, says
from torch import nn

from alrp_triton import (
    ALRPLoss,
    APLoss,
    RankSortLoss,
    SelfBalance,
    alrp_loss,
    ap_loss,
    at_positives,
    compat,
    rank_sort_loss,
)
from alrp_triton.engine import passes
from alrp_triton.framework import ranking_loss

pytestmark = pytest.mark.skipif(COMPILED_FOR, reason="tensors count as a GPU's, of which nothing is read")

B, A, C = 2, 150, 4
LABELS = torch.full((B, A), C)
LABELS[0, 3], LABELS[0, 9], LABELS[1, 7] = 0, 3, 2
IS_POSITIVE = LABELS < C
ONE_HOT = nn.functional.one_hot(LABELS, C + 1)
LOGITS = torch.randn(B, A, C, generator=torch.Generator().manual_seed(0), requires_grad=True)
PRED = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3, requires_grad=True)
TARGET = torch.tensor([[50.0, 60.0, 70.0, 90.0]] * 3)
XYWH = torch.tensor([[50.0, 60.0, 20.0, 30.0]] * 3)
COUNTED = "expected one for each positive label, 3, got"
BACKGROUND = "for the background, got"


def alrp(logits: Any = LOGITS, labels: Any = LABELS, pred: Any = PRED, target: Any = TARGET) -> Any:
    return ALRPLoss()(logits, labels, pred, target)


def debug(call: Callable[[], Any]) -> Callable[[], Any]:
    """What every call checks with ``ALRP_TRITON_DEBUG=1``; without it, modules in their first."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ALRP_TRITON_DEBUG", "1")
            call()

    return run


def without_numba() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_NUMBA_INSTALLED", False)
        ap_loss(LOGITS, LABELS, backend="numba")


def twice() -> None:
    (gradient,) = torch.autograd.grad(ap_loss(LOGITS, LABELS), LOGITS, create_graph=True)
    gradient.sum().backward()


MISTAKES: dict[str, Mistake] = {
    # Boxes and what is for each positive.
    "boxes of all anchors": (
        lambda: alrp(pred=torch.rand(B, A, 4), target=torch.rand(B, A, 4)),
        ValueError,
        ("pred_boxes: expected shape [P, 4]", f"got [{B}, {A}, 4]", "alrp_triton.at_positives picks"),
    ),
    "boxes of all anchors, in rows": (
        lambda: alrp(pred=torch.rand(B * A, 4), target=torch.rand(B * A, 4)),
        ValueError,
        (f"pred_boxes: {COUNTED} 300", "at_positives"),
    ),
    "boxes of objects": (
        lambda: alrp(pred=PRED[:2], target=TARGET[:2]),
        ValueError,
        (f"pred_boxes: {COUNTED} 2", "objects[matched]"),
    ),
    "targets of objects": (
        lambda: alrp(target=TARGET[:2]),
        ValueError,
        ("target_boxes: expected the shape of pred_boxes, [3, 4], got [2, 4]", "objects[matched]"),
    ),
    "boxes as xywh": (
        lambda: alrp(target=XYWH),
        UserWarning,
        ("target_boxes: expected (x1, y1, x2, y2)", "got 3 of 3 otherwise", "(x, y, width, height)?"),
    ),
    "boxes of each image": (
        lambda: alrp(pred=[PRED]),
        TypeError,
        ("pred_boxes: expected a tensor", "list", "torch.cat"),
    ),
    "boxes in NumPy": (
        lambda: alrp(pred=PRED.detach().numpy()),
        TypeError,
        ("pred_boxes: expected a tensor", "got ndarray", "torch.as_tensor"),
    ),
    "boxes of integers": (lambda: alrp(target=TARGET.long()), TypeError, ("target_boxes:", "torch.int64", ".float()")),
    "boxes for a loss of scores": (
        lambda: APLoss()(LOGITS, LABELS, PRED, TARGET),
        TypeError,
        ("num_positives: expected an int or None, got Tensor", "ALRPLoss and RankSortLoss take boxes"),
    ),
    "errors as a list": (
        lambda: alrp_loss(LOGITS, LABELS, [0.1]),
        TypeError,
        ("loc_errors: expected a tensor, got list",),
    ),
    "errors as a number": (
        lambda: alrp_loss(LOGITS, LABELS, 0.3),
        TypeError,
        ("loc_errors: expected a tensor, got float", "torch.as_tensor"),
    ),
    "errors of all anchors": (
        lambda: alrp_loss(LOGITS, LABELS, torch.rand(B * A)),
        ValueError,
        (f"loc_errors: {COUNTED} 300", "at_positives"),
    ),
    "the mean error": (
        lambda: alrp_loss(LOGITS, LABELS, torch.rand(())),
        ValueError,
        ("loc_errors: expected shape [P]", "got []", "reduction='none'"),
    ),
    "GIoUs as errors": (
        debug(lambda: alrp_loss(LOGITS, LABELS, torch.tensor([0.5, -0.2, 0.1]))),
        UserWarning,
        ("loc_errors: expected errors, which are >= 0, got 1 below", "(1 - g) / 2"),
    ),
    "IoUs of all anchors": (
        lambda: rank_sort_loss(LOGITS, LABELS, torch.rand(B, A)),
        ValueError,
        ("ious: expected shape [P]", f"got [{B}, {A}]", "at_positives"),
    ),
    "IoUs in percent": (
        debug(lambda: rank_sort_loss(LOGITS, LABELS, torch.tensor([70.0, 50.0, 60.0]))),
        ValueError,
        ("ious: expected IoUs, at most 1, got 70",),
    ),
    "values in another order of axes": (
        lambda: at_positives(LOGITS, LABELS, torch.rand(B, 4, A)),
        ValueError,
        (f"values: expected the shape of the labels, [{B}, {A}]", f"got [{B}, 4, {A}]"),
    ),
    # Logits.
    "probabilities": (
        lambda: alrp(LOGITS.sigmoid()),
        UserWarning,
        ("logits: expected scores before the sigmoid, got 1200 from", "as probabilities"),
    ),
    "labels before logits": (
        lambda: ap_loss(LABELS, LOGITS),
        TypeError,
        ("logits: expected float16", "got torch.int64", "logits come first"),
    ),
    "classes in the second axis": (
        lambda: ap_loss(LOGITS.mT, LABELS),
        ValueError,
        (f"labels: expected shape [{B}, {C}, {A}]", f"got [{B}, {A}]", "logits.movedim(1, -1)"),
    ),
    "logits in NumPy": (
        lambda: ap_loss(LOGITS.detach().numpy(), LABELS),
        TypeError,
        ("logits: expected a tensor", "got ndarray", "torch.as_tensor"),
    ),
    "no levels": (
        lambda: ap_loss((), ()),
        ValueError,
        ("logits: expected at least one tensor, got an empty sequence",),
    ),
    "levels in a dict": (
        lambda: ap_loss({"p3": LOGITS}, LABELS),
        TypeError,
        ("logits: expected", "sequence", "got dict"),
    ),
    "labels of all levels together": (
        lambda: ap_loss(LOGITS.split(50, 1), LABELS),
        ValueError,
        ("labels: expected one tensor for each of the 3 logits, got 1",),
    ),
    "levels of other classes": (
        lambda: APLoss()([LOGITS, LOGITS[..., :3]], [LABELS, LABELS.clamp(max=3)]),
        UserWarning,
        ("logits: expected as many classes", "got 3, 4", "C is the background"),
    ),
    "detached logits": (
        lambda: alrp(LOGITS.detach()),
        UserWarning,
        ("logits: expected to require a gradient, as pred_boxes do, got constants", "detached?"),
    ),
    "detached boxes": (
        lambda: alrp(pred=PRED.detach()),
        UserWarning,
        ("pred_boxes: expected to require a gradient, as logits do, got constants", "detached?"),
    ),
    "boxes in the wrong order": (
        lambda: alrp(pred=TARGET, target=PRED),
        UserWarning,
        ("pred_boxes: expected the model's boxes, got constants", "target_boxes", "swapped?"),
    ),
    # Labels.
    "one-hot labels with the background": (
        lambda: ap_loss(LOGITS, ONE_HOT),
        ValueError,
        (f"labels: expected shape [{B}, {A}, {C}]", f"got [{B}, {A}, {C + 1}]", "no column for the background"),
    ),
    "the same as floats": (
        lambda: ap_loss(LOGITS, ONE_HOT.float()),
        TypeError,
        ("labels: expected integers", "got torch.float32", "no column for the background"),
    ),
    "class indices as floats": (
        lambda: ap_loss(LOGITS, LABELS.float()),
        TypeError,
        ("labels: expected integers", "got torch.float32", "labels.long()"),
    ),
    "soft labels": (
        lambda: ap_loss(LOGITS, ONE_HOT[..., :C] * 0.7),
        ValueError,
        ("labels: expected 1 (positive), 0 (negative) or ignore_index, -1, got 3 others", "ious of rank_sort_loss"),
    ),
    "labels of an axis too many": (
        lambda: ap_loss(LOGITS, LABELS[..., None]),
        ValueError,
        ("labels: expected shape", f"got [{B}, {A}, 1]", f"labels.reshape({B}, {A})"),
    ),
    "flat labels": (
        lambda: ap_loss(LOGITS, LABELS.flatten()),
        ValueError,
        ("labels: expected shape", f"got [{B * A}]", f"labels.reshape({B}, {A})"),
    ),
    "background 0": (
        lambda: alrp(labels=(LABELS + 1) % (C + 1)),
        ValueError,
        ("299 of 300 labels are positive: the background is C, 4", "pred_boxes: expected"),
    ),
    "background 0, without boxes": (
        lambda: APLoss()(LOGITS, (LABELS + 1) % (C + 1)),
        UserWarning,
        (f"labels: expected 4, the number of classes in logits, {BACKGROUND} class 0 in 99.0% of the rows",),
    ),
    "one score more than classes": (
        lambda: APLoss()(torch.randn(B, A, C + 1), LABELS),
        UserWarning,
        (f"labels: expected 5, the number of classes in logits, {BACKGROUND} class 4 in 99.0%",),
    ),
    "background -1": (
        lambda: alrp(labels=LABELS.masked_fill(~IS_POSITIVE, -1)),
        UserWarning,
        (f"labels: expected 4, the number of classes in logits, {BACKGROUND} ignore_index, -1, in 99.0%",),
    ),
    "classes from 1": (
        lambda: ap_loss(LOGITS, LABELS + 1),
        ValueError,
        ("labels: expected 0 to 3 (a class), 4 (background) or ignore_index, -1, got 5", "counted from 1?"),
    ),
    "objects 1 and background 0, with one class": (
        lambda: alrp(LOGITS[..., :1], IS_POSITIVE.long()),
        ValueError,
        ("297 of 300 labels are positive: the background is C, 1, and classes are below it",),
    ),
    "one class, called 1": (
        lambda: alrp(LOGITS[..., :1], torch.ones_like(LABELS)),
        ValueError,
        ("label, 0, got 3", "no label is positive: class indices begin with 0, and C is the background"),
    ),
    "ignored by 255": (
        lambda: ap_loss(LOGITS, LABELS.masked_fill(LABELS == 3, 255)),
        ValueError,
        ("labels: expected 0 to 3 (a class), 4 (background)", "got 255", "ignore_index=255"),
    ),
    "negatives -1": (
        lambda: APLoss()(torch.randn(1000), torch.arange(1000) % 2 * 2 - 1),
        UserWarning,
        ("labels: expected 0 for negatives, got none",),
    ),
    "all ignored": (
        lambda: APLoss()(LOGITS, torch.full_like(LABELS, -1)),
        UserWarning,
        ("labels: expected some that are not ignored, got ignore_index, -1, everywhere",),
    ),
    "labels on another device": (
        lambda: ap_loss(LOGITS, LABELS.to("meta")),
        ValueError,
        ("labels: expected device cpu, as the first logits, got meta",),
    ),
    # Settings.
    "negative delta": (
        lambda: ap_loss(LOGITS, LABELS, delta=-1.0),
        ValueError,
        ("delta: expected 0 or a number", "-1.0"),
    ),
    "delta as a tensor": (
        lambda: ap_loss(LOGITS, LABELS, delta=torch.tensor(1.0)),
        TypeError,
        ("delta: expected a number, got Tensor",),
    ),
    "unknown backend": (
        lambda: ap_loss(LOGITS, LABELS, backend="cuda"),
        ValueError,
        ("backend: expected one of ('auto', 'torch'", "got 'cuda'"),
    ),
    "triton on the CPU": (
        lambda: ap_loss(LOGITS, LABELS, backend="triton"),
        ValueError,
        ("backend: expected one that runs on device 'cpu', got 'triton'",),
    ),
    "numba that is not there": (without_numba, ValueError, ("got 'numba'", "pip install 'alrp-triton[numba]'")),
    "unknown groups": (
        lambda: ap_loss(LOGITS, LABELS, groups="images"),
        ValueError,
        ("groups: expected integers, one of ('image', 'class', 'image_class'), or None, got 'images'",),
    ),
    "groups of images": (
        lambda: ap_loss(LOGITS, LABELS, groups=torch.arange(B)),
        ValueError,
        (f"groups: expected shape [{B}, {A}, {C}]", "got [2]"),
    ),
    "percent as tau": (lambda: ALRPLoss(tau=50), ValueError, ("tau: expected a number in [0, 1), got 50",)),
    "unknown box error": (
        lambda: ALRPLoss(box_error="GIoU"),
        ValueError,
        ("box_error: expected one of 'iou', 'giou'", "got 'GIoU'"),
    ),
    "self-balancing as a switch": (
        lambda: ALRPLoss(self_balance=True),
        TypeError,
        ("self_balance: expected a SelfBalance, a number or None, got bool",),
    ),
    "a process group of nobody": (
        lambda: ap_loss(LOGITS, LABELS, process_group=True),
        ValueError,
        ("process_group: expected torch.distributed to be initialised, by init_process_group",),
    ),
    # What is done with the result.
    "backward of the output": (lambda: alrp().backward(), AttributeError, ("ALRPLossOutput", ".total.backward()")),
    "item of the output": (lambda: alrp().item(), AttributeError, ("ALRPLossOutput", ".total.item()")),
    "output times a weight": (lambda: 2 * alrp(), TypeError, ("expected a tensor", "got ALRPLossOutput", ".total")),
    "output plus a loss": (
        lambda: RankSortLoss()(LOGITS, LABELS, PRED, TARGET) + torch.ones(()),
        TypeError,
        ("expected a tensor", "got RankSortLossOutput", ".total"),
    ),
    "differentiated twice": (twice, RuntimeError, ("cannot be differentiated twice",)),
    "step_epoch with a period": (
        lambda: SelfBalance(period=9).step_epoch(),
        RuntimeError,
        ("expected SelfBalance(period=None), got period=9", "drop either the call or the period"),
    ),
    "a formula's mean": (
        lambda: ranking_loss(LOGITS, LABELS, lambda r: r.rank.mean()),
        ValueError,
        ("error: expected it to return shape [3], got []",),
    ),
    "class indices for published code": (
        lambda: compat.aLRPLoss.apply(LOGITS, LABELS, torch.rand(3)),
        ValueError,
        (f"targets: expected the shape of logits, [{B}, {A}, {C}], got [{B}, {A}]",),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_of_losses(mistake: Mistake) -> None:
    says(mistake)


def test_right_calls_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alrp()
        RankSortLoss()(LOGITS, LABELS, PRED, TARGET)
        alrp(labels=ONE_HOT[..., :C])
        with torch.no_grad():
            alrp(LOGITS.detach())
        ALRPLoss().eval()(LOGITS.detach(), LABELS, PRED.detach(), TARGET)
        # Without positives nothing has a gradient; a classifier has no background.
        alrp(labels=torch.full_like(LABELS, C), pred=PRED.detach()[:0], target=TARGET[:0])
        APLoss()(LOGITS, torch.arange(B * A).view(B, A) % C)
        APLoss()(LOGITS, LABELS.masked_fill(torch.arange(A) > 3, -1))


def test_hints_do_not_mislead():
    scalar, label = torch.tensor(1.0), torch.tensor([1.0])
    with pytest.raises(ValueError, match="logits: expected at least one dimension, got a scalar"):
        ap_loss(scalar, label)
    levels = [torch.randn(50), torch.randn(50, 3)]
    labels = [torch.ones(50, dtype=torch.int64), torch.full((50,), 3)]
    with pytest.raises(ValueError, match="for each positive label, 50, got 2") as raised:
        alrp_loss(levels, labels, torch.rand(2))
    assert "background" not in str(raised.value)
    output = alrp_loss(torch.randn(4), torch.tensor([1, 0, 0, 0]), torch.rand(1))
    with pytest.raises(AttributeError, match=r"use \.total\.shape for"):
        _ = output.shape
    with pytest.raises(AttributeError, match=r"has no _is_view$"):
        _ = output._is_view
