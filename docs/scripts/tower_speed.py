"""How fast models of others are once they are pruned in place: the second table of docs/towers.md.

Each model, with random weights, runs beside itself unpruned, in turns; counted is by multiply-accumulates.

python docs/scripts/tower_speed.py --threads 2
python docs/scripts/tower_speed.py --device cuda --dtype bf16 --batch-size 256 --repeats 20 --compile
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import timm
import torch
import transformers

import patchrank
from patchrank.benchmark.mode import DTYPES, Mode
from patchrank.utils.clock import device_seconds, in_turns
from patchrank.utils.command import run_command
from patchrank.utils.device import hardware

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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile makes one graph of each model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mode = Mode(args.device, args.dtype, args.compile)
    mode.check()
    about = hardware(args.device)
    print(f"{about['gpu'] or about['cpu']}, torch {about['torch']}, transformers {transformers.__version__}\n")
    print(
        "| model | ms an image | pruned | times as fast | counted | measured over counted |\n|---|--:|--:|--:|--:|--:|"
    )
    for name, create in MODELS.items():
        print(f"| {name} | {row(name, create(), mode, args.batch_size, args.repeats)} |", flush=True)


def row(name: str, whole: torch.nn.Module, mode: Mode, batch_size: int, repeats: int) -> str:
    """A model's entries in the table."""
    towers = {"whole": mode.place(whole), "pruned": patchrank.prune(copy.deepcopy(whole), **PRUNING)}
    inside = patchrank.find_tower(towers["pruned"])
    counted = inside.macs_unpruned().image / inside.macs().image
    with mode.running():
        images = mode.random(batch_size, 3, 224, 224)
        runs = {
            key: partial(device_seconds, mode.ready(f"{name}, {key}", mode.compiled(tower), images), images)
            for key, tower in towers.items()
        }
        found = in_turns(runs, repeats, 0, desc=name, quiet=False)
    ms = {key: 1000 * each.median / batch_size for key, each in found.items()}
    digits, gain = (1 if ms["whole"] > 10 else 4), ms["whole"] / ms["pruned"]
    return f"{ms['whole']:.{digits}f} | {ms['pruned']:.{digits}f} | {gain:.2f} | {counted:.2f} | {gain / counted:.2f}"


if __name__ == "__main__":
    run_command(main)
