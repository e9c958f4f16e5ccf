"""Folders of PNG, JPEG and WebP files, with captions. Pillow reads them; it comes with the extra `images`.

The caption of a picture is the first of these that exists:

    1. its text in metadata.jsonl or metadata.csv, of the folder or of one in it, whose `file_name` is a path from there
    2. the text of NAME.txt beside NAME.png
    3. the name of the folder that it is in, below the one that was given: dog/001.png is "dog"
    4. its own name: red-circle_2.png is "red circle 2"

A picture becomes a square: rotated as its EXIF data says, its middle cut out, on white where it is transparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from daybreak.data.formats import OTHER_PICTURES, PICTURES, Faults, extra, read_records, read_text, walk
from daybreak.data.sources import split_of
from daybreak.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP")
CAPTIONS = ("metadata.jsonl", "metadata.csv")
OTHER = "pictures in other formats"  # a reason to leave a file out
MOST_PIXELS = 64_000_000  # of a file: more would take over 256 MB, and a small file may claim them
MOST_CAPTION = 1 << 16  # bytes of NAME.txt


class Picture(NamedTuple):
    """A file, the text that describes it, and the split that its folders tell, "" if none."""

    path: Path
    caption: str
    split: str


def _listed(files: Iterable[tuple[str, Path]], column: str, faults: Faults) -> dict[str, str]:
    """Captions by file name from the lists in a folder. DataError for a record without a name or a text."""
    found = dict[str, str]()
    for name, path in files:
        if path.name not in CAPTIONS or not path.is_file() or split_of(name) == "test":
            continue
        for number, record in read_records(path, faults):
            values = [record.get(key) for key in ("file_name", column)] if isinstance(record, dict) else []
            if not values or not all(isinstance(value, str) for value in values):
                fix = f"each needs a file_name and a text {column!r} (--text-field names another)"
                faults("captions without a name or a text", f"{path} record {number}: {fix}.")
                continue
            found[str(Path(name).parent / str(values[0]))] = str(values[1])
    return found


def _caption(folder: Path, name: str, path: Path, faults: Faults) -> str:
    beside = path.with_suffix(".txt")
    if beside.is_file():
        if beside.stat().st_size > MOST_CAPTION:
            raise DataError(f"{beside} has more than {MOST_CAPTION} bytes, which is no caption; shorten it.")
        return " ".join("".join(read_text(beside, faults)).split())
    parts = [part for part in Path(name).parts[:-1] if not split_of(f"{part}/x")]
    return re.sub(r"[\s_-]+", " ", parts[-1] if parts else path.stem).strip()


def list_pictures(words: Iterable[str | Path], column: str, faults: Faults) -> list[Picture]:
    """The pictures in folders, in sorted order, with captions. Files for tests are left out, as those of text are.

    Raises DataError for what is no folder, and for a folder without pictures."""
    found = list[Picture]()
    for folder in map(Path, words):
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; --as images reads folders of PNG, JPEG and WebP files.")
        files = [(name, path) for name, path in walk(folder) if not any(x.startswith(".") for x in Path(name).parts)]
        listed, before = _listed(files, column, faults), len(found)
        for name, path in files:
            if path.suffix.lower() in OTHER_PICTURES:
                faults(OTHER, f"{path} is no PNG, JPEG or WebP file; convert it.")
            if path.suffix.lower() not in PICTURES or (split := split_of(name)) == "test":
                continue
            if listed and name not in listed:
                faults("pictures without a caption", f"{path} is not in the list of captions; add it.")
                continue
            found.append(Picture(path, listed[name] if listed else _caption(folder, name, path, faults), split))
        if len(found) == before:
            kinds = ", ".join(PICTURES)
            raise DataError(
                f"{folder} has no PNG, JPEG or WebP file ({kinds}); give a folder of such, or convert others."
            )
    return found


def read_picture(path: Path, px: int) -> tuple[NDArray[np.uint8], str]:
    """The picture in a file as pixels (px, px, 3), and a remark, "" as a rule. DataError if it cannot be read."""
    if not path.is_file():
        raise DataError(f"{path} is a pipe or device, or a link to nothing; remove it.")
    image, ops = extra("PIL.Image", "images", str(path)), extra("PIL.ImageOps", "images", str(path))
    try:
        with image.open(path, formats=FORMATS) as file:
            width, height = file.size
            if width * height > MOST_PIXELS:
                raise image.DecompressionBombError(f"{width:,} x {height:,} pixels")
            moves = file.format in ("PNG", "WEBP") and getattr(file, "n_frames", 1) > 1
            square = ops.fit(_rgb(image, ops.exif_transpose(file)), (px, px), image.Resampling.LANCZOS)
            return np.array(square, np.uint8), "animations, of which the first frame is read" if moves else ""
    except image.DecompressionBombError as error:
        raise DataError(
            f"{path} is too large ({error}); the most is {MOST_PIXELS:,} pixels. Make it smaller."
        ) from None
    except Exception as error:  # Pillow's readers raise many kinds: OSError, SyntaxError, ValueError, struct.error ...
        said = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} is damaged or is no picture ({said}); repair it or move it away.") from None


def _rgb(image: Any, file: Any) -> Any:
    """An opened picture in 8-bit RGB, on white where it is transparent."""
    if file.mode.startswith("I;16") or file.mode in ("I", "F"):  # 16 bits of grey
        grey = np.asarray(file).astype(np.float64) / 257
        return image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if file.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in file.info:
        return file.convert("RGB")
    above = file.convert("RGBA")
    white = image.new("RGBA", above.size, (255, 255, 255, 255))
    return image.alpha_composite(white, above).convert("RGB")
