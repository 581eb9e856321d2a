"""Shapes, strides, levels and kinds of labels: none of them changes a bit."""

import pytest
import torch
from dialect import KERNELS, random_case
from dialect.checks import assert_same_bits, assert_same_results, assert_split_alike, backends, evaluate

from alrp_triton import alrp_loss

pytestmark = pytest.mark.parametrize("backend", backends())

SHAPE = (2, 3, 4, 15)


def problem(dtype=torch.float32):
    """``[2, 3, 4, 15]`` logits with a label for each, a sixth of them ignored."""
    case = random_case(360, 20, "middle", ignored=0.17, dtype=dtype)
    return case.logits.view(SHAPE), case.labels.view(SHAPE), case.loc_errors


def class_problem(num_rows=24, num_classes=15):
    """``[rows, C]`` logits with a class index for each row, and the same as a label for each logit."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(num_rows, num_classes, generator=generator)
    classes = torch.randint(-1, num_classes + 1, (num_rows,), generator=generator)
    classes[:4] = torch.tensor([0, num_classes - 1, num_classes, -1])
    classes[4:10] = num_classes
    per_logit = torch.zeros(num_rows, num_classes, dtype=torch.int64)
    is_pos = (classes >= 0) & (classes < num_classes)
    per_logit[is_pos, classes[is_pos]] = 1
    per_logit[classes == -1] = -1
    return logits, classes, per_logit, torch.rand(int(is_pos.sum()), generator=generator)


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


@pytest.mark.thinned(6 if KERNELS else 2)
@pytest.mark.parametrize("delta", [1.0, 0.0])
@pytest.mark.parametrize("labels_layout", ["contiguous", "transposed", "every_other"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, labels_layout, delta, backend):
    logits, labels, errors = problem()
    expected = evaluate(logits, labels, errors, backend, delta=delta)
    strided = LAYOUTS[layout](logits)
    assert torch.equal(strided, logits)
    result = evaluate(strided, LAYOUTS[labels_layout](labels), errors, backend, delta=delta)
    assert_same_results(result, expected)


@pytest.mark.thinned(4 if KERNELS else 2)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_with_class_labels(layout, backend):
    logits, classes, _, errors = class_problem()
    logits, classes = logits.view(SHAPE), classes.view(SHAPE[:-1])
    expected = evaluate(logits, classes, errors, backend)
    assert_same_results(evaluate(LAYOUTS[layout](logits), classes, errors, backend), expected)
    scattered = torch.stack([classes, classes - 1], dim=-1)[..., 0]
    assert not scattered.is_contiguous()
    assert_same_results(evaluate(LAYOUTS[layout](logits), scattered, errors, backend), expected)


def test_expanded_logits_gather_the_gradients_of_their_copies(backend):
    row = torch.linspace(-1, 1, 6, requires_grad=True)
    labels = torch.tensor([[1, 0, 0, 0, 1, -1], [0, 0, 1, 0, 0, 0], [0, -1, 0, 0, 0, 0]])
    errors = torch.tensor([0.2, 0.4, 0.6])
    cls, loc, rank = alrp_loss(row.expand(3, 6), labels, errors, backend=backend)
    (gradient,) = torch.autograd.grad(cls, row)
    copies = evaluate(row.detach().repeat(3, 1), labels, errors, backend)
    assert_same_bits("cls", cls.detach(), copies.cls)
    assert_same_bits("loc", loc, copies.loc)
    assert_same_bits("rank", rank, copies.rank)
    torch.testing.assert_close(gradient, copies.grad_logits.sum(0), rtol=1e-6, atol=1e-8)


def test_expanded_labels(backend):
    logits, _, errors = problem()
    row = torch.tensor([1, 0, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    errors = torch.linspace(0, 1, 24)
    expected = evaluate(logits, row.repeat(2, 3, 4, 1), errors, backend)
    assert_same_results(evaluate(logits, row.expand(SHAPE), errors, backend), expected)


def test_strided_errors(backend):
    logits, labels, errors = problem()
    doubled = torch.stack([errors, errors + 1], dim=1)[:, 0]
    expected = evaluate(logits, labels, errors, backend)
    assert_same_results(evaluate(logits, labels, doubled, backend), expected)
    result = evaluate(logits, labels, errors[:1].expand(20), backend)
    assert_same_results(result, evaluate(logits, labels, errors[:1].repeat(20), backend))


@pytest.mark.parametrize("shape", [(360,), (1, 360), (360, 1), (24, 15), (2, 12, 15), (2, 3, 4, 15), (2, 3, 2, 2, 15)])
def test_any_shape(shape, backend):
    logits, labels, errors = problem()
    flat = evaluate(logits.flatten(), labels.flatten(), errors, backend)
    result = evaluate(logits.view(shape), labels.view(shape), errors, backend)
    assert result.grad_logits.shape == shape
    assert_same_results(result._replace(grad_logits=result.grad_logits.flatten()), flat)


@pytest.mark.thinned(4 if KERNELS else 1)
@pytest.mark.parametrize("num_classes", [1, 15])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_class_labels_say_what_one_label_for_each_logit_says(dtype, num_classes, backend):
    logits, classes, per_logit, errors = class_problem(num_classes=num_classes)
    expected = evaluate(logits, per_logit, errors, backend)
    assert_same_results(evaluate(logits, classes.to(dtype), errors, backend), expected)


def test_class_labels_of_unsigned_bytes(backend):
    logits, classes, per_logit, errors = class_problem()
    expected = evaluate(logits, per_logit, errors, backend)
    unsigned = classes.masked_fill(classes == -1, 255).to(torch.uint8)
    assert_same_results(evaluate(logits, unsigned, errors, backend, ignore_index=255), expected)


@pytest.mark.parametrize("label", [0, 2, 4])
def test_a_single_row_with_a_scalar_label(label, backend):
    logits = torch.tensor([0.5, -0.25, 0.0, 1.0])
    errors = torch.tensor([0.5]) if label < 4 else torch.empty(0)
    expected = evaluate(logits[None], torch.tensor([label]), errors, backend)
    result = evaluate(logits, torch.tensor(label), errors, backend)
    assert_same_results(result, expected._replace(grad_logits=expected.grad_logits[0]))


def test_levels_of_different_layouts_and_kinds_of_labels(backend):
    logits, classes, per_logit, errors = class_problem()
    whole = evaluate(logits, per_logit, errors, backend)
    parts = [
        (logits[:4].view(2, 2, 15), classes[:4].view(2, 2)),
        (logits[4:10].T.contiguous().T, per_logit[4:10]),
        (logits[10:10], classes[10:10]),
        (logits[10:].flatten(), per_logit[10:].flatten()),
    ]
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x, _ in parts]
    # A tuple, and a generator of labels.
    cls, loc, rank = alrp_loss(tuple(leaves), (y for _, y in parts), errors, backend=backend)
    gradients = torch.autograd.grad(cls, leaves)
    assert_split_alike(backend, "cls", cls.detach(), whole.cls)
    assert_split_alike(backend, "loc", loc, whole.loc)
    assert_split_alike(backend, "rank", rank, whole.rank)
    assert [g.shape for g in gradients] == [x.shape for x in leaves]
    assert_split_alike(backend, "gradients", torch.cat([g.reshape(-1) for g in gradients]), whole.grad_logits.flatten())


def test_levels_that_need_no_gradient_still_rank(backend):
    case = random_case(100, 10)
    head = case.logits[:60].clone().requires_grad_()
    labels = [case.labels[:60], case.labels[60:]]
    cls = alrp_loss([head, case.logits[60:]], labels, case.loc_errors, backend=backend).cls
    cls.backward()
    assert_split_alike(backend, "grad", head.grad, evaluate(*case[1:], backend).grad_logits[:60])


def test_the_same_tensor_as_two_levels(backend):
    case = random_case(80, 8)
    x = case.logits.clone().requires_grad_()
    errors = case.loc_errors.repeat(2)
    cls = alrp_loss([x, x], [case.labels, case.labels], errors, backend=backend).cls
    (gradient,) = torch.autograd.grad(cls, x)
    whole = evaluate(case.logits.repeat(2), case.labels.repeat(2), errors, backend)
    assert_split_alike(backend, "grad", gradient, whole.grad_logits.view(2, 80).sum(0))


@pytest.mark.parametrize("per_class", [False, True])
def test_labels_in_even_steps_beside_contiguous_logits(backend, per_class):
    """More logits than one piece has: each gets its gradient, as with labels that lie in a row."""
    if backend not in ("torch", "numba"):
        pytest.skip("the others have no pieces")
    logits = torch.randn(100_000, 3, generator=torch.Generator().manual_seed(0)).view(4, 25_000, 3)
    wide = torch.full((4, 50_000), 3) if per_class else torch.zeros(4, 25_000, 6, dtype=torch.int64)
    wide.view(4, -1)[0, :60:2] = 1
    strided = wide[..., ::2]
    gradients = []
    for labels in (strided, strided.contiguous()):
        x = logits.clone().requires_grad_()
        alrp_loss(x, labels, torch.full((30,), 0.5), backend=backend).cls.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
