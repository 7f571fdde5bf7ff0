"""The words of the toy world, the sentences made of them, and which sentences training may see."""

from __future__ import annotations

from dataclasses import dataclass, replace

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.65, 0.27),
    "blue": (0.16, 0.31, 0.84),
    "yellow": (0.95, 0.82, 0.18),
    "white": (0.96, 0.96, 0.96),
    "purple": (0.59, 0.22, 0.75),
}
GROUNDS = {
    "blue": (0.16, 0.31, 0.84),
    "green": (0.16, 0.65, 0.27),
    "black": (0.06, 0.06, 0.06),
    "gray": (0.50, 0.50, 0.50),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}

HELD_OUT = frozenset({
    ("yellow", "triangle"), ("purple", "square"), ("green", "cross"),
    ("triangle", "left"), ("cross", "down"),
    ("white", "up"), ("blue", "right"),
})  # fmt: skip
"""Pairs of words that never meet in training: (colour, shape), (shape, direction), (colour, direction)."""

TEST_EVERY = 6


@dataclass(frozen=True)
class Words:
    """One sentence: "a red circle over a blue ground", or with a direction "a red circle moves up over ..."."""

    colour: str
    shape: str
    ground: str
    direction: str | None = None

    @property
    def text(self) -> str:
        motion = f" moves {self.direction}" if self.direction else ""
        return f"a {self.colour} {self.shape}{motion} over a {self.ground} ground"

    @property
    def split(self) -> str:
        """`heldout`: two of its words never meet in training; `test`: its words meet, the sentence is never shown;
        else `train`."""
        pairs = {(self.colour, self.shape), (self.shape, self.direction), (self.colour, self.direction)}
        if pairs & HELD_OUT:
            return "heldout"
        number = list(COLOURS).index(self.colour) + 2 * SHAPES.index(self.shape) + 3 * list(GROUNDS).index(self.ground)
        return "test" if number % TEST_EVERY == 0 else "train"

    def still(self) -> Words:
        return replace(self, direction=None)


def sentences(split: str, moving: bool) -> list[Words]:
    """Every sentence of one split, with directions or without. A shape never has the colour of its ground."""
    directions = list(DIRECTIONS) if moving else [None]
    every = [
        Words(colour, shape, ground, direction)
        for colour in COLOURS
        for shape in SHAPES
        for ground in GROUNDS
        for direction in directions
        if colour != ground
    ]
    return [words for words in every if words.split == split]
