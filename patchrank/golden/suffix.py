"""Embeddings of many sequences that lack some of their images' tokens: the part of scoring that takes the time.

Shapes: B images, T tokens of a whole sequence (leading ones and patches), W windows, S sequences at a time, L their
length, E the embedding's width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchrank.layers.class_token import is_plain
from patchrank.layers.module_hooks import are_untouched, is_hooked
from patchrank.layers.shared_qkv import can_share, qkv_of, run_from_qkv
from patchrank.utils.errors import UserError, one_line

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Suffix:
    """A tower from a layer on, for the tokens (B, T, D) of some images as they enter it.

    What the layer makes of each token before its attention is computed once an image, not once a sequence.

    Args:
        batch_size: sequences that run at a time.
        compile: runs what `torch.compile` makes of the layers, one graph for each length of the sequences.
        autocast: the type that matrix products run in, a key of `AUTOCAST`; None for that of the weights.
        pre_logits: embeddings are what enters the tower's head, which is a classifier.
    """

    def __init__(
        self,
        tower: nn.Module,
        tokens: Tensor,
        layer: int,
        batch_size: int,
        compile: bool = False,
        autocast: str | None = None,
        pre_logits: bool = False,
    ):
        self.tower, self.tokens, self.layer, self.pre_logits = tower, tokens, layer, pre_logits
        self.batch_size, self.compile, self.autocast = batch_size, compile, autocast
        self.qkv = None
        if shares_qkv(tower, layer):
            with self._precision():
                self.qkv = torch.cat([qkv_of(tower.blocks[layer - 1], part) for part in tokens.split(batch_size)])

    def whole(self) -> Tensor:
        """Embeddings (B, E) of the images with all of their tokens."""
        rows = torch.arange(self.tokens[..., 0].numel(), device=self.tokens.device)
        return self._embeddings(rows.view(self.tokens.shape[:2]))

    def without(self, squares: Tensor, alive: Tensor) -> Tensor:
        """Embeddings (B, W, E) of what is alive (B, N) of every image without every window; 0 where a window is empty.

        Sequences of one length run together: windows that have partly left already remove fewer tokens.

        Args:
            squares: (W, window * window), the patches of each window.
        """
        member = torch.zeros(len(squares), alive.shape[1], dtype=torch.bool, device=alive.device)
        member.scatter_(1, squares, True)
        rest, touched = alive[:, None] & ~member, (alive[:, None] & member).any(-1)  # (B, W, N), (B, W)
        lengths = torch.where(touched, rest.sum(-1), -1)
        width = self.tower.embed_dim if self.pre_logits else self.tower.num_classes or self.tower.embed_dim
        out = self.tokens.new_zeros(*lengths.shape, width, dtype=torch.float32)
        for length in lengths.unique().tolist():
            if length >= 0:
                chosen = lengths == length
                out[chosen] = self._embeddings(self._rows(chosen.nonzero()[:, 0], rest[chosen]), self.compile)
        return out

    def _rows(self, images: Tensor, kept: Tensor) -> Tensor:
        """Rows (S, L), among the tokens of all images, of the leading ones and those kept (S, N) of images (S,)."""
        kept = F.pad(kept, (self.tower.num_leading_tokens, 0), value=True)
        return kept.nonzero()[:, 1].view(len(images), -1) + images[:, None] * self.tokens.shape[1]

    def _embeddings(self, rows: Tensor, compile: bool = False) -> Tensor:
        """Embeddings (S, E) of sequences of rows (S, L); compiled code sees as many sequences each time."""
        count = len(rows)
        if compile:
            rows = torch.cat([rows, rows[-1:].expand(-count % self.batch_size, -1)])
        run = functools.partial(self._embed, compiled() if compile else embed)
        parts = rows.split(self.batch_size)
        apart = not compile and rows.device.type == "cpu" and is_safe_in_threads(self.tower, self.layer)
        with self._precision():  # once around all batches, so that autocast converts weights once
            return torch.cat(in_threads(run, parts) if apart else [run(part) for part in parts])[:count].float()

    @torch.inference_mode()
    def _embed(self, run: Callable, rows: Tensor) -> Tensor:
        """Embeddings (S, E) of one batch of rows (S, L), in a thread of its own perhaps: modes are of one thread."""
        with self._precision():
            x, qkv = (None if tokens is None else _take(tokens, rows) for tokens in (self.tokens, self.qkv))
            return run(self.tower, self.layer, x, qkv, self.pre_logits)

    def _precision(self) -> AbstractContextManager:
        return (
            nullcontext() if self.autocast is None else torch.autocast(self.tokens.device.type, AUTOCAST[self.autocast])
        )


def shares_qkv(tower: nn.Module, layer: int) -> bool:
    """Whether queries, keys and values of a layer are made once an image.

    Not where prompts scale its norms, and not in the last layer, which computes the class token alone.
    """
    has_gains = getattr(tower.prompts, "norm_gains", None) is not None
    return layer < len(tower.blocks) and not has_gains and can_share(tower.blocks[layer - 1])


def is_safe_in_threads(tower: nn.Module, layer: int) -> bool:
    """Whether batches may run side by side: nothing of somebody else's, such as a hook, hangs on the tower."""
    of_others = [module for module in tower.modules() if not type(module).__module__.startswith("patchrank.")]
    untouched = are_untouched(of_others) and not any(is_hooked(module) for module in tower.modules())
    return untouched and all(is_plain(block) for block in tower.blocks[layer - 1 :])


def in_threads(run: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """What a function gives for each part, with as many parts side by side as torch may use threads on a CPU.

    Each part then has one thread for itself: its caches hold it, and no small operation waits for other threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(parts) == 1:
        return [run(part) for part in parts]
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(run, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # what its threads said holds for all that torch meets later


def embed(tower: nn.Module, layer: int, x: Tensor, qkv: Tensor | None, pre_logits: bool = False) -> Tensor:
    """Embeddings (S, E) of sequences x (S, L, D) that enter a layer; `qkv` (S, L, 3 D) are that layer's, if made."""
    if qkv is not None:
        x, layer = run_from_qkv(tower.blocks[layer - 1], x, qkv), layer + 1
    return tower.forward_suffix(x, layer, pre_logits=pre_logits)


@functools.cache
def compiled() -> Callable[[nn.Module, int, Tensor, Tensor | None, bool], Tensor]:
    """`embed`, compiled for each shape that it meets; torch keeps what it compiled for as long as the process lives.

    A call raises `UserError` where torch cannot compile, such as on a machine without a C++ compiler.
    """
    run = torch.compile(embed, dynamic=False)

    def embed_compiled(*args: object) -> Tensor:
        try:
            return run(*args)
        except RuntimeError as error:
            if not type(error).__module__.startswith("torch."):  # a layer's own, or memory that ran out
                raise
            reason = one_line(error).split(" Set TORCHDYNAMO")[0]  # torch goes on with advice for its own developers
            raise UserError(f"compile: torch cannot compile the layers here ({reason}); try to leave it out") from error

    return embed_compiled


def _take(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows (S, L) among the tokens (B, T, C) of all images, as (S, L, C)."""
    return tokens.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape, -1)
