"""The picture: an image a group of columns, a keep rate a column, a ranker a row; frames say whether the answer stays.

All places are in inches from the top left corner, and an inch is as many dots as a tile, so that no pixel is resampled.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np

from patchrank.golden.scores import METRICS
from patchrank.layers.reducers import REDUCERS
from patchrank.models.clip import Clip
from patchrank.utils.errors import UserError
from patchrank.utils.veil import MERGED, draw_left
from patchrank.visualize.pictures import Pictures
from patchrank.visualize.rankings import KEEP_RATES, Kept, Rankings, default_rankers, rank_pictures

STAYS, CHANGES, QUIET = "#1a7f37", "#cf222e", "#57606a"
MAX_COLUMNS, MAX_TILES = 12, 1000  # tiles side by side before groups go on below; tiles in all
LABELS, GAP, PAD = 1.3, 0.08, 0.12  # width of the rankers' names; between tiles; around it all
ROW, LINE, ABOVE = 1.26, 0.17, 0.3  # height of a row of tiles with its answers, of a line of text, of the keep rates
MIN_WIDTH, MIN_TILE = 5.5, 128


class Sheet:
    """A figure on which tiles, frames and text are put by inches from the top left corner; a tile is 1 inch."""

    def __init__(self, width: float, height: float, tile: int):
        from matplotlib.figure import Figure
        from matplotlib.transforms import IdentityTransform

        self.tile, self.tall, self.plain = tile, round(height * tile), IdentityTransform()
        self.figure = Figure(figsize=(round(width * tile) / tile, self.tall / tile), dpi=tile, facecolor="white")

    def picture(self, x: float, y: float, pixels: np.ndarray, frame: str | None = None) -> None:
        """A tile, with a frame of a colour where one is given."""
        from matplotlib.patches import Rectangle

        corner, scale = (round(x * self.tile), self.tall - round(y * self.tile) - self.tile), self.tile // len(pixels)
        self.figure.figimage(pixels.repeat(scale, axis=0).repeat(scale, axis=1), *corner)
        if frame:
            style = {"fill": False, "edgecolor": frame, "linewidth": 2.0, "transform": self.plain}
            self.figure.add_artist(Rectangle(corner, self.tile, self.tile, **style))

    def text(self, x: float, y: float, text: str, size: float = 8.0, **style) -> None:
        style = {"ha": "center", "va": "baseline", "linespacing": 1.25, **style}
        style |= {"transform": self.plain, "parse_math": False}  # file names may hold dollars
        self.figure.text(x * self.tile, self.tall - y * self.tile, text, fontsize=size, **style)

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=self.tile)
        return buffer.getvalue()


def draw_rankings(clip: Clip, pictures: Pictures, rankers: Sequence[str] | None = None, **settings) -> bytes:
    """What rankers keep of images and whether the answer survives, as PNG; a notebook shows it with `Image(data=...)`.

    Args:
        rankers: rows, from the top; None for those of figures 3 and 4.
        **settings: of `rank_pictures`: keep rates, locations, golden scores, seed, what becomes of the others.

    Raises:
        UserError: as `rank_pictures`, or more tiles than one picture should hold.
    """
    rankers = default_rankers(clip, pictures) if rankers is None else list(dict.fromkeys(rankers))
    check_size(len(pictures.images), len(settings.get("keep_rates", KEEP_RATES)), len(rankers))
    return draw(rank_pictures(clip, pictures, rankers, **settings)).png()


def check_size(images: int, keep_rates: int, rankers: int) -> None:
    tiles = images * (1 + keep_rates * rankers)
    if not images * keep_rates * rankers or tiles > MAX_TILES:
        raise UserError(
            f"a picture holds 1 to {MAX_TILES} tiles, but {images} images, {keep_rates} keep rates and {rankers} "
            f"rankers make {tiles}"
        )


def draw(rankings: Rankings) -> Sheet:
    """Lays out groups of columns, in blocks one below the other where they would get too wide."""
    rates, images = len(rankings.keep_rates), len(rankings.pixels)
    group, apart = rates + (rates - 1) * GAP, 0.25 if rates > 1 else 0.15
    blocks = -(-images // max(1, MAX_COLUMNS // rates))
    beside = -(-images // blocks)
    width = max(MIN_WIDTH, LABELS + beside * (group + apart) + PAD)
    # of text: name, answer, and label where it is known
    lines = 1 + (rankings.unpruned.answers is not None) + (rankings.pictures.labels is not None)
    head = 1 + LINE * lines + ABOVE
    block = head + ROW * len(rankings.rows) + 0.1
    caption = _caption(rankings, width - 2 * PAD)
    height = PAD + block * blocks + LINE * (caption.count("\n") + 1) + PAD
    sheet = Sheet(width, height, -(-MIN_TILE // rankings.pixels.shape[1]) * rankings.pixels.shape[1])
    for i in range(images):
        x, y = LABELS + (i % beside) * (group + apart), PAD + (i // beside) * block
        _draw_head(sheet, rankings, i, x, y, group)
        _draw_tiles(sheet, rankings, i, x, y + head)
        if i % beside == 0:
            _draw_names(sheet, rankings, y + head)
    sheet.text(PAD, height - PAD, caption, ha="left", va="bottom", color=QUIET)
    return sheet


def _draw_head(sheet: Sheet, rankings: Rankings, i: int, x: float, y: float, group: float) -> None:
    """The image that the model sees, its name above, the unpruned answer below, and the keep rates."""
    pictures, middle = rankings.pictures, x + group / 2
    sheet.text(middle, y + 0.1, _shortened(pictures.names[i], group, 7.0, tail=True), 7.0, color=QUIET)
    sheet.picture(middle - 0.5, y + LINE, rankings.pixels[i])
    y += LINE + 1 + 0.15
    answers = rankings.unpruned.answers
    if answers is not None:
        sheet.text(middle, y, _answer(rankings, rankings.unpruned, i, group, 8.5), 8.5, fontweight="bold")
        y += LINE
    if pictures.labels is not None:
        wrong = answers is not None and pictures.labels[i] != answers[i]
        label = _shortened(f"label: {pictures.classes[pictures.labels[i]]}", group, 7.5)
        sheet.text(middle, y, label, 7.5, color=CHANGES if wrong else QUIET)
        y += LINE
    for n, rate in enumerate(rankings.keep_rates):
        sheet.text(x + 0.5 + n * (1 + GAP), y + 0.1, f"{100 * rate:g} % kept", 7.5)


def _draw_tiles(sheet: Sheet, rankings: Rankings, i: int, x: float, y: float) -> None:
    for row, found in enumerate(rankings.rows.values()):
        for column, kept in enumerate(found):
            left, top = x + column * (1 + GAP), y + row * ROW
            colour, weight, answer = _said(rankings, kept, i)
            source = None if kept.source is None else kept.source[i : i + 1]
            tile = draw_left(rankings.pixels[i : i + 1], kept.places[i : i + 1], source, rankings.grid)[0]
            sheet.picture(left, top, tile, None if kept.answers is None else colour)
            sheet.text(left + 0.5, top + 1.15, answer, 7.5, color=colour, fontweight=weight)


def _said(rankings: Rankings, kept: Kept, i: int) -> tuple[str, str, str]:
    """Colour, weight and text of what stands under a tile: the answer, or the drift where nothing answers."""
    if kept.answers is None:
        return QUIET, "normal", f"{kept.drift[i]:.4f}"
    stays = kept.answers[i] == rankings.unpruned.answers[i]
    return STAYS if stays else CHANGES, "normal" if stays else "bold", _answer(rankings, kept, i, 1.0, 7.5)


def _draw_names(sheet: Sheet, rankings: Rankings, y: float) -> None:
    for row, name in enumerate(rankings.rows):
        note = "oracle" if name in METRICS else ""
        if rankings.fitted_to and name in REDUCERS and REDUCERS[name].fitted:
            note = f"fitted to\n{rankings.fitted_to}"
        place = LABELS - 0.12, y + row * ROW + 0.48
        name = name.replace("cls", "CLS").replace("_", " ")
        sheet.text(*place, name, 9.0, ha="right", va="bottom" if note else "center")
        sheet.text(*place, note, 7.5, ha="right", va="top", color=QUIET)


def _answer(rankings: Rankings, kept: Kept, i: int, inches: float, size: float) -> str:
    share = f" {100 * kept.probabilities[i]:.0f} %"
    bold = 1.15 * size  # is that much wider
    return _shortened(rankings.pictures.classes[kept.answers[i]], inches, bold, len(share)) + share


def _shortened(text: str, inches: float, size: float, beside: int = 0, tail: bool = False) -> str:
    """Text that is cut to fit a width, at its end or, with `tail`, at its beginning.

    Args:
        inches, size: the width, and the size of the letters, which are about 0.57 of it wide.
        beside: characters that share the width with the text.
    """
    room = max(3, int(inches * 72 / (0.57 * size)) - beside)
    if len(text) > room:
        text = "…" + text[1 - room :] if tail else text[: room - 1] + "…"
    return text


def _caption(rankings: Rankings, inches: float) -> str:
    total, classes, golden = np.prod(rankings.grid), rankings.pictures.classes, rankings.golden
    rates = ", ".join(f"{100 * rate:g} %" for rate in rankings.keep_rates)
    found = list(rankings.rows.values())
    counts = ", ".join(str(kept.places.shape[1]) for kept in found[0])
    parts = [f"{rankings.about}; {rates} kept: {counts} of {total}."]
    if rankings.unpruned.answers is None:
        parts.append(
            "Under each tile: 1 - cosine of its embedding, from these patches alone, to that of the whole image."
        )
    else:
        parts += [
            "Under each tile: the model's answer from these patches alone and its probability, in green where it is "
            "the answer to the whole image (bold, on top), in red where it changes.",
            f"It chooses among {len(classes)} classes: {textwrap.shorten(', '.join(classes), 90, placeholder=' …')}.",
        ]
    if any(kept.source is not None for row in found for kept in row):
        parts.append(f"In rows that merge, {MERGED}.")
    if any(name in METRICS for name in rankings.rows):
        side = "\N{NO-BREAK SPACE}x\N{NO-BREAK SPACE}".join([str(golden["window"])] * 2)
        parts.append(
            f"Oracles rank by golden scores of these very images (windows of {side}, "
            f"stride {golden['stride']}, removed before layer {golden['remove_at']}); they could not be deployed."
        )
    return textwrap.fill(" ".join(parts), int(inches * 72 / (0.54 * 8)))
