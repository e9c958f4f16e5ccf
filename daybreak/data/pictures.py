"""Pictures among tokens: a codec turns each into N ids, which lie behind those of a text tokenizer.

    0 ... V - 1 text | first ... first + K - 1 codes of pictures | boi | eoi        first = V of the text alone

    a document of D tokens:    EOT ... EOT  caption  boi  c_1 ... c_N  eoi

Text keeps its ids, so shards of the text tokenizer may be mixed with pictures. A sample is T tokens at a multiple of T,
so if D divides T, every picture is always at the same positions.

The codec's file lies beside the shards and in a run's folder. Its sha256 is a part of the tokenizer's name. This room
reads only its metadata; `daybreak.images` has the codec itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from daybreak.checked import WHOLE, Rule, misfit
from daybreak.errors import DataError
from daybreak.files import sha256_of

CODEC_FILE = "codec.safetensors"
CODEC_PICTURE = "codec.png"  # in a data set, for people: pictures above those that come back
FORMAT, FORMAT_FSQ = 1, 2  # of a codec with a dictionary, and without one
METADATA = "daybreak"  # one key, since the library orders several at random
MARK = "+img-"  # in a tokenizer's name, between that of the text and the start of the codec's sha256
SIZE = Rule("must be a whole number from 1 to 2^20", lambda x: type(x) is int and 1 <= x <= 1 << 20)
NUMBERS: dict[str, Any] = dict.fromkeys(("px", "patch", "K", "N", "D"), SIZE)


class Pictures(NamedTuple):
    """Where pictures are among a tokenizer's ids: K codes from `first` on, of which a picture has N; D tokens are a
    document."""

    first: int
    K: int
    N: int
    D: int

    @property
    def boi(self) -> int:
        """The id that begins a picture."""
        return self.first + self.K

    @property
    def eoi(self) -> int:
        """The id that ends a picture."""
        return self.boi + 1

    @property
    def room(self) -> int:
        """The most tokens that a caption may have."""
        return self.D - self.N - 3

    def head(self, caption: Sequence[int], eot: int) -> list[int]:
        """The tokens of a document up to boi, always D - N - 1 of them: padding, a caption of at most `room` tokens."""
        return [eot] * (1 + self.room - len(caption)) + [*map(int, caption), self.boi]

    def document(self, caption: Sequence[int], codes: Sequence[int] | NDArray[np.integer], eot: int) -> list[int]:
        """The D tokens of a caption and a picture's N codes."""
        return [*self.head(caption, eot), *(self.first + int(code) for code in codes), self.eoi]


def text_name(name: str) -> str:
    """The name of the text tokenizer in a tokenizer's name."""
    return name.partition(MARK)[0]


def read_metadata(path: Path) -> dict[str, int]:
    """The numbers that a codec's file holds: picture and patch in pixels, K, N, D. Raises DataError."""
    fix = "bring the old file back, or prepare the pictures again"
    try:
        with safe_open(path, "numpy") as file:
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a codec of pictures ({error}); {fix}.") from None
    if said := misfit(found, {"format": WHOLE} | NUMBERS):
        raise DataError(f"{path}: {said}; {fix}.")
    if found["format"] not in (FORMAT, FORMAT_FSQ):
        reads = f"{FORMAT} and {FORMAT_FSQ}"
        raise DataError(f"{path} has format {found['format']}, and this daybreak reads {reads}; update daybreak.")
    if found["D"] < found["N"] + 3:
        raise DataError(f"{path}: D = {found['D']} must be at least N + 3 = {found['N'] + 3}; {fix}.")
    return {key: found[key] for key in NUMBERS}


def codec_digest(path: Path, name: str) -> str:
    """The sha256 (hex) of a codec's file, which is the one that the tokenizer `name` needs. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} is missing, and tokenizer {name} needs it; copy it from where the pictures are.")
    digest, wanted = sha256_of(path), name.partition(MARK)[2]
    if not digest.startswith(wanted):
        raise DataError(f"{path} is codec {digest[:12]}, not {wanted}; bring the old file back.")
    return digest
