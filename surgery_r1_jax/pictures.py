"""Frames with boxes drawn on them, for the eye: one PNG of a single answer, small JPEGs inside the report.

Two cues tell the boxes apart, so that neither colour vision nor a colour printer is needed: the true box is
dashed and light blue, the predicted box solid and yellow, both on a dark casing that holds on bright tissue.
"""

import base64
import io
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from surgery_r1_jax.errors import InputError, one_line, printable
from surgery_r1_jax.records import Box

TRUTH = "#6fd0ff"
PREDICTION = "#f0e442"
_CASING, _PAPER, _INK = "#000000", "#ffffff", "#1b1f24"
_MOST_LINES = 40  # of a caption
_SMALLEST = 480  # pixels: smaller frames are enlarged before drawing, or no text would fit under them


def visible(text: str) -> str:
    """The text with every control, format and surrogate character spelt out, so that nothing is hidden."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else f"<U+{ord(c):04X}>" for c in text)


def drawable(box: Sequence[float] | None) -> Box | None:
    """The box cut off a little outside of the frame, so that no edge is made up; None if it has no inside."""
    if box is None:
        return None
    x0, y0, x1, y1 = (min(max(edge, -0.1), 1.1) for edge in box)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def draw(
    image: Image.Image, *, truth: Box | None = None, prediction: Box | None = None, lines: Sequence[str] = ()
) -> Image.Image:
    """A copy of the frame with its boxes, and below it a strip with the legend and the caption lines.

    Boxes are xyxy in [0,1]; what lies outside the frame is cut off, and what is no box is left out.
    """
    truth, prediction = drawable(truth), drawable(prediction)
    picture = image.convert("RGB")
    scale = max(1.0, _SMALLEST / max(picture.size))
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    stroke = max(2, round(max(picture.size) / 250))
    pen = ImageDraw.Draw(picture)
    if prediction is not None:
        _outline(pen, prediction, picture.size, stroke, PREDICTION, dashed=False)
    if truth is not None:  # last, so that a perfect prediction shows through the gaps
        _outline(pen, truth, picture.size, stroke, TRUTH, dashed=True)
    legend = [("true box", TRUTH, True)] * (truth is not None)
    legend += [("predicted box", PREDICTION, False)] * (prediction is not None)
    return _with_caption(picture, legend, [part for line in lines for part in visible(line).split("\n")])


def named(image: Image.Image, boxes: Sequence[tuple[str, Box]], lines: Sequence[str] = ()) -> Image.Image:
    """A copy of the frame with any number of boxes, the short name of each in its corner, above the caption lines."""
    picture = image.convert("RGB")
    stroke, pen = max(2, round(max(picture.size) / 320)), ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=max(12, round(max(picture.size) / 36)))
    for _, box in boxes:
        _outline(pen, box, picture.size, stroke, TRUTH, dashed=True)
    for name, (x0, y0, *_) in boxes:
        at = x0 * picture.width + stroke, y0 * picture.height + stroke
        pen.rectangle(pen.textbbox(at, f" {name} ", font=font), fill=_CASING)
        pen.text(at, f" {name} ", fill=TRUTH, font=font)
    return _with_caption(picture, [], lines)


def save(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG, whole or not at all. Raises: InputError where it cannot be written."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        picture.save(part, "PNG")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or one_line(error)
        raise InputError(f"{printable(path)}: cannot be written ({reason}); take another path") from None


def data_url(image: Image.Image, *, side: int = 480, limit: int = 120_000) -> str:
    """The frame as a JPEG data URL of at most about `limit` bytes, re-encoded from its pixels alone (no EXIF)."""
    pixels = Image.new("RGB", image.size)
    pixels.paste(image.convert("RGB"))  # a fresh image carries no metadata that a JPEG could take along
    for shrink, quality in ((1, 85), (1, 65), (0.75, 60), (0.5, 50), (0.25, 40)):
        small, buffer = pixels.copy(), io.BytesIO()
        small.thumbnail((side * shrink, side * shrink), Image.Resampling.LANCZOS)
        small.save(buffer, "JPEG", quality=quality, subsampling=0)
        if buffer.tell() <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _outline(
    pen: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], stroke: float, colour: str, *, dashed: bool
) -> None:
    """Draws one box, its strokes centred on its edges."""
    x0, y0, x1, y1 = (edge * side for edge, side in zip(box, size * 2, strict=True))
    half, dash = stroke / 2, stroke * 4 if dashed else None
    bars = [(a - half, y - half, b + half, y + half) for y in (y0, y1) for a, b in _dashes(x0, x1, dash)]
    bars += [(x - half, a - half, x + half, b + half) for x in (x0, x1) for a, b in _dashes(y0, y1, dash)]
    _bars(pen, bars, max(1, stroke / 3), colour)


def _bars(pen: ImageDraw.ImageDraw, bars: Sequence[Box], casing: float, colour: str) -> None:
    """Fills rectangles in pixels: first all of their casing, then all of their colour."""
    for x0, y0, x1, y1 in bars:
        pen.rectangle((x0 - casing, y0 - casing, x1 + casing, y1 + casing), fill=_CASING)
    for bar in bars:
        pen.rectangle(bar, fill=colour)


def _dashes(start: float, end: float, dash: float | None) -> Iterator[tuple[float, float]]:
    """Equal dashes that begin and end at the corners; one single stroke where no dash is asked for."""
    count = 1 if dash is None else max(2, round((end - start) / dash / 2))
    step = (end - start) / (2 * count - 1)
    for index in range(count):
        yield start + 2 * index * step, start + (2 * index + 1) * step


def _with_caption(picture: Image.Image, legend: list[tuple[str, str, bool]], lines: list[str]) -> Image.Image:
    """The picture on top of a white strip: a swatch per box, then the lines, wrapped to the width."""
    if not legend and not lines:
        return picture
    width, height = picture.size
    font = ImageFont.load_default(size=max(14, round(width / 52)))
    em, leading = font.size, round(font.size * 1.45)
    wrapped = [part for line in lines for part in _wrapped(line, font, width - 2 * em)]
    if len(wrapped) > _MOST_LINES:
        wrapped[_MOST_LINES - 1 :] = ["..."]
    sheet = Image.new("RGB", (width, height + leading * (len(wrapped) + bool(legend)) + em), _PAPER)
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    x, middle = float(em), height + em / 2 + leading / 2
    for name, colour, dashed in legend:
        swatch, half = 2.5 * em, em / 9
        bars = [(a, middle - half, b, middle + half) for a, b in _dashes(x, x + swatch, em / 2 if dashed else None)]
        _bars(pen, bars, max(1, em / 14), colour)
        pen.text((x + swatch + em / 2, middle), name, fill=_INK, font=font, anchor="lm")
        x += swatch + font.getlength(name) + 2 * em
    middle += leading * bool(legend)
    for line in wrapped:
        pen.text((em, middle), line, fill=_INK, font=font, anchor="lm")
        middle += leading
    return sheet


def _wrapped(line: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The line in pieces of about `width` pixels, by the mean width of its own characters."""
    columns = 0.95 * width * len(line) / max(font.getlength(line), 1.0)
    return textwrap.wrap(line, max(8, int(columns))) or [""]
