"""Several data sets in one order, by weight: `fineweb-edu-10B=0.7,stdlib=0.3`. Still a pure function of (seed, step).

The order comes in blocks of 1,024 samples. Every block holds exactly the same number of samples of each source: its
share of 1,024, by largest remainders. Their places within block b are a permutation keyed by (seed, b), and each
source is read in its own epoch order, so after any number of samples each source's count is known without reading.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daybreak.config_keys import DataConfig
from daybreak.data.dataset import Dataset, open_dataset
from daybreak.data.loader import Batch, Loader, permutation
from daybreak.data.packing import FittedLoader, PackedLoader, rows_of
from daybreak.data.pictures import MARK, text_name
from daybreak.data.tokenizer import TOKENIZER_FILE, get_tokenizer
from daybreak.errors import ConfigError, DataError

BLOCK = 1024  # samples


def parse_mix(name: str) -> list[tuple[str, float]]:
    """(data set, weight) of a mixture's name; [] if it names one. ConfigError for a weight that is none."""
    if not re.search("=|^[^*?[]*,", name) or Path(name).exists():
        return []
    parts = [part.strip().rpartition("=") for part in name.split(",")]
    for source, _, weight in parts:
        if not source or not re.fullmatch(r"\d+\.?\d*|\.\d+", weight) or float(weight) == 0:
            raise ConfigError(f"data.name = {name!r} must be NAME=WEIGHT,NAME=WEIGHT with weights above 0.")
    return [(source, float(weight)) for source, _, weight in parts]


def shares(weights: Sequence[float]) -> list[int]:
    """Samples of each source in a block: BLOCK in all, by largest remainders (the first of equals), each at least 1."""
    parts = [Fraction(str(weight)) for weight in weights]  # exact, so that 0.6, 0.4 and 6, 4 are the same
    exact = [part * BLOCK / sum(parts) for part in parts]
    counts = [max(int(x), 1) for x in exact]
    while (missing := BLOCK - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        able = [i for i, n in enumerate(counts) if n + step > 0]
        counts[max(able, key=lambda i: (exact[i] - counts[i]) * step)] += step
    return counts


class MixLoader(Loader):
    """Samples of several loaders by weight; has a Loader's interface. An epoch ends with the first source's."""

    def __init__(self, loaders: Sequence[Loader], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        self.loaders, self.seed, self.T, self.shuffle = list(loaders), seed, loaders[0].T, shuffle
        self.shares = shares(weights)
        self._each = list(zip(self.shares, loaders, strict=True))
        self._bounds = np.cumsum([0, *self.shares])
        self.samples_per_epoch = min(loader.samples_per_epoch * BLOCK // n for n, loader in self._each)
        self.dropped_tokens = sum(loader.dropped_tokens for loader in loaders)
        self.dtype = np.result_type(*(loader.dtype for loader in loaders))
        self.target_dtype = np.result_type(*(loader.target_dtype for loader in loaders))
        self.documents = any(loader.documents for loader in loaders)

    @cached_property
    def fingerprint(self) -> str:
        """Of the sources' fingerprints and their shares, in order."""
        each = [f"{n} {loader.fingerprint}\n" for n, loader in self._each]
        return hashlib.sha256("".join(each).encode()).hexdigest()

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, index in that source's order) of each of the block's samples."""
        order = permutation(self.seed ^ 0x6D6978, block, BLOCK)(np.arange(BLOCK))
        source = np.searchsorted(self._bounds, order, side="right") - 1
        index = np.empty(BLOCK, np.int64)
        for s, n in enumerate(self.shares):
            index[source == s] = block * n + np.arange(n)
        return source, index

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source; times T, its tokens trained on."""
        block, rest = divmod(samples, BLOCK)
        partial = np.bincount(self._block(block)[0][:rest], minlength=len(self.shares))
        return [block * n + int(extra) for n, extra in zip(self.shares, partial, strict=True)]

    def parts(self, tokens: int) -> list[tuple[Loader, int]]:
        """As `Loader.parts`, each source's share of the tokens, and of no more than keep the shares when one ends."""
        tokens = min(tokens, *(-(-loader.samples_per_epoch * self.T * BLOCK // n) for n, loader in self._each))
        return [part for n, loader in self._each for part in loader.parts(tokens * n // BLOCK)]

    def batch(self, first_sample: int, count: int) -> Batch:
        """As `Loader.batch`. If a source has packed rows, a row of another is one document."""
        out: Batch = (np.empty((count, self.T), self.dtype), np.empty((count, self.T), self.target_dtype))
        if self.documents:
            out = (*out, np.tile(np.arange(self.T, dtype=np.int32), (count, 1)))
        for block in range(first_sample // BLOCK, -(-(first_sample + count) // BLOCK)):
            low, high = max(first_sample, block * BLOCK), min(first_sample + count, (block + 1) * BLOCK)
            source, index = (a[low - block * BLOCK : high - block * BLOCK] for a in self._block(block))
            for s, loader in enumerate(self.loaders):
                if (here := np.flatnonzero(source == s)).size:  # a source's indices are consecutive
                    rows = low - first_sample + here
                    for into, values in zip(out, loader.batch(int(index[here[0]]), here.size), strict=False):
                        into[rows] = values
        return out


def mix_of(data: DataConfig) -> list[tuple[str, float]]:
    """(data set, weight) of a configuration's mixture; [] if it has one data set, or globs. ConfigError."""
    return [] if data.train else parse_mix(data.name)


def names_of(data: DataConfig) -> list[str]:
    """The names of a configuration's data sets. ConfigError."""
    return [name for name, _ in mix_of(data)] or [data.name]


def named(data: DataConfig, name: str) -> DataConfig:
    """The same keys for the set of another name, whatever its tokenizer."""
    return replace(data, name=name, train="", val="", tokenizer="")


def open_sets(data: DataConfig, prefer: str = "", give: str = "") -> list[Dataset]:
    """The data set(s) of a configuration. prefer, give: see `open_dataset`. ConfigError, DataError."""
    globs = data.train, data.val
    return [open_dataset(name, data.dir, *globs, data.tokenizer, prefer, give) for name in names_of(data)]


def packed_rows(data: DataConfig, prefer: str = "", give: str = "") -> int:
    """T of the packed rows of a configuration's sets, 0 if none has any. ConfigError, DataError."""
    return max(rows_of(d.train + d.val) for d in open_sets(data, prefer, give))


def open_loaders(
    data: DataConfig, T: int, seed: int, V: int, shuffle: bool = True, beside: Path | None = None, prefer: str = "",
    held_out: bool = False,
) -> tuple[Dataset, Loader, Loader]:  # fmt: skip
    """The data set(s) of a configuration and the loaders of both splits; `shuffle` the training one. beside: a folder
    with the tokenizer of shards that have none. prefer: see `open_dataset`. held_out: both loaders are of the
    validation split, and the training one may be too small for a sample. ConfigError, DataError."""
    mix, sets = mix_of(data), open_sets(data, prefer)
    first = max(sets, key=lambda d: MARK in d.tokenizer_name)  # text may be in the text's part of its tokenizer
    first = first if first.folder else replace(first, folder=beside)
    known = (first.tokenizer_name, text_name(first.tokenizer_name))
    if other := next((d for d in sets if d.tokenizer_name not in known), None):
        text = known[1] if first.folder is None or not known[1].startswith("hf-") else first.folder / TOKENIZER_FILE
        raise DataError(
            f"{first.name!r} and {other.name!r} were made with tokenizers {first.tokenizer_name!r} and "
            f"{other.tokenizer_name!r}; a mixture needs one: prepare "
            f"the text of {other.name!r} with --tokenizer {text}."
        )
    eot = None
    if data.bos or data.best_fit or MARK in first.tokenizer_name:
        tokenizer = get_tokenizer(first.tokenizer_name, first.folder)
        eot = tokenizer.eot if data.bos or data.best_fit else None
        if tokenizer.pictures and T % (D := tokenizer.pictures.D):
            rule = f"must be a multiple of {D}, the tokens of a caption and its picture in {first.name!r}"
            raise ConfigError(f"batch.T = {T} {rule}; use --model.max_T {(m := -(-T // D) * D)} --batch.T {m}.")
    train, val = list[Loader](), list[Loader]()
    for d in sets:
        packed = rows_of(d.train + d.val)
        if not held_out:
            plain = partial(FittedLoader if data.best_fit else Loader, eot=eot)
            train.append((PackedLoader if packed else plain)(d.train, T, seed, shuffle, V=V))
        val.append((PackedLoader if packed else Loader)(d.val, T, shuffle=False, V=V))
    if not mix:
        return first, (train or val)[0], val[0]
    weights = [weight for _, weight in mix]
    both = [[shard for d in sets for shard in getattr(d, split)] for split in ("train", "val")]
    size = sum(d.val_bytes for d in sets) if all(d.val_bytes for d in sets) else 0
    dataset = Dataset(data.name, both[0], both[1], first.tokenizer_name, None, first.folder, size)
    return dataset, MixLoader(train or val, weights, seed, shuffle=shuffle), MixLoader(val, weights, 0, shuffle=False)
