"""Transforms of functions: what has no meaning for a ranking loss is refused, and says what to use instead."""

import pytest
import torch
from dialect import ALRP, FAMILY, KERNELS, RANK_SORT, backends, by_backend, by_member, random_case
from torch.autograd import forward_ad

from alrp_triton import ALRPLoss, RankSortLoss, ap_loss
from alrp_triton.boxes import box_error

INSTEAD = r"backward\(\) or torch.autograd.grad.* groups"
CASE = random_case(40, 4)
COPIES = torch.stack([CASE.logits, CASE.logits + 1])


def of_logits(member, backend):
    values = member.values(CASE)
    return lambda x: member.loss(x, CASE.labels, values, backend=backend)[member.components[0]]


def forward_mode(function, given, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(given, tangent))).tangent


def refuses(name, function, *given):
    with pytest.raises(RuntimeError, match=f"{name}: expected .*{INSTEAD}"):
        function(*given)


@by_member
@by_backend
def test_transforms_of_the_logits_are_refused(backend, member):
    loss = of_logits(member, backend)
    refuses("^logits", torch.func.vmap(loss), COPIES)
    refuses("^logits", torch.func.vmap(torch.func.grad(loss)), COPIES)
    refuses("^logits", torch.func.jvp, loss, (CASE.logits,), (CASE.logits,))
    refuses("^logits", forward_mode, loss, CASE.logits, CASE.logits)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        refuses("^logits", transform(loss), CASE.logits)
    refuses("^logits", torch.func.linearize, loss, CASE.logits)


@by_backend
def test_transforms_of_one_level_are_refused(backend):
    def loss(x):
        return ap_loss([CASE.logits, x], [CASE.labels, CASE.labels], backend=backend)

    refuses("^logits", torch.func.vmap(loss), COPIES)
    refuses("^logits", forward_mode, loss, CASE.logits, CASE.logits)


@by_backend
@pytest.mark.parametrize("member", [member for member in FAMILY if member.takes], ids=repr)
def test_transforms_of_the_values_are_refused(member, backend):
    """The engine's sums over positives know no tangent on every device."""
    values = member.values(CASE)

    def loss(v):
        found = member.loss(CASE.logits, CASE.labels, v, backend=backend)
        return found["loc" if member is ALRP else member.components[0]]

    refuses(f"^{member.takes}", torch.func.vmap(loss), torch.stack([values, values]))
    refuses(f"^{member.takes}", torch.func.grad(loss), values)
    refuses(f"^{member.takes}", forward_mode, loss, values, values)


@by_backend
@pytest.mark.parametrize("name", ["labels", "groups"])
def test_vmap_over_integers_is_refused(name, backend):
    def loss(given):
        return ap_loss(CASE.logits, **{"labels": CASE.labels, name: given}, backend=backend)

    refuses(f"^{name}", torch.func.vmap(loss), torch.stack([CASE.labels, CASE.labels]))


@by_backend
@pytest.mark.parametrize("criterion", [ALRPLoss, RankSortLoss])
def test_transforms_of_boxes_are_refused_by_the_modules(criterion, backend):
    corners = torch.rand(4, 2)
    boxes = torch.cat([corners, corners + 1], 1)
    module = criterion(backend=backend)
    state = {name: value.clone() for name, value in module.state_dict().items()}

    def loss(pred):
        return module(CASE.logits, CASE.labels, pred, boxes).loc

    # Rank & Sort takes IoUs for constants, and the logits' part of the loss does not depend on boxes otherwise.
    refuses("^pred_boxes", torch.func.vmap(loss), torch.stack([boxes, boxes]))
    if criterion is ALRPLoss:
        refuses("^pred_boxes", torch.func.grad(loss), boxes)
        refuses("^pred_boxes", forward_mode, loss, boxes, boxes)
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in state.items())


@by_backend
@by_member
def test_batched_gradients_are_refused(member, backend):
    """vmap of the backward pass, in both of its forms."""
    x = CASE.logits.clone().requires_grad_()
    loss = of_logits(member, backend)(x)[None].expand(2)
    with pytest.raises(RuntimeError, match=f"expected tensors outside of vmap; .*{INSTEAD}"):
        torch.autograd.grad(loss, x, torch.eye(2), is_grads_batched=True)
    loss = of_logits(member, backend)(x)
    with pytest.raises(RuntimeError, match=f"expected tensors outside of vmap; .*{INSTEAD}"):
        torch.func.vmap(lambda upstream: torch.autograd.grad(loss, x, upstream)[0])(torch.ones(2))


def test_every_operator_refuses_vmap():
    """One that did not would be called in a loop, with a warning, or say that PyTorch lacks a rule."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("alrp_triton::")}
    assert len(names) >= 10
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched"), name
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Batched"), name


def test_calls_beside_transforms_go_on():
    """What is not transformed may be used within a transformed function, and gives what it gives outside."""
    loss = of_logits(RANK_SORT, backends()[0])
    expected = loss(CASE.logits)
    found = torch.func.vmap(lambda scale: scale * loss(CASE.logits))(torch.tensor([1.0, 2.0]))
    assert torch.equal(found, torch.stack([expected, 2 * expected]))
    found, tangent = torch.func.jvp(lambda scale: scale * loss(CASE.logits), (torch.tensor(2.0),), (torch.tensor(1.0),))
    assert torch.equal(found, 2 * expected)
    assert torch.equal(tangent, expected)
    with forward_ad.dual_level():
        assert torch.equal(loss(CASE.logits), expected)


def test_box_errors_alone_are_functions_like_any_other():
    corners = torch.rand(3, 5, 2)
    pred, target = torch.cat([corners, corners + 1], -1), torch.cat([corners, corners + 0.8], -1)
    found = torch.func.vmap(lambda a, b: box_error(a, b, "giou", 0.5))(pred, target)
    expected = torch.stack([box_error(a, b, "giou", 0.5) for a, b in zip(pred, target)])
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(KERNELS, reason="needs no kernel")
@pytest.mark.parametrize("where", ["within", "around", "around, first"])
def test_a_compiled_loss_drops_no_tangent(where):
    """torch.compile would lose tangents that come from outside."""
    torch._dynamo.reset()
    if where == "within":

        def loss(x):
            return torch.func.jvp(lambda y: ap_loss(y, CASE.labels, num_positives=4), (x,), (x,))[1]

        function = torch.compile(loss, backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(ap_loss, backend="eager", fullgraph=True)
        if where == "around":
            compiled(CASE.logits, CASE.labels, num_positives=4)

        def function(x):
            return forward_mode(lambda y: compiled(y, CASE.labels, num_positives=4), x, x)

    # Before 2.7 torch.compile does not tell which error there was; from 2.14 on it raises one of its own.
    ours, theirs = "logits: expected .*forward-mode", "input tensors that carry a forward-mode AD tangent"
    refusal = f"{ours}|{theirs}" if torch.__version__ >= "2.7" else "exception"
    with pytest.raises(Exception, match=refusal):
        function(CASE.logits)
