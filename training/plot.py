"""The losses of a run as a small picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (480, 240)
GROUND, GRID, EVERY, MEAN, TEXT, SCALE = "#1e1e22", "#3a3a42", "#5b6b86", "#f0b44c", "#d8d8dc", "#a0a0a8"
LEFT, MARGIN, HEADER = 62, 12, 36
LETTERS, SMALL = 17, 14  # large enough for a node on which the picture is made smaller
PARTS = 4  # between the lines of the grid


def means(losses: Sequence[float], points: int) -> list[float]:
    """At most `points` means of equally long parts of the losses, in order."""
    count = min(points, len(losses))
    edges = [len(losses) * i // count for i in range(count + 1)] if count else []
    return [sum(losses[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def under(picture: Image.Image, strip: Image.Image | None) -> Image.Image:
    """A picture with another of its width below, if there is one."""
    if strip is None:
        return picture
    whole = Image.new("RGB", (picture.width, picture.height + strip.height), GROUND)
    whole.paste(picture, (0, 0))
    whole.paste(strip, (0, picture.height))
    return whole


def plot(losses: Sequence[float], total: int, title: str) -> Image.Image:
    """Draw every loss faintly and their means on top, over the `total` steps of the run, under a title.

    The lines of the grid say which loss they stand for.
    """
    picture = Image.new("RGB", SIZE, GROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, HEADER / 2 - 2), title, fill=TEXT, font=ImageFont.load_default(LETTERS), anchor="lm")
    width, height = SIZE[0] - LEFT - MARGIN, SIZE[1] - HEADER - MARGIN
    lines = [HEADER + height * part / PARTS for part in range(PARTS + 1)]
    for y in lines:
        draw.line([(LEFT, y), (LEFT + width, y)], fill=GRID)
    finite = [loss for loss in losses if loss == loss and abs(loss) != float("inf")]
    if len(finite) < 2:
        return picture
    fine, coarse = means(finite, width), means(finite, 24)
    low, high = min(fine), max(fine)
    for part, y in enumerate(lines):
        value = high - (high - low) * part / PARTS
        draw.text((LEFT - 6, y), f"{value:.2g}", fill=SCALE, font=ImageFont.load_default(SMALL), anchor="rm")
    reach = width * len(losses) / max(total, 1)
    for values, colour, line in ((fine, EVERY, 1), (coarse, MEAN, 3)):
        step = reach / max(len(values) - 1, 1)
        points = [
            (LEFT + i * step, HEADER + height * (1 - (value - low) / ((high - low) or 1.0)))
            for i, value in enumerate(values)
        ]
        if len(points) > 1:
            draw.line(points, fill=colour, width=line, joint="curve")
    return picture
