"""Image towers of Hugging Face's transformers, pruned in place. transformers itself is not imported here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn

from patchrank.layers.pooling import reads_patches
from patchrank.models.hosts.repaired import End, Entering, FirstToken, InPlace, OfPooled
from patchrank.models.hosts.runner import Leads, Run, RunLayers, check_options
from patchrank.models.hosts.tower import HostedTower
from patchrank.models.hosts.transformers_tower import TransformersTower, create_tower, fill, is_changed
from patchrank.models.hosts.zero_rows import PooledRows, hang
from patchrank.utils.errors import UserError

KNOWN = {  # classes that hold the layers, by the name of their norm behind the last one
    "CLIPVisionModel": "post_layernorm",
    "CLIPVisionTransformer": "post_layernorm",  # inside CLIPVisionModel in 4.57
    "SiglipVisionModel": "post_layernorm",
    "SiglipVisionTransformer": "post_layernorm",
    "Dinov2Model": "layernorm",
    "Dinov2WithRegistersModel": "layernorm",
    "ViTModel": "layernorm",
}
WRAPPED = {  # larger models that read no patches of it, by the name of one of them inside
    "CLIPModel": "vision_model",
    "CLIPVisionModel": "vision_model",
    "CLIPVisionModelWithProjection": "vision_model",
    "SiglipModel": "vision_model",
    "SiglipVisionModel": "vision_model",
    "ViTForImageClassification": "vit",
}


def is_transformers(model: nn.Module) -> bool:
    """Whether a model comes from transformers."""
    return type(model).__module__.startswith("transformers.")


def find_core(model: nn.Module) -> nn.Module:
    """The part of a model that holds its image tower's layers. Raises `UserError` for a model that is not known."""
    core = inner(model)
    if type(core).__name__ in KNOWN and is_transformers(core):
        return core
    known = ", ".join([*KNOWN, *WRAPPED])
    raise UserError(f"patchrank.prune does not know {type(model).__name__} of transformers; it takes {known}")


def inner(model: nn.Module) -> nn.Module:
    """What has the layers, if the model is one of those that are known."""
    return getattr(model, WRAPPED.get(type(model).__name__, ""), model)


class RunEncoder(Leads, nn.Module):
    """Takes the place of an encoder: the same layers by the same names, with tokens leaving on the way.

    Args:
        encoder: the model's own, which runs while nothing is pruned.
    """

    def __init__(self, tower: TransformersTower, encoder: nn.Module):
        super().__init__()
        for name, child in encoder.named_children():
            self.add_module(name, child)
        self.held = (tower, encoder)  # in a tuple, so that they are no part of the model
        self.training = encoder.training

    def forward(self, *args: Tensor | None, **kwargs: object):
        """transformers' own kind of output, with `last_hidden_state` on the full grid or of the kept tokens."""
        tower, encoder = self.held
        if tower.pruner is None:
            return encoder(*args, **kwargs)
        tokens = [*args[:1], kwargs.pop("inputs_embeds", None), kwargs.pop("hidden_states", None)]
        check_options(tower.asked(kwargs), args[1:])
        (x,) = (each for each in tokens if each is not None)
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=Run(tower).whole(x))


class OwnForward(nn.Module):
    """Images (B, 3, H, W) to embeddings (B, E) by a model of transformers itself; nothing of ours runs.

    Args:
        tower: ours, of the model's very modules.
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        (self.core,), self.head = tower.original, tower.head
        resized = tower.patch_embed.img_size[0] != self.core.config.image_size
        takes = "interpolate_pos_encoding" in inspect.signature(self.core.forward).parameters
        self.how = {"interpolate_pos_encoding": True} if resized and takes else {}
        self.pools = not hasattr(self.core, "pooler")  # what a pooler adds is no part of an embedding

    def forward(self, images: Tensor) -> Tensor:
        out = self.core(images, **self.how)
        return self.head(out.pooler_output if self.pools else out.last_hidden_state[:, 0])


def attach(model: nn.Module, img_size: int | None) -> HostedTower:
    """Puts a tower of ours around the layers of an image tower of transformers.

    Args:
        img_size: side of the images in pixels that it will see; that of its config if left out.

    Raises:
        UserError: a model that is not known, or has parts that ours does not reproduce.
    """
    core = find_core(model)
    norm = KNOWN[type(core).__name__]
    tower = create_tower(core, norm, getattr(model, "visual_projection", None), img_size)
    name = "encoder" if hasattr(core, "encoder") else "layers"
    own = getattr(core, name)
    if is_changed(own):
        raise UserError(f"hooks on the {name} of {type(core).__name__} would not run; try to remove them first")
    setattr(core, name, (RunEncoder if name == "encoder" else RunLayers)(tower, own))
    pool = core.head.attention if reads_patches(tower) else None
    pooled = PooledRows(tower, "key_padding_mask", 1, inverted=True)
    tower.handles = hang(tower, getattr(core, norm), pool, pooled)
    tower.hooked = ((core, norm, getattr(core, norm)),)
    if pool is not None:
        tower.hooked += ((core.head, "attention", pool),)
    tower.end = end_of(tower, model, core)
    return tower


def end_of(tower: HostedTower, model: nn.Module, core: nn.Module) -> End | None:
    """Where a model's own call meets a repair: at its projection, classifier or pooler, or at its `pooler_output`."""
    if hasattr(model, "visual_projection"):
        return End(model, "visual_projection", before=[Entering(tower)], after=[InPlace(tower)])
    if hasattr(model, "classifier"):
        return End(model, "classifier", before=[Entering(tower, always=True)])
    if hasattr(core, "pooler"):
        return None if core.pooler is None else End(core, "pooler", before=[FirstToken(tower)])
    return End(core, after=[OfPooled(tower)])


def follow(tower: TransformersTower, model: nn.Module) -> None:
    """Brings a tower to what the model is now, whose head or weights may have been replaced."""
    core = inner(model)
    fill(tower, core, KNOWN[type(core).__name__], getattr(model, "visual_projection", None))


def runners(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """What `attach` put into a model: the module that has it, under which name, and itself."""
    core = inner(model)
    for name in ("encoder", "layers"):
        if isinstance(runner := getattr(core, name, None), (RunEncoder, RunLayers)):
            yield core, name, runner


def detach(model: nn.Module) -> None:
    """Gives the model its own encoder or list of layers again, with the layers that it has now."""
    for core, name, runner in list(runners(model)):
        tower, own = runner.held
        for key, child in runner.named_children():
            setattr(own, key, child)
        own.training = runner.training
        setattr(core, name, own)
        for handle in tower.handles:
            handle.remove()
        if tower.end is not None:
            tower.end.remove()
