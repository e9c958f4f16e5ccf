"""The codecs: `patch`, whose ids are the nearest patches of a dictionary, which a small decoder sharpens; and `fsq`.

fsq.py is for large pictures, and has no dictionary. A codec is trained once, when a data set is prepared, and then
frozen in codec.safetensors: the dictionary, the parameters, and as metadata the numbers of data/pictures.py. A set with
few kinds of patches needs no decoder: its dictionary loses nothing.
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

from daybreak.data.pictures import CODEC_FILE, FORMAT, FORMAT_FSQ, METADATA, codec_digest, read_metadata
from daybreak.data.tokenizer import Tokenizer
from daybreak.errors import DataError
from daybreak.files import replacing
from daybreak.images import decoder, fsq
from daybreak.images.patches import CONVOLVED, Grid, fit, nearest

SEED = 20261130
BATCH = 64  # pictures that are decoded at a time
Pixels = NDArray[np.uint8]
CPU = torch.device("cpu")


def _to_unit(pixels: Pixels, device: torch.device) -> torch.Tensor:
    """fp32 from -1 to 1, on the device."""
    return torch.from_numpy(pixels).to(device).float() / 127.5 - 1


def _channels(pixels: Pixels, device: torch.device) -> torch.Tensor:
    """fp32 (b, 3, px, px) from -1 to 1, on the device, of pictures (b, px, px, 3)."""
    return _to_unit(pixels, device).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Codec:
    """A frozen codec. book (K, 3 f f): the patches, none if it is fsq.py's. parameters: of the decoder, none if the
    dictionary is exact, or of the whole codec; their device is where it computes."""

    grid: Grid
    book: Pixels
    parameters: decoder.Named = field(default_factory=dict)

    @property
    def K(self) -> int:
        """The number of ids."""
        return len(self.book) or fsq.K

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next((x.device for x in self.parameters.values()), CPU)

    def encode(self, pixels: Pixels) -> NDArray[np.int64]:
        """The ids (b, N) of pictures (b, px, px, 3)."""
        if not len(self.book):
            parts = (_channels(pixels[at : at + BATCH], self.device) for at in range(0, len(pixels), BATCH))
            with decoder.exact():
                found = [fsq.ids_of(fsq.fsq_forward(fsq.encode(self.parameters, self.grid, x, {}), {})) for x in parts]
            return torch.cat(found).flatten(1).cpu().numpy()
        return nearest(self.book, self.grid.cut(pixels))

    def decode(self, ids: NDArray[np.integer]) -> Pixels:
        """The pictures (b, px, px, 3) of ids (b, N), each below K."""
        if not self.parameters:
            return self.grid.join(self.book[ids])
        book, s, made = _to_unit(self.book, self.device), self.grid.side, list[Pixels]()
        for part in torch.split(torch.from_numpy(np.asarray(ids, np.int64)).view(-1, s, s).to(self.device), BATCH):
            with decoder.exact():
                if len(book):
                    x = book[part].permute(0, 3, 1, 2).contiguous()
                    y = decoder.forward(self.parameters, self.grid, x, {})
                else:
                    y = fsq.decode(self.parameters, self.grid, fsq.values_of(part), {})
            made.append(((y + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(made)

    def psnr(self, pixels: Pixels) -> float:
        """How near the pictures (b, px, px, 3) come back, in dB; infinite if exactly."""
        error = np.square(self.decode(self.encode(pixels)).astype(np.float64) - pixels).mean()
        return float(10 * np.log10(255**2 / error)) if error else float("inf")

    def save(self, path: Path, D: int) -> None:
        """Write codec.safetensors for documents of D tokens."""
        numbers = {"px": self.grid.px, "patch": self.grid.patch, "K": self.K, "N": self.grid.N, "D": D}
        book = {"book": torch.from_numpy(self.book)} if len(self.book) else {}
        told = {"format": FORMAT if book else FORMAT_FSQ, **numbers}
        with replacing(path) as file:
            file.write(save({**book, **self.parameters}, {METADATA: json.dumps(told)}))

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
        grid, n = Grid(numbers["px"], numbers["patch"]), 3 * numbers["patch"] ** 2
        whole = grid.patch == CONVOLVED
        book = tensors.pop("book", torch.empty(0, n, dtype=torch.uint8))
        made = fsq.init(grid, 0) if whole else decoder.init(grid, 0) if tensors else {}
        wanted = {name: value.shape for name, value in made.items()}
        shapes = {name: value.shape for name, value in tensors.items()}
        rows = 0 if whole and numbers["K"] == fsq.K else numbers["K"]
        if tuple(book.shape) != (rows, n) or shapes != wanted or book.dtype != torch.uint8:
            raise DataError(f"{path} has other tensors than a codec of pictures has; bring the old file back.")
        return cls(grid, book.numpy(), tensors)


def train(grid: Grid, pixels: Pixels, check: Callable[[], None] = lambda: None, device: torch.device = CPU) -> Codec:
    """A codec for pictures (n, px, px, 3). The same pictures give the same codec on the same machine and device, where
    its networks train and stay. `check` runs between its steps and may raise."""

    def pictures(rows: torch.Tensor) -> torch.Tensor:
        return _channels(pixels[rows.numpy()], device)

    if grid.patch == CONVOLVED:
        empty = np.empty((0, 3 * grid.patch**2), np.uint8)
        return Codec(grid, empty, fsq.train(grid, len(pixels), pictures, SEED, device, check))
    patches = grid.cut(pixels)
    book, exact = fit(patches.reshape(-1, patches.shape[-1]), SEED, check)
    if exact:
        return Codec(grid, book)
    codes = torch.from_numpy(nearest(book, patches)).view(-1, grid.side, grid.side)
    return Codec(grid, book, decoder.train(grid, _to_unit(book, device), codes, pictures, SEED, check))
