"""Text towers of transformers' CLIP and SigLIP, with their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import AutoTokenizer

from patchrank.models.hugging_face.quiet import quiet
from patchrank.utils.errors import UserError, one_line

MAX_REASON = 200  # characters


class HubText(nn.Module):
    """The text tower of a `CLIPModel` or `SiglipModel`; it shares the model's modules.

    Attributes:
        context_length: how many tokens it takes, with start and end; texts are padded to it, as SigLIP needs.
        vocab_size, width, layers, mlp_ratio, output_dim: its shape.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.text_model, config = model.text_model, model.config.text_config
        self.text_projection = getattr(model, "text_projection", None)
        self.context_length, self.vocab_size = config.max_position_embeddings, config.vocab_size
        self.width, self.layers = config.hidden_size, config.num_hidden_layers
        self.mlp_ratio = config.intermediate_size / config.hidden_size
        last = self.text_projection if self.text_projection is not None else self.text_model.head
        self.output_dim = last.out_features

    @property
    def token_embedding(self) -> nn.Embedding:
        """What makes tokens of ids."""
        return self.text_model.embeddings.token_embedding

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings (T, E) of token ids (T, L), not normalised: the model's `get_text_features`."""
        pooled = self.text_model(input_ids=tokens).pooler_output
        return pooled if self.text_projection is None else self.text_projection(pooled)


def create_tokenizer(folder: Path, context_length: int, source: str) -> Callable[[Sequence[str]], Tensor]:
    """The tokenizer in a folder: texts to token ids (T, L), padded and cut to the length that the tower takes.

    Raises:
        UserError: there is none, or its package is missing.
    """
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its libraries' own kinds
        says = f"its tokenizer cannot be had ({one_line(error)[:MAX_REASON]})"
        raise UserError(f"{source}: {says}; try a folder with a tokenizer.json") from error
    how = {"padding": "max_length", "truncation": True, "max_length": context_length, "return_tensors": "pt"}

    def tokenize(texts: Sequence[str]) -> Tensor:
        return tokenizer([texts] if isinstance(texts, str) else list(texts), **how).input_ids

    return tokenize
