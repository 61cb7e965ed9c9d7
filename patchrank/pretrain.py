"""Pre-trains the embedded CLIP pair contrastively on digit scenes; how the shipped weights were made.

    python -m patchrank.pretrain --out runs/pretrain

Resumable: running again continues from the last checkpoint, and batch t depends on the seed and t alone. A curriculum
(large digits on black first, then smaller ones on photographs) comes first; training without it was not tried.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from patchrank.cli.config_flags import add_config_flags, positive, positive_float
from patchrank.config import DEFAULTS, TrialConfig
from patchrank.data.dataset_factory import load_split
from patchrank.data.digits.captions import draw_template
from patchrank.data.digits.scenes import CLASSES, UNSEEN_TEMPLATE, DigitScenes, SceneStyle, split_digits
from patchrank.data.image_split import ImageSplit
from patchrank.io import check_writable, write_atomic
from patchrank.io.tensor_file import read_tensors, write_tensors
from patchrank.models.clip import Clip, create_clip
from patchrank.models.embed import evaluate
from patchrank.utils.command import create_parser, run_command
from patchrank.utils.errors import UserError
from patchrank.utils.metrics import percent
from patchrank.utils.progress import progress

KIND = "pre-training"  # of checkpoint files
STEPS = 11_430
BATCH_SIZE = 64
LR = 1e-3
CURRICULUM_STEPS = 2500
WARMUP_STEPS = 300
DECAY_SHARE = 0.3  # of all steps, at the end, over which the rate falls linearly to 0


class CurriculumBatches(Dataset):
    """Item t is the batch of step t: images (64, 3, 64, 64) in [0, 1] as uint8, labels, and one caption template."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.scenes = DigitScenes("pretrain", scenes=1, seed=seed)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, str]:
        rng = np.random.default_rng([self.seed, 77, step])
        picks = rng.integers(len(self.scenes.digits), size=BATCH_SIZE)
        style = [scene_style(min(1.0, step / CURRICULUM_STEPS), rng) for _ in picks]
        numbers = rng.integers(2**31, size=BATCH_SIZE)
        images = [self.scenes.draw(self.scenes.digits[p], n, s) for p, n, s in zip(picks, numbers, style)]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return pixels.permute(0, 3, 1, 2), torch.from_numpy(self.scenes.labels[picks]), draw_template(rng)


def as_arrays(batch: tuple[Tensor, Tensor, str]) -> tuple[np.ndarray, np.ndarray, str]:
    """A batch as it travels from one process to another.

    Tensors would travel through a socket in TMPDIR, whose path may be too long for one, and then nothing ever arrives.
    """
    pixels, labels, template = batch
    return pixels.numpy(), labels.numpy(), template


def scene_style(difficulty: float, rng: np.random.Generator) -> SceneStyle:
    """Three scenes in four have digits of the task's size once the curriculum is over, the fourth larger ones."""
    low = 0.9 - 0.6 * difficulty
    scale = (low, max(0.6, low + 0.1)) if rng.random() < 0.75 else (max(0.6, low), 1.0)
    return SceneStyle(scale=scale, background=difficulty * rng.uniform(0.7, 1.0), tilt=12.0)


def clip_init_(tower: nn.Module) -> None:
    """CLIP's own initial scales, which follow the width, where timm's 0.02 does not; the two were not compared."""
    width, depth = tower.embed_dim, len(tower.blocks)
    nn.init.normal_(tower.cls_token, std=width**-0.5)
    nn.init.normal_(tower.pos_embed, std=width**-0.5)
    nn.init.normal_(tower.patch_embed.proj.weight, std=tower.patch_embed.proj.weight[0].numel() ** -0.5)
    for block in tower.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
    nn.init.normal_(tower.head.weight, std=width**-0.5)
    tower.head.bias.requires_grad_(False)  # CLIP's projection has none; timm's head keeps a zero


def contrastive_loss(clip: Clip, pixels: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric InfoNCE over a batch's images and the distinct captions; identical captions count as positives.

    Args:
        pixels: (B, 3, H, W), from 0 to 255.
        labels: (B,), the place of each image's own caption.
        tokens: (captions, 77).
    """
    images = clip.encode_image(clip.normalize(pixels.float() / 255))
    texts = F.normalize(clip.text(tokens), dim=-1)
    logits = clip.logit_scale.exp().clamp(max=100) * images @ texts.T  # (B, captions)
    positives = F.one_hot(labels, len(tokens)).T.to(logits.dtype)
    counts = positives.sum(1)
    to_images = -(positives * logits.T.log_softmax(1)).sum(1) / counts.clamp(min=1)
    return (F.cross_entropy(logits, labels) + to_images.sum() / (counts > 0).sum()) / 2


def create_optimizer(clip: Clip, lr: float) -> torch.optim.AdamW:
    params = [p for p in clip.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2 and p.shape[0] < 10_000], "weight_decay": 0.05},
        {"params": [p for p in params if p.ndim < 2 or p.shape[0] >= 10_000], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(out: Path, steps: int = STEPS, lr: float = LR, seed: int = DEFAULTS.seed, every: int = 500) -> Clip:
    """Trains (or goes on training) the pair in `out`, and returns it. Writes `last.safetensors` and `log.jsonl`."""
    torch.manual_seed(seed)
    clip = create_clip("patchrank_clip_digits", pretrained=False).train()
    clip_init_(clip.visual)
    optimizer, val = create_optimizer(clip, lr), load_split("digits", "val", 2 * len(split_digits("val")))
    start = load_checkpoint(out / "last.safetensors", clip, optimizer)
    batches = CurriculumBatches(seed)
    how = {"num_workers": 1, "prefetch_factor": 4, "collate_fn": as_arrays}
    loader = DataLoader(batches, batch_size=None, sampler=range(start, steps), **how)
    bar = progress(loader, initial=start, total=steps, desc="pretrain", unit="step")
    for step, (pixels, labels, template) in enumerate(bar, start + 1):
        # warm-up, plateau, linear decay: a plateau lets a later call train for longer
        share = min(1.0, step / WARMUP_STEPS, (steps - step + 1) / (DECAY_SHARE * steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        tokens = clip.tokenize([template.format(name) for name in CLASSES])
        loss = contrastive_loss(clip, torch.from_numpy(pixels), torch.from_numpy(labels), tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        if step % every == 0 or step == steps:
            row = {"step": step, "loss": round(loss.item(), 4), "val": round(accuracy(clip, val), 2)}
            bar.set_postfix(row)
            save_checkpoint(out / "last.safetensors", clip, optimizer, step)
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
    return clip.eval()


def accuracy(clip: Clip, split: ImageSplit) -> float:
    """Zero-shot accuracy in percent; afterwards the pair is in training mode."""
    found = evaluate(clip.eval(), split, batch_size=256, quiet=True)
    clip.train()
    return percent(found.right())


def save_checkpoint(path: Path, clip: Clip, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Weights and Adam's moments in one file of tensors, whole or not at all."""
    tensors = {f"model.{k}": v for k, v in clip.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
    write_tensors(path, KIND, tensors, {"step": step})


def load_checkpoint(path: Path, clip: Clip, optimizer: torch.optim.Optimizer) -> int:
    """Restores what `save_checkpoint` wrote, if there is any; returns the number of steps done."""
    if not path.exists():
        return 0
    tensors, about = read_tensors(path, KIND, ("step",))
    clip.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optim."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["step"]


def main(argv: list[str] | None = None) -> None:
    parser = create_parser("pretrain", __doc__)
    parser.add_argument("--out", default="runs/pretrain", help="local folder of checkpoint, log and weights")
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"batches in all (default: {STEPS})")
    parser.add_argument("--lr", type=positive_float, default=LR, help=f"learning rate at its highest (default: {LR})")
    add_config_flags(parser, TrialConfig, "seed")
    args = parser.parse_args(argv)
    if "://" in args.out:
        raise UserError(f"--out {args.out}: checkpoints are kept in a local folder; try runs/pretrain")
    check_writable(args.out)  # better now than after the first steps
    out = Path(args.out)
    clip = train(out, args.steps, args.lr, args.seed)
    shipped = {key: value.half().contiguous() for key, value in clip.state_dict().items()}
    write_atomic(out / "patchrank_clip_digits.safetensors", save(shipped))
    for split in ("val", "test"):
        seen, unseen = (accuracy(clip, load_split("digits", split, templates=t)) for t in (None, (UNSEEN_TEMPLATE,)))
        print(f"{split}: {seen:.2f} % with the task's templates, {unseen:.2f} % with an unseen one")


if __name__ == "__main__":
    run_command(main)
