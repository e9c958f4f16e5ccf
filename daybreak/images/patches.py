"""Pictures as grids of patches, and a dictionary of patches: exact if there are few kinds, else k-means (Lloyd 1982).

Centres are whole numbers like pixels. So the distances of patches to them are exact, and a picture has the same ids on
every machine, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_IDS = 1000  # kinds of patches
ROUNDS, RESEEDED, SAMPLE = 400, 200, 8192  # of k-means; in the first ones unused centres move; patches in each
CONVOLVED = 8  # pixels a side of a patch from which the codec is fsq.py's, without a dictionary
BLOCK = 8192  # patches that are looked up at a time


class Grid(NamedTuple):
    """Square pictures of px pixels a side, in patches of `patch` a side."""

    px: int
    patch: int

    @property
    def side(self) -> int:
        """Patches along a side."""
        return self.px // self.patch

    @property
    def N(self) -> int:
        """Patches of a picture."""
        return self.side**2

    def cut(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Patches (b, N, 3 f f) of pictures (b, px, px, 3): first all reds, then greens and blues, each row by row."""
        s, f = self.side, self.patch
        return pixels.reshape(-1, s, f, s, f, 3).transpose(0, 1, 3, 5, 2, 4).reshape(-1, self.N, 3 * f * f)

    def join(self, patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The pictures of patches: the reverse of `cut`."""
        s, f = self.side, self.patch
        parts = patches.reshape(-1, s, s, 3, f, f).transpose(0, 1, 4, 2, 5, 3)
        return parts.reshape(-1, self.px, self.px, 3)


def grid_of(px: int) -> Grid:
    """The grid for pictures of this size: patches of 2 pixels up to a size of 16, then of 4, and of 8 above 128."""
    return Grid(px, 2 if px <= 16 else 4 if px <= 128 else CONVOLVED)


def nearest(book: NDArray[np.uint8], patches: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The row of `book` (K, n) that is nearest to each patch (..., n); of equals the first. Exact in fp64."""
    centres = torch.from_numpy(book).double()
    squares, flat = centres.square().sum(1), torch.from_numpy(patches.reshape(-1, book.shape[1]))
    found = [(squares - 2 * (part.double() @ centres.T)).argmin(1) for part in torch.split(flat, BLOCK)]
    return torch.cat(found).numpy().reshape(patches.shape[:-1])


def fit(patches: NDArray[np.uint8], seed: int, check: Callable[[], None]) -> tuple[NDArray[np.uint8], bool]:
    """A dictionary (K, n) of patches (m, n), K at most MOST_IDS, and whether it holds them all. `check` runs before
    each round and may raise."""
    kinds = np.unique(patches, axis=0)
    if len(kinds) <= MOST_IDS:
        return kinds, True
    centres = _lloyd(torch.from_numpy(patches), torch.from_numpy(kinds), seed, check)
    return np.unique(centres.round().clamp(0, 255).byte().numpy(), axis=0), False


def _lloyd(patches: Tensor, kinds: Tensor, seed: int, check: Callable[[], None]) -> Tensor:
    """Centres (MOST_IDS, n) by k-means in batches. In the first rounds, those that few patches are near to are moved to
    random patches."""
    random = torch.Generator().manual_seed(seed)
    centres = kinds[torch.randperm(len(kinds), generator=random)[:MOST_IDS]].float()
    used, sample = torch.ones(MOST_IDS), min(SAMPLE, len(patches))
    for turn in range(ROUNDS):
        check()
        batch = patches[torch.randint(len(patches), (sample,), generator=random)].float()
        near = (centres.square().sum(1) - 2 * (batch @ centres.T)).argmin(1)
        count = torch.bincount(near, minlength=MOST_IDS).float()
        means = torch.zeros_like(centres).index_add_(0, near, batch) / count.clamp(min=1)[:, None]
        centres += (means - centres) * (0.1 * count).clamp(max=1)[:, None]
        used = 0.9 * used + 0.1 * count
        idle = (used < 0.05).nonzero()[:, 0]
        if turn < RESEEDED and len(idle):
            centres[idle] = batch[torch.randint(sample, (len(idle),), generator=random)]
            used[idle] = 1
    return centres
