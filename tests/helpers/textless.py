"""A DINOv2 at toy size with random weights, alone, or with a classifier of ten classes."""

import timm
import torch
from torch import nn

from patchrank.models.clip import Clip

DIM, CLASSES = 32, 10


def create_textless(classifier=False, side=56, noise=0.2, **pruning):
    """Sixteen patches of 14 pixels, four layers; weights are large enough to tell images apart."""
    torch.manual_seed(0)
    shape = dict(img_size=side, embed_dim=DIM, depth=4, num_heads=2)
    tower = timm.create_model("patchrank_dinov2_s14", **shape, **{"locations": (2,)} | pruning)
    with torch.no_grad():
        for weight in tower.parameters():
            weight.add_(noise * torch.randn_like(weight))
    return Clip("toy", tower.eval(), None, classifier=nn.Linear(DIM, CLASSES) if classifier else None).eval()
