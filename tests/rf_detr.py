"""A small RF-DETR at random, and batches for it. Its backbone is DINOv2-small, without pretrained weights."""

import copy
import os
from functools import cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is to be downloaded, and nothing looked for

import torch
from rfdetr.config import RFDETRNanoConfig, TrainConfig
from rfdetr.training import RFDETRModelModule
from rfdetr.utilities.tensors import NestedTensor

NUM_CLASSES, NUM_QUERIES, GROUPS, SIZE = 4, 12, 3, 64
SMALL = {
    **{"pretrain_weights": None, "resolution": SIZE, "positional_encoding_size": 4, "num_classes": NUM_CLASSES - 1},
    **{"num_queries": NUM_QUERIES, "num_select": NUM_QUERIES, "group_detr": GROUPS, "dec_layers": 2, "device": "cpu"},
    **{"hidden_dim": 64, "sa_nheads": 4, "ca_nheads": 4, "freeze_encoder": True},
}
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


def train_config(folder=".", **settings):
    given = {
        **{"dataset_dir": ".", "output_dir": str(folder), "accelerator": "cpu", "batch_size": 2, "num_workers": 0},
        **{"tensorboard": False, "grad_accum_steps": 1, "eval_backend": "faster_coco_eval", "progress_bar": None},
    }
    return TrainConfig(**{**given, **settings})


def model_config(**settings):
    return RFDETRNanoConfig(**{**SMALL, **settings})


@cache
def _built():
    torch.manual_seed(0)
    return RFDETRModelModule(model_config(), train_config())


def build():
    return copy.deepcopy(_built()).train()


def images_of(num_images, seed):
    """[B, 3, H, W] in [0, 1]."""
    return torch.rand(num_images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def batch(objects_per_image=(3, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for n in objects_per_image:
        centre, size = torch.rand(2, n, 2, generator=generator).unbind()
        boxes = torch.cat([0.3 + 0.4 * centre, 0.2 + 0.3 * size], 1)
        labels = torch.randint(NUM_CLASSES, (n,), generator=generator)
        targets.append({"boxes": boxes, "labels": labels, "orig_size": torch.tensor([SIZE, SIZE])})
    pixels = (images_of(len(targets), seed) - MEAN) / STD
    return NestedTensor(pixels, torch.zeros(len(targets), SIZE, SIZE, dtype=torch.bool)), targets


def run(module, data, seed=2):
    """Outputs and terms."""
    torch.manual_seed(seed)
    outputs = module.model(*data)
    return outputs, module.criterion(outputs, data[1])


def total(module, terms):
    weights = module.criterion.weight_dict
    return sum(value * weights[name] for name, value in terms.items() if name in weights)
