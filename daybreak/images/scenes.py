"""The procedural set `shapes`: two shapes, described exactly. So of a drawn picture it is known whether it is right.

"a red circle left of a small blue square": 6 colours, 5 shapes and 2 sizes of each of two shapes, in 4 relations, are
14,400 captions. Two captions name each of the 7,200 pictures of 16 x 16 pixels, since "left of" turned round is "right
of". All pictures together have 79 different patches of 2 x 2 pixels, so a codec of 79 ids loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

PX = 16
CELL = 8  # pixels of the square that a shape is in
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 40),
    "purple": (140, 60, 170),
    "black": (30, 30, 30),
}
KINDS = ("square", "circle", "triangle", "cross", "ring")
RADIUS = {"": 3.6, "small ": 2.6}  # pixels
# Where the first and the second shape are: row and column of their upper left corners.
PLACES = {
    "above": ((0, 4), (8, 4)),
    "below": ((8, 4), (0, 4)),
    "left of": ((4, 0), (4, 8)),
    "right of": ((4, 8), (4, 0)),
}
Shape = tuple[str, str, str]  # size, colour, kind


@cache
def _mask(size: str, kind: str) -> NDArray[np.bool_]:
    r = RADIUS[size]
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    distance, inside = np.hypot(x, y), (abs(x) <= r) & (abs(y) <= r)
    masks: dict[str, NDArray[np.bool_]] = {
        "square": inside,
        "circle": distance <= r + 0.3,
        "triangle": (abs(y) <= r) & (abs(x) <= (y + r) / 2 + 0.3),
        "cross": inside & ((abs(x) < 1) | (abs(y) < 1)),
        "ring": (distance <= r + 0.3) & (distance > r - 1.2),
    }
    return masks[kind]


def _drawn(first: Shape, relation: str, second: Shape) -> NDArray[np.uint8]:
    pixels = np.full((PX, PX, 3), 255, np.uint8)
    for (size, colour, kind), (y, x) in zip((first, second), PLACES[relation], strict=True):
        pixels[y : y + CELL, x : x + CELL][_mask(size, kind)] = COLOURS[colour]
    return pixels


def scenes() -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Every caption and its picture (PX, PX, 3), in a fixed order."""
    objects = list(product(RADIUS, COLOURS, KINDS))
    for first, relation, second in product(objects, PLACES, objects):
        words = " ".join(["a", "".join(first[:2]), first[2], relation, "a", "".join(second[:2]), second[2]])
        yield words, _drawn(first, relation, second)
