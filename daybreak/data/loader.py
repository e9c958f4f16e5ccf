"""Batches as a pure function: sample i of one infinite order over the shards, permuted anew in every epoch.

A sample is T + 1 tokens inside one shard: T inputs, and as targets the tokens that follow each. A shard of n tokens has
(n - 1) // T samples, at fixed places. A target of -1 is neither learned nor counted: token shards have none, but a
loader may mask targets that way. Epoch e visits sample `permutation(seed, e, n)(i)` at its i-th place. Nothing is
remembered between calls, so ranks, micro-batches and resumed runs only choose which part of the order they read.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from daybreak.data.shards import ShardInfo, fingerprint_shards, open_shard
from daybreak.errors import DataError

Batch = tuple[NDArray[Any], ...]  # tokens and targets (samples, T); of packed rows also positions (data/packing.py)
Starts = range | NDArray[np.int64]
Item = TypeVar("Item")
Result = TypeVar("Result")

_ROUNDS = 8
_SCAN = 1 << 24  # tokens
_MASK64 = (1 << 64) - 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea & Flood 2014), element-wise."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(seed: int, epoch: int, n: int) -> Callable[[NDArray[np.int64] | int], NDArray[np.int64]]:
    """A bijection on [0, n) keyed by (seed, epoch), as a function on an int or an int64 array of any shape.

    A Feistel network over the next even power of two, walked along its cycles until the value is below n
    (Black & Rogaway 2002): constant memory, any element in a few steps, no state. O(1) a value.
    """
    assert n >= 1
    half = np.uint64(max(3, -(-(n - 1).bit_length() // 2)))  # with 2-bit halves, 8 rounds favour some orders
    low = np.uint64((1 << int(half)) - 1)
    key = _mix(_mix(np.array([seed & _MASK64], np.uint64)) + np.uint64(epoch))
    keys = _mix(key + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

    def encrypt(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (_mix(right + k) & low)
        return (left << half) | right

    def permute(i: NDArray[np.int64] | int) -> NDArray[np.int64]:
        x = encrypt(np.atleast_1d(np.asarray(i, np.uint64)))
        while (outside := x >= n).any():
            x[outside] = encrypt(x[outside])
        return x.astype(np.int64).reshape(np.shape(i))

    return permute


@lru_cache(maxsize=min(256, max(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0] % 2**31 // 4)))
def mapped(owner: object, opener: Callable[[ShardInfo], NDArray[Any]], shard: ShardInfo) -> NDArray[Any]:
    """A loader's shard, mapped on demand. A map holds a file descriptor, and the process has few of them: all loaders
    share them. One that is dropped stays valid for the thread that is reading it."""
    return opener(shard)


class Loader:
    """The samples of `shards` in the order of (seed, epoch); `shuffle=False` reads them in file order (validation).

    T: tokens a sample predicts. V: ids at or above it are a DataError. DataError too when no shard holds T + 1 tokens.
    eot: given, every sample starts at one of these tokens, so at a document's start (all shards are read once to find
    them): the next document that starts T or more tokens after the last sample did; what lies between is dropped.
    `samples_per_epoch`: the number of samples. `dropped_tokens`: those that no sample contains.
    """

    beyond, documents = 1, False  # tokens that a sample needs behind its T inputs; whether rows hold several documents

    def __init__(
        self, shards: Sequence[ShardInfo], T: int, seed: int = 0, shuffle: bool = True, *, V: int,
        eot: int | None = None,
    ) -> None:  # fmt: skip
        self.shards, self.T, self.V, self.seed, self.shuffle = list(shards), T, V, seed, shuffle
        self.dtype = np.dtype(np.uint32 if any(shard.width == 4 for shard in self.shards) else np.uint16)
        self.target_dtype = self.dtype
        divided = [self._divide(shard, eot) for shard in self.shards]
        self._starts = [starts for starts, _ in divided]
        counts = list(map(len, self._starts))
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.samples_per_epoch = sum(counts)
        self.dropped_tokens = sum(shard.tokens for shard in self.shards) - sum(used for _, used in divided)
        if not self.samples_per_epoch:
            largest = max(self.shards, key=lambda shard: shard.tokens, default=None)
            has = f"{largest.path}, the largest, has {largest.tokens}" if largest else "there is none"
            said = f"the data is too small: a sample needs T + 1 = {T + 1} tokens inside one shard, and {has}"
            fix = "use more data, for validation a larger --val-fraction of prepare"
            raise DataError(f"{said}; {fix}, or a smaller --batch.T of train, finetune or import.")
        self._owner = object()

    def _divide(self, shard: ShardInfo, eot: int | None) -> tuple[Starts, int]:
        """Where the samples of a shard start, as `_read` understands it, and how many tokens are in any of them."""
        if eot is None:
            places = range(0, shard.tokens - self.T + 1 - self.beyond, self.T)
            return places, len(places) * self.T + self.beyond if places else 0
        starts = document_starts(open_shard(shard), eot, self.T)
        return starts, int(np.minimum(np.diff(starts, append=2**62), self.T + 1).sum())  # neighbours may share a token

    def _read(self, out: NDArray[Any], shard: ShardInfo, start: int) -> None:
        """Copy the sample of a shard that has this start to `out` (T + beyond)."""
        out[:] = mapped(self._owner, open_shard, shard)[start : start + len(out)]

    def _position(self, shard: ShardInfo, start: int, column: int) -> int:
        """Where in the shard a token of a sample is."""
        return start + column

    @cached_property
    def fingerprint(self) -> str:
        """`fingerprint_shards` of the shards, in order."""
        return fingerprint_shards(shard.path for shard in self.shards)

    def batch(self, first_sample: int, count: int) -> Batch:
        """Tokens and targets, both (count, T), of samples first_sample, first_sample + 1 ... of the infinite order.
        Thread-safe."""
        out, _ = self.rows(first_sample, count)
        return out[:, :-1], out[:, 1:]

    def rows(self, first_sample: int, count: int) -> tuple[NDArray[Any], list[tuple[ShardInfo, int]]]:
        """The tokens (count, T + beyond) of these samples, and where each begins: a shard and a place there."""
        epochs, places = np.divmod(np.arange(first_sample, first_sample + count), self.samples_per_epoch)
        if self.shuffle:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                places[here] = permutation(self.seed, int(epoch), self.samples_per_epoch)(places[here])
        out = np.empty((count, self.T + self.beyond), self.dtype)
        shard_of = np.searchsorted(self._ends, places, side="right")
        pairs = zip(places.tolist(), shard_of.tolist(), strict=True)
        where = [(self.shards[s], self._start(place, s)) for place, s in pairs]
        for row, (shard, start) in enumerate(where):
            self._read(out[row], shard, start)
        if out.size and out.max() >= self.V:
            row, column = (int(k[0]) for k in np.nonzero(out >= self.V))
            shard, start = where[row]
            said = f"{shard.path} has token {out[row, column]} at position {self._position(shard, start, column)}"
            raise DataError(f"{said}, outside the vocabulary of {self.V}; the data was made with another tokenizer.")
        return out, where

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source: there is one (see mixing.MixLoader)."""
        return [samples]

    def parts(self, tokens: int) -> list[tuple[Loader, int]]:
        """(loader, samples from its first) that hold the first `tokens` tokens: at least one sample, at most all."""
        return [(self, max(1, min(tokens // self.T, self.samples_per_epoch)))]

    def _start(self, place: int, s: int) -> int:
        return int(self._starts[s][place - (int(self._ends[s - 1]) if s else 0)])


def places_of(tokens: NDArray[Any], eot: int) -> NDArray[np.int64]:
    """Places of `eot`."""
    return np.concatenate([np.flatnonzero(tokens[i : i + _SCAN] == eot) + i for i in range(0, len(tokens), _SCAN)])


def document_starts(tokens: NDArray[Any], eot: int, T: int) -> NDArray[np.int64]:
    """Places of `eot`, the first and then always the next one at least T tokens on, with T tokens behind each."""
    at = places_of(tokens, eot)
    at = at[at + T < len(tokens)]
    following = np.searchsorted(at, at + T).tolist()
    chosen, i = [], 0
    while i < len(at):
        chosen.append(i)
        i = following[i]
    return at[chosen]


def ahead(
    fn: Callable[[Item], Result], items: Iterable[Item], threads: int, depth: int
) -> Generator[Result, None, None]:
    """fn of each item, in their order, on `threads` threads, at most `depth` begun and not yet taken.

    What fn raises is raised in its turn and ends the iteration, as closing the generator does.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for item in items:
                pending.append(pool.submit(fn, item))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
