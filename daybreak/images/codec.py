"""The codec `patch`: a picture's ids are the nearest patches of a dictionary, and a small decoder sharpens them.

It is trained once, when a data set is prepared, and then frozen in codec.safetensors: the dictionary, the decoder's
parameters, and as metadata the numbers of data/pictures.py. A set with few kinds of patches needs no decoder: its
dictionary loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from daybreak.data.pictures import CODEC_FILE, FORMAT, METADATA, codec_digest, read_metadata
from daybreak.data.tokenizer import Tokenizer
from daybreak.errors import DataError
from daybreak.files import replacing
from daybreak.images import decoder
from daybreak.images.patches import Grid, fit, nearest

SEED = 20261130
BATCH = 64  # pictures that are decoded at a time
Pixels = NDArray[np.uint8]


def _to_unit(pixels: Pixels) -> torch.Tensor:
    """fp32 from -1 to 1."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


@dataclass(frozen=True)
class Codec:
    """A frozen codec. book (K, 3 f f): the patches. parameters: of the decoder, none if the dictionary is exact."""

    grid: Grid
    book: Pixels
    parameters: decoder.Named = field(default_factory=dict)

    def encode(self, pixels: Pixels) -> NDArray[np.int64]:
        """The ids (b, N) of pictures (b, px, px, 3)."""
        return nearest(self.book, self.grid.cut(pixels))

    def decode(self, ids: NDArray[np.integer]) -> Pixels:
        """The pictures (b, px, px, 3) of ids (b, N), each below K."""
        if not self.parameters:
            return self.grid.join(self.book[ids])
        book, s, made = _to_unit(self.book), self.grid.side, list[Pixels]()
        for part in torch.split(torch.from_numpy(np.asarray(ids, np.int64)).view(-1, s, s), BATCH):
            x = book[part].permute(0, 3, 1, 2).contiguous()
            y = decoder.forward(self.parameters, self.grid, x, {})
            made.append(((y + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())
        return np.concatenate(made)

    def psnr(self, pixels: Pixels) -> float:
        """How near the pictures (b, px, px, 3) come back, in dB; infinite if exactly."""
        error = np.square(self.decode(self.encode(pixels)).astype(np.float64) - pixels).mean()
        return float(10 * np.log10(255**2 / error)) if error else float("inf")

    def save(self, path: Path, D: int) -> None:
        """Write codec.safetensors for documents of D tokens."""
        numbers = {"px": self.grid.px, "patch": self.grid.patch, "K": len(self.book), "N": self.grid.N, "D": D}
        tensors = {"book": torch.from_numpy(self.book), **self.parameters}
        with replacing(path) as file:
            file.write(save(tensors, {METADATA: json.dumps({"format": FORMAT, **numbers})}))

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> Codec:
        """The codec in a folder, which is the one of this tokenizer. Raises DataError."""
        path = folder / CODEC_FILE
        codec_digest(path, tokenizer.name)
        numbers = read_metadata(path)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} is not a codec of pictures ({error}); bring the old file back.") from None
        grid, book = Grid(numbers["px"], numbers["patch"]), tensors.pop("book", torch.empty(0, 0))
        wanted = {name: value.shape for name, value in decoder.init(grid, 0).items()} if tensors else {}
        shapes = {name: value.shape for name, value in tensors.items()}
        if tuple(book.shape) != (numbers["K"], 3 * grid.patch**2) or shapes != wanted or book.dtype != torch.uint8:
            raise DataError(f"{path} has other tensors than a codec of pictures has; bring the old file back.")
        return cls(grid, book.numpy(), tensors)


def train(grid: Grid, pixels: Pixels, check: Callable[[], None] = lambda: None) -> Codec:
    """A codec for pictures (n, px, px, 3). The same pictures give the same codec on the same machine. `check` runs
    between its steps and may raise."""
    patches = grid.cut(pixels)
    book, exact = fit(patches.reshape(-1, patches.shape[-1]), SEED, check)
    if exact:
        return Codec(grid, book)
    codes = torch.from_numpy(nearest(book, patches)).view(-1, grid.side, grid.side)
    pictures = _to_unit(pixels).permute(0, 3, 1, 2).contiguous()
    return Codec(grid, book, decoder.train(grid, _to_unit(book), codes, pictures, SEED, check))
