"""What pruning does to a tower that is read by the mean of its patches: the table of docs/towers.md.

A CLIP's image tower is read by average pooling over its patches in place of the class token, and its projection is
solved anew on training images, towards the embeddings that it had. Then every method keeps to a budget. Its schedule is
the best of six on validation images; test images are read once for the table.

python docs/scripts/average_pooling.py --model open_clip:clip.json --checkpoint clip.safetensors \\
    --data-root images --vocabulary names.yaml
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
import torch.nn.functional as F

from patchrank.data.dataset_factory import load_split
from patchrank.fit import fit_predictor
from patchrank.golden.dataset import Ranked
from patchrank.golden.scores import score_images
from patchrank.layers.pooling import summary
from patchrank.layers.repair import fit_projection, own_projection
from patchrank.models.clip import create_clip
from patchrank.models.embed import split_batches
from patchrank.utils.progress import progress
from patchrank.utils.stats import cluster_bootstrap

BUDGETS = (0.65, 0.47)
SCHEDULES = (
    {"locations": (4,), "taper": 1.0},
    {"locations": (4, 6, 8, 10), "taper": 0.75},
    {"locations": (4, 5, 6), "taper": 0.75},
    {"locations": (3, 4, 5, 6, 7), "taper": 0.6},
    {"locations": (2, 3, 4, 5, 6), "taper": 0.6},
    {"locations": (2, 3, 4, 5, 6, 7, 8, 9, 10, 11), "taper": 0.8},
)
RANKING = ("random", "center", "pixel_variance", "mlp_shift", "cls_attention", "prior", "predictor")
MERGING = ("tome", "feature_merge", "guided_merge", "rank_merge", "attention_merge")
FITTED = ("prior", "predictor", "guided_merge", "rank_merge")
SCORED = 256  # training images with golden scores
PLAIN = {"leftovers": None, "drop_share": 0.0, "protection": None, "predictor_init": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--model", "--checkpoint", "--data-root", "--vocabulary"):
        parser.add_argument(flag, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    clip = create_clip(args.model, checkpoint=args.checkpoint)
    splits = {name: load_split("wds", name, None, args.data_root, args.vocabulary) for name in ("train", "val", "test")}
    images = {name: torch.cat([batch for batch, _ in split_batches(clip, split)]) for name, split in splits.items()}
    tower = clip.visual
    read_by_average(tower, images["train"])
    predictors = fitted(tower, images["train"][:SCORED])
    whole = {name: embedded(tower, images[name], whole=True) for name in ("val", "test")}
    rows = []
    methods = [(name, how) for name in RANKING for how in ("drop", "merge")] + [(name, None) for name in MERGING]
    for name, how in progress(methods, desc="methods", unit="method"):
        for budget in BUDGETS:
            rows.append(best(tower, name, how, budget, predictors, images, whole))
            print(rows[-1], file=sys.stderr)
    print(table(rows))


@torch.inference_mode()
def read_by_average(tower: torch.nn.Module, images: torch.Tensor) -> None:
    """Makes a tower that is read by its class token one that is read by the mean of its patches."""
    targets = embedded(tower, images, whole=True, unit=False)
    tower.global_pool = "avg"
    parts = [tower.forward_suffix(tower.forward_prefix(part, 1), 1, pre_logits=True) for part in images.split(250)]
    solved = fit_projection(torch.cat(parts), targets, *own_projection(tower.head, tower.embed_dim))
    tower.head.weight.copy_(solved.weight)
    tower.head.bias.copy_(solved.bias)
    print(f"refitted: 1 - cosine {solved.drift_after:.4f} on a held-out fifth", file=sys.stderr)


@torch.inference_mode()
def embedded(tower: torch.nn.Module, images: torch.Tensor, whole: bool = False, unit: bool = True) -> torch.Tensor:
    found = torch.cat([tower.forward_whole(part) if whole else tower(part) for part in images.split(250)])
    return F.normalize(found, dim=-1) if unit else found


def fitted(tower: torch.nn.Module, images: torch.Tensor) -> dict[tuple[str, int], torch.nn.Module]:
    """A predictor and a prior for each first location."""
    scores = torch.cat([score_images(tower, part, metrics=("preservation",)).scores[:, 0] for part in images.split(32)])
    found = {}
    for location in sorted({schedule["locations"][0] for schedule in SCHEDULES}):
        with torch.no_grad():
            x = torch.cat([tower.forward_prefix(part, location) for part in images.split(128)])
        first = tower.num_leading_tokens
        data = Ranked(summary(x, first, tower.has_class_token), x[:, first:], scores.float())
        for name, kind in (("prior", "prior"), ("predictor", "mix_mlp")):
            found[name, location] = fit_predictor(data, tower.patch_embed.grid_size, kind, quiet=True)
    return found


def best(tower, name: str, how: str | None, budget: float, predictors, images, whole) -> dict:
    """A method at its best schedule by validation images, and its drift on test images with a 95 % interval."""
    tried = {}
    for place, schedule in enumerate(SCHEDULES):
        location, settings = schedule["locations"][0], PLAIN | schedule | {"reducer": name, "budget": budget}
        if name in FITTED:
            settings["predictor"] = predictors["prior" if name == "prior" else "predictor", location]
        try:
            tower.set_pruning(**settings | {"leftovers": how})
        except ValueError as error:
            print(f"{name} {schedule}: {error}", file=sys.stderr)
            continue
        tried[place] = float(drift(tower, images["val"], whole["val"]).mean()), settings | {"leftovers": how}
    place = min(tried, key=lambda key: tried[key][0])
    tower.set_pruning(**tried[place][1])
    values = drift(tower, images["test"], whole["test"])
    draws = cluster_bootstrap(values, np.arange(len(values)))
    low, high = np.quantile(draws, (0.025, 0.975))
    row = {"method": name, "how": how or "merge", "budget": budget, "locations": SCHEDULES[place]["locations"]}
    return row | {"drift": float(values.mean()), "low": float(low), "high": float(high)}


def drift(tower, images: torch.Tensor, whole: torch.Tensor) -> np.ndarray:
    """1000 (1 - cosine) to the unpruned tower, of each image."""
    return 1000 * (1 - (embedded(tower, images).double() * whole.double()).sum(-1)).numpy()


def table(rows: list[dict]) -> str:
    lines = ["| method | the rest | " + " | ".join(f"{100 * budget:.0f} % of the MACs" for budget in BUDGETS) + " |"]
    lines.append("|---|---|" + "--:|" * len(BUDGETS))
    for name, how in dict.fromkeys((row["method"], row["how"]) for row in rows):
        cells = [row for row in rows if (row["method"], row["how"]) == (name, how)]
        said = [f"{row['drift']:.1f} [{row['low']:.1f}, {row['high']:.1f}]" for row in cells]
        lines.append(f"| `{name}` | {'merges' if how == 'merge' else 'is dropped'} | " + " | ".join(said) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
