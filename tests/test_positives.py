"""at_positives: from values beside all labels those of the positives, in the order of the losses."""

import contextlib
from unittest.mock import patch

import pytest
import torch
from dialect import KERNELS, assert_same_bits
from test_waiting import waiting
from virtual_gpu.harness import as_on_a_gpu

from alrp_triton import ALRPLoss, alrp_loss, at_positives
from alrp_triton.engine import passes

COLUMNS = 4
GENERATOR = torch.Generator().manual_seed(3)
LOGITS = [torch.randn(2, 9, COLUMNS, generator=GENERATOR), torch.zeros(2, 0, COLUMNS), torch.randn(2, 5, COLUMNS)]
# By row, with ignored rows and background; the last level has no positive at first.
LABELS = [
    torch.tensor([[4, 0, 4, 3, -1, 4, 4, 1, 4], [4, 4, -1, 4, 4, 2, 4, 4, 0]]),
    torch.zeros(2, 0, dtype=torch.int64),
    torch.tensor([[4, 4, 3, 4, 4], [4, -1, 4, 4, 0]]),
]
NUM_POSITIVES = 7


def rows_of_positives():
    return [((y >= 0) & (y < COLUMNS)) for y in LABELS]


def beside(*axes, dtype=torch.float32):
    """Distinct values beside the labels."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*y.shape, *axes, generator=generator).to(dtype) for y in LABELS]


@pytest.mark.parametrize("given", [None, NUM_POSITIVES])
@pytest.mark.parametrize("axes", [(), (4,), (2, 3)])
def test_of_rows(axes, given):
    values = [value.requires_grad_() for value in beside(*axes)]
    found = at_positives(LOGITS, LABELS, values, num_positives=given)
    expected = torch.cat([value[rows] for value, rows in zip(values, rows_of_positives())])
    assert found.shape == (NUM_POSITIVES, *axes)
    assert_same_bits("values", found, expected)
    weights = torch.arange(found.numel(), dtype=torch.float32).view(found.shape)
    filled = values[::2]
    for one, other in zip(*(torch.autograd.grad((picked * weights).sum(), filled) for picked in (found, expected))):
        assert_same_bits("gradient", one, other)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16, torch.float64])
def test_of_any_dtype_and_strides(dtype):
    """A single tensor, [B, 4, A] in memory."""
    values = beside(4, dtype=dtype)[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits("values", at_positives(LOGITS[0], LABELS[0], values), values[rows_of_positives()[0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_of_a_label_for_each_logit(dtype):
    """Boxes of the rows are expanded; in a row with two positives both get its box."""
    labels = torch.nn.functional.one_hot(LABELS[0].clamp(min=0), 5)[..., :COLUMNS].to(dtype)
    labels[0, 3] = 1
    boxes = beside(4)[0]
    assert boxes.shape == labels.shape
    found = at_positives(LOGITS[0], labels, boxes[..., None, :].expand(*labels.shape, 4))
    assert_same_bits("boxes", found, boxes[labels.nonzero(as_tuple=True)[:2]])
    assert_same_bits("each", at_positives(LOGITS[0], labels, boxes), boxes[labels == 1])
    # Of one dimension.
    assert_same_bits("flat", at_positives(LOGITS[0].flatten(), labels.flatten(), boxes.flatten()), boxes[labels == 1])


def test_the_losses_take_them():
    corners = [value.abs() for value in beside(2)]
    pred, target = ([torch.cat([c, c + size], -1) for c in corners] for size in (2.0, 3.0))
    arguments = [at_positives(LOGITS, LABELS, boxes) for boxes in (pred, target)]
    loss = ALRPLoss()(LOGITS, LABELS, *arguments)
    rows = rows_of_positives()
    expected = ALRPLoss()(LOGITS, LABELS, *(torch.cat([b[r] for b, r in zip(boxes, rows)]) for boxes in (pred, target)))
    for one, other in zip(loss, expected):
        assert_same_bits("loss", one, other)


def test_other_labels_to_ignore_and_no_positives(looking):
    labels = [y.masked_fill(y == 0, 255) for y in LABELS]
    values = beside()
    expected = torch.cat([value[(y > 0) & (y < COLUMNS)] for value, y in zip(values, labels)])
    with pytest.raises(ValueError, match=r"^labels\[0\]: expected"):
        at_positives(LOGITS, labels, values, ignore_index=255)
    labels = [y.masked_fill(y == -1, 255) for y in labels]
    assert_same_bits("values", at_positives(LOGITS, labels, values, ignore_index=255), expected)
    boxes = beside(4)[0].requires_grad_()
    found = at_positives(LOGITS[0], torch.full_like(LABELS[0], COLUMNS), boxes)
    assert found.shape == (0, 4)
    found.sum().backward()
    assert not boxes.grad.any()
    assert at_positives(LOGITS[1], LABELS[1], beside(4)[1]).shape == (0, 4)


WRONG = [
    (TypeError, "values", {"values": None}),
    (TypeError, r"values\[0\]", {"values": [1.0]}),
    (ValueError, "values", {"values": beside()[0]}),
    (ValueError, "values", {"values": beside()[:2]}),
    (ValueError, r"values\[0\]", {"values": [torch.zeros(9, 2), *beside()[1:]]}),
    (ValueError, r"values\[2\]", {"values": [*beside(4)[:2], beside()[2]]}),
    (ValueError, r"values\[2\]", {"values": [*beside(4)[:2], beside(3)[2]]}),
    (TypeError, r"values\[1\]", {"values": [beside()[0], *beside(dtype=torch.float64)[1:]]}),
    (ValueError, r"values\[2\]", {"values": [*beside()[:2], beside()[2].to("meta")]}),
    (TypeError, "labels", {"labels": LABELS[0].float(), "logits": LOGITS[0]}),
    (ValueError, r"labels\[0\]", {"labels": [y + 1 for y in LABELS]}),
    (ValueError, "num_positives", {"num_positives": NUM_POSITIVES + 1}),
    (TypeError, "num_positives", {"num_positives": 7.0}),
    (TypeError, "ignore_index", {"ignore_index": None}),
]


@pytest.mark.parametrize(("error", "name", "changed"), WRONG)
def test_wrong_arguments(error, name, changed, looking):
    with pytest.raises(error, match=rf"^{name}: expected"):
        at_positives(**{"logits": LOGITS, "labels": LABELS, "values": beside(), **changed})


def test_a_known_number_waits_for_nothing():
    values = [value.requires_grad_() for value in beside(4)]
    with as_on_a_gpu(), contextlib.nullcontext() if KERNELS else patch.object(passes, "_TRITON_INSTALLED", False):
        with waiting() as found:
            picked = at_positives(LOGITS, LABELS, values, num_positives=NUM_POSITIVES)
            picked.sum().backward()
        assert not found
        # Else the host has to learn it.
        with waiting() as found:
            at_positives(LOGITS, LABELS, values)
        assert found
        # As the losses, which get as many: NaN.
        few = at_positives(LOGITS, LABELS, beside(), num_positives=NUM_POSITIVES - 1)
        assert alrp_loss(LOGITS, LABELS, few.abs()).total.isnan()
    assert_same_bits("values", picked, at_positives(LOGITS, LABELS, values))


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    values = beside(4)
    compiled = torch.compile(at_positives, backend="aot_eager", fullgraph=True)
    found = compiled(LOGITS, LABELS, values, num_positives=NUM_POSITIVES)
    assert_same_bits("values", found, at_positives(LOGITS, LABELS, values))
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"num_positives: expected an int where a whole"):
        compiled(LOGITS, LABELS, values)
