"""Tiny models of the DETR family at random, built from configs, and batches for them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be downloaded, and nothing looked for

import pytest
import torch
import transformers
from adapters import own_loss

from alrp_triton.integrations.transformers import use_alrp, use_ap, use_loss, use_ndcg, use_rank_sort

NUM_CLASSES, NUM_QUERIES, LAYERS = 3, 12, 3
COMMON = {
    **{"encoder_layers": 1, "decoder_layers": LAYERS, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": NUM_QUERIES, "num_labels": NUM_CLASSES},
    **{"dropout": 0.0, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8] * 4, "depths": [1] * 4, "layer_type": "basic"}
DETR = {"ConditionalDetr": {"d_model": 16}, "DeformableDetr": {"d_model": 32}, "DabDetr": {"hidden_size": 16}}
RT_DETR = {
    **{"d_model": 16, "encoder_hidden_dim": 16, "encoder_in_channels": [8] * 3, "decoder_in_channels": [16] * 3},
    **{"feat_strides": [8, 16, 32], "num_denoising": 4, "disable_custom_kernels": True},
}
WITH_PROPOSALS = [name for name in ("RTDetr", "RTDetrV2", "DFine") if hasattr(transformers, f"{name}Config")]
FAMILY = [*DETR, *WITH_PROPOSALS]
MEMBERS = {
    **{"alrp": use_alrp, "rank_sort": use_rank_sort, "ap": use_ap, "ndcg": use_ndcg},
    "own": lambda model, **options: use_loss(model, own_loss(), **options),
}
every_model = pytest.mark.parametrize("name", FAMILY)
every_member = pytest.mark.parametrize("use", MEMBERS.values(), ids=MEMBERS)


def build(name="ConditionalDetr", auxiliary_loss=True, seed=0, **settings):
    torch.manual_seed(seed)
    settings = {**COMMON, **DETR.get(name, RT_DETR), "auxiliary_loss": auxiliary_loss, **settings}
    if name == "DeformableDetr":
        settings.setdefault("num_feature_levels", 3)
    resnet = transformers.ResNetConfig if name in DETR else transformers.RTDetrResNetConfig
    backbone = resnet(**RESNET, out_features=["stage2", "stage3", "stage4"])
    config = getattr(transformers, f"{name}Config")(backbone_config=backbone, **settings)
    return getattr(transformers, f"{name}ForObjectDetection")(config).train()


def layers_of(name):
    """How many outputs of a model are ranked."""
    return LAYERS + (name in WITH_PROPOSALS)


def batch(objects_per_image=(3, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for n in objects_per_image:
        centre, size = torch.rand(2, n, 2, generator=generator).unbind()
        boxes = torch.cat([0.3 + 0.4 * centre, 0.1 + 0.4 * size], 1)
        labels.append({"boxes": boxes, "class_labels": torch.randint(NUM_CLASSES, (n,), generator=generator)})
    return {"pixel_values": torch.rand(len(labels), 3, 64, 64, generator=generator), "labels": labels}


def run(model, inputs=None, seed=2):
    """The model's outputs; the same noise is drawn for denoising queries in each run."""
    inputs = batch() if inputs is None else inputs
    torch.manual_seed(seed)
    return model(**inputs)


def terms_of(model):
    return {name: value.item() for name, value in run(model).loss_dict.items()}


def weight_of(model):
    return model.loss_function.criterion.self_balance.weight.item()
