"""How fast models of others are once they are pruned in place: the second table of docs/towers.md.

Each model, with random weights, runs beside itself unpruned, in turns; counted is by multiply-accumulates.

python docs/scripts/tower_speed.py --threads 2
"""

from __future__ import annotations

import argparse
import copy

import timm
import torch
import transformers

import patchrank
from patchrank.utils.clock import in_turns, seconds_of

PRUNING = dict(keep_rate=0.6, locations=(4,), reducer="center")
HF = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224)
MODELS = {
    "SigLIP B/16, timm": lambda: timm.create_model("vit_base_patch16_siglip_224", num_classes=0),
    "SigLIP B/16, transformers": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**HF, intermediate_size=3072, patch_size=16)
    ),
    "DINOv2 B/14, timm": lambda: timm.create_model("vit_base_patch14_dinov2", img_size=224),
    "DINOv2 B/14, transformers": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HF, patch_size=14)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = torch.randn(args.batch_size, 3, 224, 224)
    print(
        "| model | ms an image | pruned | times as fast | counted | measured over counted |\n|---|--:|--:|--:|--:|--:|"
    )
    for name, create in MODELS.items():
        whole = create().eval()
        pruned = patchrank.prune(copy.deepcopy(whole), **PRUNING)
        macs = patchrank.find_tower(pruned)
        counted = macs.macs_unpruned().image / macs.macs().image
        runs = {key: timed(model, images) for key, model in (("whole", whole), ("pruned", pruned))}
        found = in_turns(runs, args.repeats, 0, desc=name)
        ms = {key: 1000 * each.median / args.batch_size for key, each in found.items()}
        gain = ms["whole"] / ms["pruned"]
        cells = f"{ms['whole']:.1f} | {ms['pruned']:.1f} | {gain:.2f} | {counted:.2f} | {gain / counted:.2f}"
        print(f"| {name} | {cells} |", flush=True)


def timed(model: torch.nn.Module, images: torch.Tensor):
    @torch.inference_mode()
    def once() -> float:
        return seconds_of(model, images)

    return once


if __name__ == "__main__":
    main()
