"""torchvision's detectors in training: what they learn, checkpoints, and a run that is resumed."""

import io

import pytest
import torch

pytest.importorskip("torchvision")

from adapters import weigh
from detectors import BUILDERS, LOSSES, WITH_BOXES, batch_for, criteria, every_case, every_detector
from torchvision.ops import box_iou

from alrp_triton import ALRPLoss, SelfBalance
from alrp_triton.integrations.torchvision import use_loss


def step(model, optimizer, images, targets):
    losses = model(images, targets)
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.thinned(4)
@every_case
def test_two_images_are_learned(case):
    """At a learning rate and a weight of boxes at which rounding, from which trainings part, does not decide."""
    model = weigh(case.build(), 1.0)
    images, targets = batch_for(case.name, (2, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    history = [step(model, optimizer, images, targets) for _ in range(60)]
    part = LOSSES[case.name][0]
    assert sum(losses[part] for losses in history[-5:]) / 5 < 0.6 * history[0][part]
    if case.member not in WITH_BOXES:
        return
    assert sum(sum(losses.values()) for losses in history[-5:]) / 5 < 0.5 * sum(history[0].values())
    for detected, target in zip(model.eval()(images), targets):
        best = detected["scores"].argsort(descending=True)[: len(target["boxes"])]
        overlaps = box_iou(target["boxes"], detected["boxes"][best])
        right = target["labels"][:, None] == detected["labels"][best]
        assert ((overlaps > 0.5) & right).any(1).all()


def resumable(name, seed=0):
    """Periods of 4 iterations, so that step 6 lies within the second."""
    first, second = (ALRPLoss(tau=tau, self_balance=SelfBalance(20.0, period=4)) for tau in (0.5, 0.7))
    model = use_loss(BUILDERS[name](seed), first, rpn_criterion=second if name == "faster_rcnn" else None)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


@every_detector
def test_a_resumed_training_goes_on_with_the_same_bits(name):
    batches = [batch_for(name, (2, 1), seed=seed) for seed in range(10)]
    model, optimizer = resumable(name)
    expected = []
    for number, one in enumerate(batches):
        if number == 6:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        expected.append(step(model, optimizer, *one))

    resumed, continued = resumable(name, seed=9)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    continued.load_state_dict(saved["optimizer"])
    assert [step(resumed, continued, *one) for one in batches[6:]] == expected[6:]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), resumed.state_dict().values()))
    for where, criterion in criteria(model).items():
        assert criterion.self_balance.weight not in (20.0, saved["model"][f"{where}.self_balance.weight"])
    assert len(criteria(model)) == (2 if name == "faster_rcnn" else 1)


@every_case
def test_the_state_of_all_criteria_is_in_the_state_dict(case):
    model, plain = case.build(), BUILDERS[case.name](seed=3)
    where = ["rpn", "roi_heads"] if case.name == "faster_rcnn" else ["head"]
    parts = [f"{part}.ranking_criterion.self_balance.{key}" for part in where for key in ("weight", "sums", "count")]
    assert model.state_dict().keys() - plain.state_dict().keys() == set(parts if case.member == "alrp" else [])
    # What a detector had before the call still fits.
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
