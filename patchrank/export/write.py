"""Writes the file: traces a pair's image tower as it stands, and says in the file what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from patchrank.export import onnx_format, program_file
from patchrank.export.description import describe
from patchrank.export.metadata import KEY, format_of
from patchrank.export.program import ClassHead, ExportedTower, OwnClasses, check_exportable, trace
from patchrank.export.towers import pair_of
from patchrank.io import check_writable, resolve, write_atomic
from patchrank.models import text as clip_text
from patchrank.models.captions import check_classes, check_templates, fill
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError, one_line
from patchrank.utils.progress import progress

TEMPLATES = ("a photo of a {}.",)


def export_tower(
    model: Clip | nn.Module,
    path: str | Path,
    classes: Sequence[str] = (),
    templates: Sequence[str] = TEMPLATES,
    uint8: bool = False,
    int8: str | Path | None = None,
    quiet: bool = True,
) -> dict:
    """Writes the image tower of a pair, with the pruning, prompts and repair in force, as one file.

    Args:
        model: of `create_clip`, or one of our towers of `timm.create_model`, which has no text for classes.
        path: ends in `.onnx` or `.pt2`, which is the format.
        classes: names; the file then gives their probabilities beside embeddings. A model with a classifier and no text
            tower gives those of its own classes in any case; names are for these, and numbers where nobody knows any.
        templates: sentences with `{}` for a name; not read where prompts have learned text, nor by a classifier.
        uint8: whether the file takes images (B, H, W, 3) in uint8, instead of normalised ones (B, 3, H, W).
        int8: where the same in int8 is written too; of ONNX alone.
        quiet: show no progress.

    Returns:
        The metadata.

    Raises:
        UserError: a tower that a file would not be true to, a place that cannot be written, a caption that is too long
            for the text tower, more or fewer names than a classifier has classes, a format or an operator that does not
            go together with it.
    """
    clip, format = pair_of(model), format_of(path)
    check_places(path, int8)
    check_exportable(clip.visual, format == "onnx", clip.classifier)
    if format == "onnx":
        onnx_format.check_installed()
    head = None
    if has_own_classes(clip):
        head, classes, templates = OwnClasses(clip.classifier), own_names(clip, classes), ()
    elif classes:
        classes, templates = check_classes(classes), check_templates(templates)
        head = create_head(clip, classes, templates)
    module = ExportedTower(clip, head, uint8).eval()
    about = describe(clip, module, format, classes, [] if has_learned_text(clip) or not classes else templates)
    files = {}
    with progress(total=2 + (int8 is not None), desc="export", unit="step", delay=0, disable=quiet) as bar:
        program = trace(module, format == "onnx")
        bar.update()
        reducer = clip.visual.pruning.reducer
        for place, content in _contents(program, about, path, int8, reducer):
            files[place] = content
            bar.update()
    for place, content in files.items():  # once all is made, so that none is left without the other
        write_atomic(place, content)
    return about


def _contents(
    program: ExportedProgram, about: dict, path: str | Path, int8: str | Path | None, reducer: str
) -> Iterator[tuple[str | Path, bytes]]:
    """Each file's place and bytes. Adds to the metadata of an ONNX file what it chooses by."""
    if about["format"] == "pt2":
        yield path, program_file.save(program, json.dumps(about))
        return
    model = onnx_format.to_onnx(program, about["outputs"], reducer)
    about["choices"] = onnx_format.choices_of(model)
    yield path, onnx_format.finished(model, {KEY: json.dumps(about)})
    if int8 is not None:
        smaller = onnx_format.to_int8(model)
        yield int8, onnx_format.finished(smaller, {KEY: json.dumps(about | {"precision": "int8"})})


def check_places(path: str | Path, int8: str | Path | None) -> None:
    """Refuses places that cannot be written, before anything is computed."""
    if int8 is not None and (format_of(path), format_of(int8)) != ("onnx", "onnx"):
        raise UserError(f"--int8 {int8}: is of ONNX alone; try --out FILE.onnx --int8 FILE.int8.onnx")
    if int8 is not None and resolve(path) == resolve(int8):
        raise UserError(f"--int8 {int8}: is where the file in float32 goes; try another name")
    for place in (path, int8):
        if place is not None:
            _check_place(resolve(place))


def _check_place(place: str) -> None:
    if os.path.isdir(place):
        raise UserError(f"cannot write {place}: it is a folder; try a file in it")
    try:
        check_writable(os.path.dirname(place))
        os.path.getsize(place)  # raises for a name that no file can have
    except FileNotFoundError:
        return
    except (UserError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"cannot write {place} ({reason}); try another folder or name") from error


def create_head(clip: Clip, classes: Sequence[str], templates: Sequence[str]) -> ClassHead:
    """The class head of a pair.

    Raises:
        UserError: there is no text tower, or a caption that it would cut.
    """
    if not clip.has_text:
        raise UserError(f"classes need a text tower or a classifier, which {clip.name} has not; try it without classes")
    captions = [text for template in templates for text in fill(template, classes)]
    may_cut = not has_learned_text(clip) and clip.tokenizer is None
    if may_cut and (cut := clip_text.too_long(captions, clip.context_length)):
        raise UserError(
            f"{len(cut)} of {len(captions)} captions are longer than the {clip.context_length} tokens of the text "
            f"tower, such as {cut[0][:80]!r}; try shorter names or templates"
        )
    return ClassHead(clip.zero_shot_head(classes, templates), float(clip.logit_scale.detach().exp()))


def own_names(clip: Clip, given: Sequence[str]) -> Sequence[str]:
    """What a classifier's classes are called: as given, as the model says, or by their numbers.

    Raises:
        UserError: more or fewer are given than there are.
    """
    count = clip.classifier.out_features
    if given and len(given) != count:
        raise UserError(
            f"{len(given)} classes are named, but the classifier of {clip.name} has {count}; name all or none"
        )
    return check_classes(given) if given else clip.class_names or tuple(map(str, range(count)))


def has_own_classes(clip: Clip) -> bool:
    """Whether a model answers by a classifier of its own, since it has no text."""
    return not clip.has_text and clip.classifier is not None


def has_learned_text(clip: Clip) -> bool:
    """Whether learned tokens stand in the place of templates."""
    return clip.prompts is not None and clip.prompts.inserts_text
