"""Groups by name: the integers that a name stands for."""

import pytest
import torch
from dialect import by_engine_backend, engine_backends

from alrp_triton import APLoss, alrp_loss, ap_loss, ndcg_loss, rank_sort_loss
from alrp_triton.engine.named_groups import named_groups
from alrp_triton.framework import RankingLoss, ranking_loss

if "numba" in engine_backends():
    from alrp_triton.engine.passes import numba

SHAPES = [(2, 5, 3), (2, 2, 2, 3)]
INTEGERS = {
    "image": [torch.tensor([[0], [1]]).expand(2, 5), torch.tensor([[[0]], [[1]]]).expand(2, 2, 2)],
    "class": [torch.arange(3).expand(shape) for shape in SHAPES],
    "image_class": [
        (3 * torch.arange(2).view(2, *[1] * (len(shape) - 1)) + torch.arange(3)).expand(shape) for shape in SHAPES
    ],
}


def levels() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(shape, generator=generator) for shape in SHAPES]
    labels = [torch.randint(4, shape[:-1], generator=generator) for shape in SHAPES]
    return logits, labels, torch.rand(sum(int((of < 3).sum()) for of in labels), generator=generator)


def with_gradients(function, *arguments, **settings):
    logits, *others = arguments
    logits = [level.clone().requires_grad_() for level in logits]
    loss = function(logits, *others, **settings)
    total = loss if isinstance(loss, torch.Tensor) else loss.total
    return [total, *torch.autograd.grad(total, logits)]


@by_engine_backend
@pytest.mark.parametrize("name", INTEGERS)
def test_a_name_stands_for_integers(name, backend):
    logits, labels, values = levels()
    for function, more in ((ap_loss, ()), (ndcg_loss, ()), (alrp_loss, (values,)), (rank_sort_loss, (values,))):
        found, expected = (
            with_gradients(function, logits, labels, *more, groups=groups, backend=backend)
            for groups in (name, INTEGERS[name])
        )
        for given, wanted in zip(found, expected):
            assert torch.equal(given, wanted)


def test_modules_and_formulas_take_names():
    logits, labels, values = levels()
    expected = ap_loss(logits, labels, groups=INTEGERS["class"])
    assert torch.equal(APLoss()(logits, labels, groups="class"), expected)

    def imprecision(ranking):
        return ranking.num_false_positives / ranking.rank

    expected = ranking_loss(logits, labels, imprecision, num_positives=len(values), groups=INTEGERS["image"])
    found = RankingLoss(imprecision)(logits, labels, num_positives=len(values), groups="image")
    assert torch.equal(found, expected)


def test_classes_of_each_image_when_levels_have_different_classes():
    """The same image and class is the same ranking, whatever the widths of the levels."""
    logits, labels = (
        [torch.randn(2, 4, 3), torch.randn(2, 4, 2)],
        [torch.randint(2, (2, 4, 3)), torch.ones(2, 4, 2).long()],
    )
    integers = [
        3 * torch.arange(2)[:, None, None] + torch.arange(level.shape[-1]).expand(level.shape) for level in logits
    ]
    assert torch.equal(ap_loss(logits, labels, groups="image_class"), ap_loss(logits, labels, groups=integers))


def test_a_name_takes_no_memory_of_the_size_of_the_logits():
    (groups,) = named_groups("image_class", [torch.empty(3, 1000, 7)], None)
    assert groups.shape == (3, 1000, 7)
    assert groups.untyped_storage().nbytes() == 8 * 3 * 7


def test_compiled_in_one_graph():
    logits, labels, _ = levels()
    compiled = torch.compile(
        lambda x: ap_loss(x, labels[0], num_positives=4, groups="image_class"), fullgraph=True, backend="aot_eager"
    )
    labels[0] = torch.tensor([[0, 3, 1, 3, 3], [3, 2, 3, 3, 0]])
    assert torch.equal(compiled(logits[0]), ap_loss(logits[0], labels[0], num_positives=4, groups="image_class"))


@pytest.mark.parametrize(
    ("shape", "name", "said"),
    [
        (
            (2, 5, 3),
            "images",
            r"groups: expected integers, one of \('image', 'class', 'image_class'\), or None, got 'images'",
        ),
        ((5,), "class", r"groups: 'class' needs logits \[B, ..., C\], got shape \[5\]"),
    ],
)
def test_errors(shape, name, said):
    with pytest.raises(ValueError, match=said):
        ap_loss(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64), groups=name)


@pytest.mark.skipif("numba" not in engine_backends(), reason="of the loops that Numba compiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("per_logit", [False, True])
def test_columns_of_groups(per_logit, name, dtype, monkeypatch):
    """The same bits as in the order of rows, from logits of any strides, with ignored rows and NaN among them."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 40, 5), (3, 4, 30, 5)]
    logits = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    logits[1] = logits[1].permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
    labels = [torch.randint(-1, 7, shape[:-1], generator=generator).clamp(max=5) for shape in shapes]
    logits[0][labels[0] == -1] = float("nan")
    monkeypatch.setattr(numba, "_COPIED_PIECE", 400)
    if per_logit:  # which are walked in their own order
        labels = [torch.where(y[..., None] < 0, -1, (y[..., None] == torch.arange(5)).long()) for y in labels]
    found, expected = (
        with_gradients(ap_loss, logits, labels, groups=name, backend=backend) for backend in ("numba", "torch")
    )
    for given, wanted in zip(found, expected):
        assert torch.equal(given, wanted)


def test_a_list_of_images_is_no_list_of_levels():
    images = [torch.randn(9, 4), torch.randn(9, 4)]
    labels = [torch.full((9,), 4).index_fill(0, torch.tensor([2]), 1)] * 2
    for name in ("image", "image_class"):
        with pytest.raises(ValueError, match="a list holds levels, never images"):
            ap_loss(images, labels, groups=name)
    assert ap_loss(images, labels, groups="class").isfinite()
