"""The set `emoji`: the pictures of a colour font, each with the name that Unicode gives it.

Font and names are files of two Debian packages. An emoji may be a sequence of characters, such as a person, a joiner
and a profession. A font that lacks a sequence draws its parts side by side, and such wide ones are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daybreak.data.formats import extra
from daybreak.errors import DataError, explained

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIZE = 109  # pixels: the only size of this font, whose pictures are 136 wide and 128 high
WIDEST, SQUARE = 140, 136


def names(lines: str) -> Iterator[tuple[str, str]]:
    """(emoji, name) of each line of emoji-test.txt that is fully qualified."""
    for line in lines.splitlines():
        codes, found, rest = line.partition("; fully-qualified")
        if found:
            name = rest.partition("#")[2].split(maxsplit=2)[2]  # behind the emoji itself and its version
            yield "".join(chr(int(code, 16)) for code in codes.split()), name.replace(":", "")


def emoji(px: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Every name and its picture (px, px, 3) on white, in Unicode's order. DataError without the files, or without
    Pillow's library for sequences of characters."""
    for file in (FONT, NAMES):
        if not file.is_file():
            fix = "install them with: apt-get install fonts-noto-color-emoji unicode-data"
            raise DataError(f"emoji needs Debian's colour font and Unicode's names, and {file} is missing; {fix}.")
    image, draw, fonts = (extra(f"PIL.{name}", "images", "emoji") for name in ("Image", "ImageDraw", "ImageFont"))
    if not extra("PIL.features", "images", "emoji").check("raqm"):
        raise DataError("emoji needs Pillow with the library Raqm; install Pillow's own wheel, and libfribidi0.")
    with explained(DataError, "the font of emoji cannot be read", "install it again"):
        font = fonts.truetype(str(FONT), SIZE, layout_engine=fonts.Layout.RAQM)
        listed = NAMES.read_text("utf-8")
    for text, name in names(listed):
        if (pixels := _drawn(image, draw, font, text, px)) is not None:
            yield name, pixels


def _drawn(image: Any, draw: Any, font: Any, text: str, px: int) -> NDArray[np.uint8] | None:
    """One emoji; None if the font has no single picture of it."""
    left, top, right, bottom = font.getbbox(text)
    if not 0 < right - left <= WIDEST or bottom <= top:
        return None
    square = image.new("RGBA", (SQUARE, SQUARE), (255, 255, 255, 255))
    above = image.new("RGBA", (SQUARE, SQUARE), (255, 255, 255, 0))
    draw.Draw(above).text((-left, (SQUARE - bottom + top) // 2 - top), text, font=font, embedded_color=True)
    if not np.asarray(above)[..., 3].any():
        return None
    whole = image.alpha_composite(square, above).convert("RGB")
    return np.array(whole.resize((px, px), image.Resampling.LANCZOS), np.uint8)
