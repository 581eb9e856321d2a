"""A calibration in the last layer of a head: the scores of real detectors are then the calibrated ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from alrp_triton.calibration import Affine, Calibration, Isotonic, fold

COMMON = Calibration(Affine(0.4, -1.3))
# By ids that are not places, out of order, and with the common map for the class with id 20.
OWN = Calibration(Affine(0.4, -1.3), {30: Affine(2.0, 3.0), 10: Affine(0.7, -2.0), 40: Affine(1.5, 0.2)})
IDS = [10, 20, 30, 40]
LAYERS = {
    "linear": lambda **options: nn.Linear(6, 12, **options),
    "conv": lambda **options: nn.Conv2d(6, 12, 3, padding=1, **options),
    "in volumes": lambda **options: nn.Conv3d(6, 12, 1, **options),
    "grouped": lambda **options: nn.Conv2d(6, 12, 1, groups=3, **options),
}


def outputs(layer: nn.Module) -> Tensor:
    """Logits [rows, 12] of the same inputs."""
    torch.manual_seed(1)
    dtype = next(layer.parameters()).dtype
    if isinstance(layer, nn.Linear):
        return layer(torch.randn(50, 6).to(dtype)).detach()
    sides = [5] * (layer.weight.dim() - 2)
    found = layer(torch.randn(2, 6, *sides).to(dtype)).detach()
    return found.movedim(1, -1).reshape(-1, 12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_sigmoid_of_the_new_logits_is_the_calibrated_score(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind](bias=bias).double()
    for calibration, categories in ((COMMON, None), (OWN, IDS), (OWN, [None, *IDS[1:]])):
        folded = copy.deepcopy(layer)
        weight = folded.weight
        fold(calibration, folded, 4, categories)
        ids = torch.tensor([-1 if c is None else c for c in categories or IDS]).repeat(3)
        before = outputs(layer).sigmoid()
        expected = calibration(before, ids.expand_as(before))
        torch.testing.assert_close(outputs(folded).sigmoid(), expected, rtol=1e-11, atol=0)
        # The same parameters are in an optimiser and in a checkpoint.
        assert folded.weight is weight
        assert all(parameter.requires_grad and parameter.is_leaf for parameter in folded.parameters())
        assert set(folded.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_layers_of_other_dtypes(dtype: torch.dtype, bias: bool) -> None:
    """Parameters are rounded once, from float64."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 12, bias=bias, dtype=dtype)
    exact = copy.deepcopy(layer).double()
    for one in (layer, exact):
        fold(OWN, one, 4, IDS)
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, exact.get_parameter(name).to(dtype))


def test_refuses_what_it_cannot_fold() -> None:
    curve = Isotonic((0.0,), (0.5,))
    layer = nn.Linear(6, 12)
    before = copy.deepcopy(layer.state_dict())
    for arguments, said in (
        ((Calibration(curve), layer, 4), "calibration: expected affine maps"),
        ((Calibration(Affine(), {30: curve}), layer, 4, IDS), "calibration: expected affine maps"),
        ((COMMON, layer, 5), "num_classes: expected a divisor of the 12 output channels, got 5"),
        ((COMMON, layer, 0), "num_classes: expected a divisor"),
        ((OWN, layer, 4), "categories: expected the category ids of the channels"),
        ((OWN, layer, 4, IDS[:3]), "categories: expected num_classes = 4 of them, got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            fold(*arguments)  # type: ignore[arg-type]
    for other in (nn.Sequential(layer), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 12))):
        with pytest.raises(TypeError, match=r"layer: expected nn\.Linear or nn\.Conv1d"):
            fold(COMMON, other, 4)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_retinanet_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    from detectors import build_retinanet, objects, spread

    model = spread(build_retinanet(topk_candidates=10**6, detections_per_img=50)).double().eval()
    images = [image.double() for image in objects()[0]]
    before, layer = model(images), model.head.classification_head.cls_logits
    start = copy.deepcopy(layer.state_dict())
    fold(COMMON, layer, 4)
    for old, new in zip(before, model(images), strict=True):
        assert len(old["scores"]) == 50
        assert torch.equal(old["labels"], new["labels"])
        torch.testing.assert_close(old["boxes"], new["boxes"])
        torch.testing.assert_close(COMMON(old["scores"]), new["scores"], rtol=1e-9, atol=0)
    # With maps of classes, in the order of torchvision's labels: the order among classes changes, so all are kept.
    layer.load_state_dict(start)
    own = Calibration(OWN.common, {place: OWN.per_class[c] for place, c in enumerate(IDS) if c in OWN.per_class})
    model.detections_per_img = 10**6
    before = model(images)
    fold(own, layer, 4, range(4))
    for old, new in zip(before, model(images), strict=True):
        expected = own(old["scores"], old["labels"])
        for label in range(4):
            mine = old["labels"] == label
            assert mine.any()
            torch.testing.assert_close(expected[mine], new["scores"][new["labels"] == label], rtol=1e-9, atol=0)


LAST = {
    "ConditionalDetr": lambda model: model.class_labels_classifier,
    "DabDetr": lambda model: model.class_embed,
    "DeformableDetr": lambda model: model.class_embed[model.config.decoder_layers - 1],
    "RTDetr": lambda model: model.model.decoder.class_embed[-1],
    "RTDetrV2": lambda model: model.model.decoder.class_embed[-1],
}


@pytest.mark.parametrize("name", LAST)
def test_the_detr_family(name: str) -> None:
    for package in ("transformers", "scipy", "torchvision"):
        pytest.importorskip(package)
    from detr import FAMILY, NUM_CLASSES, batch, build

    if name not in FAMILY:
        pytest.skip("this transformers does not have it")
    pixels = batch()["pixel_values"]
    own = Calibration(Affine(0.5, 1.0), {0: Affine(2.0, 3.0), 2: Affine(0.7, -2.0)})
    two_stages = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 12}
    for settings in ({}, two_stages) if name == "DeformableDetr" else ({},):
        model = build(name, **settings).eval()
        with torch.no_grad():
            before = model(pixels).logits.sigmoid()
            fold(own, LAST[name](model), NUM_CLASSES, range(NUM_CLASSES))
            after = model(pixels).logits.sigmoid()
        expected = own(before, torch.arange(NUM_CLASSES).expand_as(before))
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)
