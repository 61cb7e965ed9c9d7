"""Writes the file: traces a pair's image tower as it stands, and says in the file what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from patchrank.export import onnx_format, program_file
from patchrank.export.description import describe
from patchrank.export.metadata import KEY, format_of
from patchrank.export.program import ClassHead, ExportedTower, check_exportable, trace
from patchrank.io import check_writable, resolve, write_atomic
from patchrank.models import text as clip_text
from patchrank.models.captions import check_classes, check_templates, fill
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError

TEMPLATES = ("a photo of a {}.",)


def export_tower(
    clip: Clip,
    path: str | Path,
    classes: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
    uint8: bool = False,
    int8: str | Path | None = None,
) -> dict:
    """Writes the image tower of a pair, with the pruning, prompts and repair in force, as one file.

    Args:
        path: ends in `.onnx` or `.pt2`, which is the format.
        classes: names; the file then gives their probabilities beside embeddings.
        templates: sentences with `{}` for a name; not read where prompts have learned text.
        uint8: whether the file takes images (B, H, W, 3) in uint8, instead of normalised ones (B, 3, H, W).
        int8: where the same in int8 is written too; of ONNX alone.

    Returns:
        The metadata.

    Raises:
        UserError: a tower that a file would not be true to, a place that cannot be written, a caption that is too long
            for the text tower, a format or an operator that does not go together with it.
    """
    format = format_of(path)
    check_places(path, int8)
    check_exportable(clip.visual, format == "onnx")
    if format == "onnx":
        onnx_format.check_installed()
    head = None
    if classes:
        classes, templates = check_classes(classes), check_templates(templates)
        head = create_head(clip, classes, templates)
    module = ExportedTower(clip, head, uint8).eval()
    about = describe(clip, module, format, classes, [] if has_learned_text(clip) or not classes else templates)
    program = trace(module, format == "onnx")
    if format == "pt2":
        write_atomic(path, program_file.save(program, json.dumps(about)))
        return about
    model = onnx_format.to_onnx(program, module.outputs, clip.visual.pruning.reducer)
    about |= {"choices": onnx_format.choices_of(model)}
    files = {path: onnx_format.finished(model, {KEY: json.dumps(about)})}
    if int8 is not None:
        smaller = onnx_format.to_int8(model)
        files[int8] = onnx_format.finished(smaller, {KEY: json.dumps(about | {"precision": "int8"})})
    for place, content in files.items():  # once all is made, so that none is left without the other
        write_atomic(place, content)
    return about


def check_places(path: str | Path, int8: str | Path | None) -> None:
    """Refuses places that cannot be written, before anything is computed."""
    if int8 is not None and (format_of(path), format_of(int8)) != ("onnx", "onnx"):
        raise UserError(f"--int8 {int8}: is of ONNX alone; try --out FILE.onnx --int8 FILE.int8.onnx")
    if int8 is not None and resolve(path) == resolve(int8):
        raise UserError(f"--int8 {int8}: is where the file in float32 goes; try another name")
    for place in (path, int8):
        if place is not None:
            if os.path.isdir(place):
                raise UserError(f"cannot write {place}: it is a folder; try a file in it")
            check_writable(os.path.dirname(resolve(place)))


def create_head(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> ClassHead:
    """The class head of a pair. Raises `UserError` for a caption that the text tower would cut."""
    captions = [text for template in templates for text in fill(template, classes)]
    may_cut = not has_learned_text(clip) and clip.tokenizer is None
    if may_cut and (cut := clip_text.too_long(captions, clip.context_length)):
        raise UserError(
            f"{len(cut)} of {len(captions)} captions are longer than the {clip.context_length} tokens of the text "
            f"tower, such as {cut[0][:80]!r}; try shorter names or templates"
        )
    return ClassHead(clip.zero_shot_head(classes, templates), float(clip.logit_scale.detach().exp()))


def has_learned_text(clip: Clip) -> bool:
    """Whether learned tokens stand in the place of templates."""
    return clip.prompts is not None and clip.prompts.inserts_text
