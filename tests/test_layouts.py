"""Shapes, strides, levels and kinds of labels: none of them changes a bit."""

import pytest
import torch
from dialect import (
    ALRP,
    KERNELS,
    assert_agree,
    assert_close,
    assert_same_bits,
    assert_same_results,
    assert_split_alike,
    by_backend,
    by_member_sparing,
    evaluate,
    of_case,
    random_case,
)

from alrp_triton import alrp_loss

pytestmark = by_backend

SHAPE = (2, 3, 4, 15)


def problem(num_classes=15):
    """``[2, 3, 4, C]`` logits with a class index for each row, the same as a label for each logit, and values."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(24, num_classes, generator=generator)
    classes = torch.randint(-1, num_classes + 1, (24,), generator=generator)
    classes[:4] = torch.tensor([0, num_classes - 1, num_classes, -1])
    classes[4:10] = num_classes
    labels = torch.zeros(24, num_classes, dtype=torch.int64)
    is_pos = (classes >= 0) & (classes < num_classes)
    labels[is_pos, classes[is_pos]] = 1
    labels[classes == -1] = -1
    values = (4 * torch.rand(int(is_pos.sum()), generator=generator)).round() / 4
    return logits.view(*SHAPE[:3], -1), classes.view(SHAPE[:3]), labels.view(*SHAPE[:3], -1), values


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "reversed_dims": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every_other": lambda x: torch.stack([x, x + 100], dim=-1).flatten(-2)[..., ::2],
    "every_other_row": lambda x: torch.stack([x, x + 100], dim=1).flatten(0, 1)[::2],
    "part_of_more": lambda x: torch.cat([x + 7, x, x - 7], dim=2)[:, :, 4:8],
    "with_offset": lambda x: torch.cat([x.flatten()[:5], x.flatten()])[5:].view(SHAPE),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.thinned(12 if KERNELS else 2)
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("kind", ["contiguous", "transposed", "every_other", "classes", "scattered classes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, kind, delta, backend):
    logits, classes, labels, values = problem()
    given = {"classes": classes, "scattered classes": torch.stack([classes, classes - 1], dim=-1)[..., 0]}
    strided = LAYOUTS[layout](logits)
    assert torch.equal(strided, logits)
    expected = evaluate(ALRP, logits, labels, values, backend, delta=delta)
    labels = given[kind] if kind in given else LAYOUTS[kind](labels)
    assert_same_results(evaluate(ALRP, strided, labels, values, backend, delta=delta), expected)


def test_expanded_logits_gather_the_gradients_of_their_copies(backend):
    row = torch.linspace(-1, 1, 6, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, 0, 1, -1], [0, 0, 1, 0, 0, 0], [0, -1, 0, 0, 0, 0]])
    errors = torch.tensor([0.2, 0.4, 0.6])
    cls, loc, rank = alrp_loss(row.expand(3, 6), labels, errors, backend=backend)
    (gradient,) = torch.autograd.grad(cls, row)
    copies = evaluate(ALRP, row.detach().repeat(3, 1), labels, errors, backend)
    for name, found in {"cls": cls.detach(), "loc": loc, "rank": rank}.items():
        assert_same_bits(name, found, copies[name])
    torch.testing.assert_close(gradient, copies["cls by logits"].sum(0), rtol=1e-6, atol=1e-8)


def test_expanded_labels_and_strided_values(backend):
    logits, _, labels, values = problem()
    row = torch.tensor([1, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    errors = torch.linspace(0, 1, 24)
    expected = evaluate(ALRP, logits, row.repeat(2, 3, 4, 1), errors, backend)
    assert_same_results(evaluate(ALRP, logits, row.expand(SHAPE), errors, backend), expected)
    for given in (torch.stack([values, values + 1], dim=1)[:, 0], values[:1].expand(len(values))):
        expected = evaluate(ALRP, logits, labels, given.contiguous(), backend)
        assert_same_results(evaluate(ALRP, logits, labels, given, backend), expected)


@pytest.mark.parametrize("shape", [(360,), (1, 360), (360, 1), (24, 15), (2, 12, 15), (2, 3, 4, 15), (2, 3, 2, 2, 15)])
def test_any_shape(shape, backend):
    logits, _, labels, values = problem()
    found = evaluate(ALRP, logits.view(shape), labels.view(shape), values, backend)
    assert found["cls by logits"].shape == shape
    assert_same_results(found, evaluate(ALRP, logits.flatten(), labels.flatten(), values, backend))


@pytest.mark.thinned(4 if KERNELS else 1)
@pytest.mark.parametrize("num_classes", [1, 15])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_labels_say_what_one_label_for_each_logit_says(dtype, num_classes, backend):
    logits, classes, labels, values = problem(num_classes)
    expected = evaluate(ALRP, logits, labels, values, backend)
    index = 255 if dtype == torch.uint8 else -1
    given = classes.masked_fill(classes == -1, index).to(dtype)
    assert_same_results(evaluate(ALRP, logits, given, values, backend, ignore_index=index), expected)


@pytest.mark.parametrize("label", [0, 2, 4])
def test_a_single_row_with_a_scalar_label(label, backend):
    logits = torch.tensor([0.5, -0.25, 0.0, 1.0])
    errors = torch.tensor([0.5]) if label < 4 else torch.empty(0)
    expected = evaluate(ALRP, logits[None], torch.tensor([label]), errors, backend)
    assert_same_results(evaluate(ALRP, logits, torch.tensor(label), errors, backend), expected)
    grouped = evaluate(ALRP, logits, torch.tensor(label), errors, backend, groups=torch.tensor(-3))
    assert_agree({name: tensor.reshape(expected[name].shape) for name, tensor in grouped.items()}, expected)


@by_member_sparing
def test_levels_of_different_layouts_and_kinds_of_labels(member, backend):
    logits, classes, labels, values = problem()
    whole = evaluate(member, logits, labels, values, backend)
    flat = {name: tensor.flatten() if name.endswith("by logits") else tensor for name, tensor in whole.items()}
    assert_agree(flat, member.judge(logits.flatten(), labels.flatten(), values))
    logits, classes, labels = logits.flatten(0, 2), classes.flatten(), labels.flatten(0, 2)
    parts = [
        (logits[:4].view(2, 2, 15), classes[:4].view(2, 2)),
        (logits[4:10].T.contiguous().T, labels[4:10]),
        (logits[10:10], classes[10:10]),
        (logits[10:].flatten(), labels[10:].flatten()),
    ]
    found = evaluate(member, [x for x, _ in parts], (y for _, y in parts), values, backend)
    assert_same_results(found, whole, split_by=backend)
    leaves = tuple(x.clone(memory_format=torch.preserve_format).requires_grad_() for x, _ in parts)
    found = member.loss(leaves, tuple(y for _, y in parts), values, backend=backend)
    gradients = torch.autograd.grad(found[member.components[0]], leaves)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]


def test_levels_that_need_no_gradient_still_rank(backend):
    case = random_case(100, 10)
    head = case.logits[:60].clone().requires_grad_()
    labels = [case.labels[:60], case.labels[60:]]
    alrp_loss([head, case.logits[60:]], labels, case.loc_errors, backend=backend).cls.backward()
    assert_split_alike(backend, "grad", head.grad, of_case(ALRP, case, backend)["cls by logits"][:60])


def test_the_same_tensor_as_two_levels(backend):
    case = random_case(80, 8)
    x, errors = case.logits.clone().requires_grad_(), case.loc_errors.repeat(2)
    cls = alrp_loss([x, x], [case.labels, case.labels], errors, backend=backend).cls
    (gradient,) = torch.autograd.grad(cls, x)
    whole = evaluate(ALRP, case.logits.repeat(2), case.labels.repeat(2), errors, backend)
    assert_split_alike(backend, "grad", gradient, whole["cls by logits"].view(2, 80).sum(0))


@by_member_sparing
def test_inputs_are_not_changed_and_results_are_nobody_elses(member, backend):
    case = random_case(120, 12, dtype=torch.float64)
    values, groups = member.values(case), torch.arange(120) % 3
    before = [tensor.clone() for tensor in (case.logits, case.labels, values, groups)]
    for arguments in ({}, {"groups": groups}):
        first = evaluate(member, *case[1:3], values, backend, **arguments)
        second = evaluate(member, *case[1:3], values, backend, **arguments)
        for tensor in first.values():
            tensor.fill_(9.0)
        for tensor, copy in zip((case.logits, case.labels, values, groups), before):
            assert torch.equal(tensor, copy)
        for name, tensor in evaluate(member, *case[1:3], values, backend, **arguments).items():
            assert_close(name, tensor, second[name], 0)
