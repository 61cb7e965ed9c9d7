"""The oracle of what hangs on modules: every block whole, ranked by the matrices that the softmax of attention gave."""

import timm
import torch
from torch import nn

LATE = {2: 20, 3: 12}  # class attention is read in layers 1 and 2, and layer 3 needs its class token alone
EARLY = {1: 20, 3: 12}  # class attention of layer 1 is asked for before it runs


def create_tiny(drops=LATE, **settings):
    torch.manual_seed(0)
    shape = {"depth": 3, "embed_dim": 32, "num_heads": 2, "reducer": "cls_attention"}
    shape |= {"locations": tuple(drops), "drop_counts": tuple(drops.values())}
    tower = timm.create_model("patchrank_clip_digits", **shape | settings).eval()
    for name, parameter in tower.named_parameters():
        if name.endswith("qkv.weight"):
            nn.init.normal_(parameter, std=0.3)  # sharp attention, so that rankings have no ties
    return tower


def attend(block, x):
    """`block(x)` and its class token's row (B, L), from the matrix that the softmax handed to dropout."""
    seen, attn = [], block.attn
    handle = attn.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attn.fused_attn = False
    x = block(x)
    attn.fused_attn = True
    handle.remove()
    return x, seen[0].mean(1)[:, 0]


def by_modules(tower, images, drops=LATE):
    """The oracle: embeddings (B, E) by calls of whole modules."""
    x = tower.embed(images)
    with torch.no_grad():
        row = attend(tower.blocks[0], x)[1] if 1 in drops else None
    for layer, block in enumerate(tower.blocks, 1):
        if layer in drops:
            kept = row[:, 1:].topk(row.shape[1] - 1 - drops[layer]).indices.sort(dim=1).values
            x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))], dim=1)
        x, row = attend(block, x)
    return tower.forward_head(tower.norm(x))


def assert_as_by_modules(make_hung, images, drops=LATE):
    """Compares a tower that something hangs on with the oracle, each on a tower of its own; gives the first."""
    tower, other = make_hung(), make_hung()
    found, expected = tower(images), by_modules(other, images, drops)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    return tower
