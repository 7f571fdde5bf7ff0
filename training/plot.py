"""The losses of a run as a small picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

SIZE = (480, 240)
GROUND, GRID, EVERY, MEAN, TEXT = "#1e1e22", "#3a3a42", "#5b6b86", "#f0b44c", "#d8d8dc"
MARGIN, HEADER = 10, 26


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
    """Draw every loss faintly and their means on top, over the `total` steps of the run, under a title."""
    picture = Image.new("RGB", SIZE, GROUND)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, 7), title, fill=TEXT)
    width, height = SIZE[0] - 2 * MARGIN, SIZE[1] - HEADER - MARGIN
    for part in range(5):
        y = HEADER + height * part / 4
        draw.line([(MARGIN, y), (MARGIN + width, y)], fill=GRID)
    finite = [loss for loss in losses if loss == loss and abs(loss) != float("inf")]
    if len(finite) < 2:
        return picture
    fine, coarse = means(finite, width), means(finite, 24)
    low, high = min(fine), max(fine)
    reach = width * len(losses) / max(total, 1)
    for values, colour, line in ((fine, EVERY, 1), (coarse, MEAN, 3)):
        step = reach / max(len(values) - 1, 1)
        points = [
            (MARGIN + i * step, HEADER + height * (1 - (value - low) / ((high - low) or 1.0)))
            for i, value in enumerate(values)
        ]
        if len(points) > 1:
            draw.line(points, fill=colour, width=line, joint="curve")
    return picture
