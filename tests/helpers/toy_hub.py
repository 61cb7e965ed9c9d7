"""Folders of toy size as transformers writes them: config, weights, and for pairs a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.toy_hosts import DEPTH, DIM, HF, create
from PIL import Image
from torch import nn

WORDS = "a photo of cat dog on sofa seen from above , . the".split()
TEXT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=12
)
PAIRS = {"CLIPModel": "CLIPConfig", "SiglipModel": "SiglipConfig"}


def tokenizer():
    """A tokenizer of a few words, which ends every text as CLIP's and SigLIP's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: place for place, word in enumerate(["<pad>", "<unk>", *WORDS, "<end>"])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", vocabulary["<end>"])])
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<end>")
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=["input_ids"], **special)


def create_pair(name: str) -> nn.Module:
    """A random `CLIPModel` or `SiglipModel` in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    size = len(tokenizer())
    text = TEXT | {"vocab_size": size, "eos_token_id": size - 1, "bos_token_id": 0, "pad_token_id": 0}
    text |= {"projection_size": DIM} if name == "SiglipModel" else {}
    vision = HF | {"intermediate_size": 2 * DIM, "num_hidden_layers": DEPTH}
    size_of_both = {"projection_dim": 20} if name == "CLIPModel" else {}
    config = getattr(transformers, PAIRS[name])(text_config=text, vision_config=vision, **size_of_both)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def create_classifier() -> nn.Module:
    """A random `ViTForImageClassification` of five classes, in evaluation mode."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(**HF, intermediate_size=2 * DIM, num_labels=5)
    return transformers.ViTForImageClassification(config).eval()


def create_any(name: str) -> nn.Module:
    """One of the models that `hf:` takes, by its class."""
    if name in PAIRS:
        return create_pair(name)
    return create_classifier() if name == "ViTForImageClassification" else create(name)


def write(model: nn.Module, folder: Path) -> str:
    """Writes a model as transformers does, with the tokenizer of a pair and images of its own size; its name."""
    import transformers

    model.save_pretrained(folder)
    if type(model).__name__ in PAIRS:
        tokenizer().save_pretrained(folder)
    side = {"height": HF["image_size"], "width": HF["image_size"]}
    transformers.SiglipImageProcessor(size=side).save_pretrained(folder)
    return f"hf:{folder}"


def picture(width: int = 70, height: int = 50) -> Image.Image:
    """Smooth noise, of a shape that fits no tower; the same at each call."""
    noise = torch.rand(height // 4, width // 4, 3, generator=torch.Generator().manual_seed(2))
    small = Image.fromarray((255 * noise).byte().numpy())
    return small.resize((width, height), Image.Resampling.BICUBIC)
