"""What goes into a file: the pruned tower with its preparation of pixels and its class head, as one traced graph."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.nn.attention import SDPBackend, sdpa_kernel

from patchrank.layers.module_hooks import are_untouched, is_hooked
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError, one_line
from patchrank.utils.private_names import has_global_hooks

TRACED = 2  # images that a graph is traced with; torch.export takes 1 for a constant


class Pixels(nn.Module):
    """Images (B, H, W, 3), uint8, to what a tower takes: (B, 3, H, W), normalised.

    Args:
        mean, std: of each colour, of values in [0, 1].
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class ClassHead(nn.Module):
    """Unit vectors (B, E) to the probabilities (B, C) of classes.

    Args:
        vectors: (C, E), unit vectors of the classes.
        scale: what cosines are multiplied by before the softmax.
    """

    def __init__(self, vectors: Tensor, scale: float):
        super().__init__()
        self.register_buffer("vectors", vectors.clone())
        self.scale = scale

    def forward(self, embedding: Tensor) -> Tensor:
        return (self.scale * (embedding @ self.vectors.T)).softmax(dim=-1)


class OwnClasses(nn.Module):
    """Embeddings (B, E), as the tower gives them, to the probabilities (B, C) of a model's own classes."""

    def __init__(self, classifier: nn.Linear):
        super().__init__()
        self.classifier = classifier

    def forward(self, embedding: Tensor) -> Tensor:
        return self.classifier(embedding).softmax(dim=-1)


class ExportedTower(nn.Module):
    """A tower with its pruning, from images to all that a file gives.

    Args:
        clip: in evaluation mode. Its prompts and its pruning are those in force.
        head: of classes, where the file shall name some.
        uint8: whether images come as (B, H, W, 3), uint8, instead of (B, 3, H, W), normalised.
    """

    def __init__(self, clip: Clip, head: ClassHead | OwnClasses | None = None, uint8: bool = False):
        super().__init__()
        self.tower, self.classes = clip.visual, head
        cfg = self.tower.pretrained_cfg
        self.pixels = Pixels(tuple(cfg["mean"]), tuple(cfg["std"])) if uint8 else None

    @property
    def outputs(self) -> list[str]:
        """Names of what `forward` gives."""
        found = [] if self.classes is None else ["probabilities"]
        return [*found, "embedding", *([] if self.tower.pruner is None else ["kept"])]

    def example(self) -> Tensor:
        """Images to trace with."""
        height, width = self.tower.patch_embed.img_size
        if self.pixels is not None:
            return torch.zeros(TRACED, height, width, 3, dtype=torch.uint8)
        return torch.zeros(TRACED, 3, height, width)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Probabilities (B, C) where there are classes, embeddings (B, E) as unit vectors, and kept places (B, K)."""
        images = images if self.pixels is None else self.pixels(images)
        found = self.tower.forward_pruned(images, mapped=False)
        embedding = F.normalize(found.embedding, dim=-1)
        read = found.embedding if isinstance(self.classes, OwnClasses) else embedding
        outputs = [] if self.classes is None else [self.classes(read)]
        return (*outputs, embedding, *([] if self.tower.pruner is None else [found.kept]))


def check_exportable(tower: nn.Module, for_onnx: bool, classifier: nn.Module | None = None) -> None:
    """Refuses a tower, or a classifier behind it, that a file would not be true to.

    Raises:
        UserError: ranking by scores from outside, or by what ONNX cannot read; hooks; layers of others inside (LoRA,
            quantised, parametrised); another precision than float32; training mode.
    """
    reducer, name = getattr(tower.pruner, "reducer", None), tower.pruning.reducer
    needs = () if reducer is None else reducer.needs
    if "scores" in needs:
        raise UserError(f"reducer {name!r} ranks by scores from outside, which a file has not; try predictor")
    if for_onnx and "sample_key" in needs:
        raise UserError(f"reducer {name!r} reads the bits of pixels, which ONNX cannot; try --format pt2, or center")
    if has_global_hooks():
        raise UserError("hooks hang on all modules, which a file would not have; try to remove them")
    behind = [] if classifier is None else [("classifier", classifier)]
    for part, module in [*tower.named_modules(), *behind]:
        if _is_changed(tower, part, module):
            raise UserError(
                f"{part or 'the tower'} ({type(module).__name__}) has hooks or is a layer of another library (LoRA, "
                "quantised), which a file may not be true to; try to merge LoRA into the weights, or to remove hooks"
            )
    others = {str(each.dtype) for each in tower.parameters() if each.dtype is not torch.float32}
    if others or tower.training:
        what = f"has weights in {', '.join(sorted(others))}" if others else "is in training mode"
        raise UserError(f"the tower {what}; try tower{'.float()' if others else '.eval()'} before exporting")


def _is_changed(tower: nn.Module, part: str, module: nn.Module) -> bool:
    """Whether a module is hooked, or comes from elsewhere; predictors and reducers may be anybody's."""
    ours = type(module).__module__.startswith("patchrank.")
    if module is tower or ours or f"{part}.".startswith("pruner."):
        return is_hooked(module)
    return not are_untouched([module])


def in_products() -> AbstractContextManager[None]:
    """A block in which attention is made of products, as ONNX has it; the fused kernel lays out memory differently."""
    return sdpa_kernel(SDPBackend.MATH)


def trace(module: ExportedTower, for_onnx: bool) -> ExportedProgram:
    """The graph of a tower for any number of images, with constant numbers of tokens.

    For ONNX, attention is taken apart into products: `in_products`.

    Raises:
        UserError: a reducer or predictor of somebody's own that cannot be traced, or only with sizes that depend on
            what is in the images.
    """
    try:
        with torch.no_grad(), in_products() if for_onnx else nullcontext():
            program = export(module, (module.example(),), dynamic_shapes={"images": {0: Dim("batch", min=1)}})
        if len(program.range_constraints) > 1:  # beside the batch
            raise ValueError("values that it computes decide on sizes")
    except Exception as error:  # torch has many kinds for what cannot be traced
        if _is_all_ours(module):
            raise
        name = module.tower.pruning.reducer
        reason = one_line(error)[:200]
        raise UserError(f"reducer {name!r} cannot be traced to a graph of constant sizes ({reason})") from error
    for node in program.graph.nodes:  # files must not tell where somebody's code lies
        for key in ("stack_trace", "source_fn_stack"):
            node.meta.pop(key, None)
    return program


def _is_all_ours(module: ExportedTower) -> bool:
    pruner = module.tower.pruner
    parts = [] if pruner is None else pruner.modules()
    return all(type(part).__module__.startswith(("patchrank.", "torch.", "timm.")) for part in parts)
