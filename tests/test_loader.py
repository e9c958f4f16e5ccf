"""The sample order against a plain-integer permutation, and batches against shards laid out by hand."""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from patience import until

from daybreak.data.loader import Loader, ahead, permutation
from daybreak.data.shards import ShardInfo, fingerprint_shards
from daybreak.errors import DataError


def write_shard(path: Path, tokens: Sequence[int]) -> ShardInfo:
    header = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))
    return ShardInfo(path, len(tokens))


def write_shards(folder: Path, sizes: Sequence[int]) -> list[ShardInfo]:
    """Shards whose tokens count on from shard to shard, so that a sample's first token is its place in the whole."""
    starts = itertools.accumulate(sizes, initial=0)
    return [
        write_shard(folder / f"s_{i:03d}.bin", range(start, start + size))
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


class Masked(Loader):
    """Only targets that a number divides are learned: the rule that a mask of answers in a conversation would be."""

    divisor = 3

    def batch(self, first_sample: int, count: int) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
        tokens, targets = super().batch(first_sample, count)
        return tokens, np.where(targets % self.divisor == 0, targets.astype(np.int64), -1)


def rows(loader: Loader, first: int, count: int) -> NDArray[np.generic]:
    """Samples as T + 1 tokens: the inputs, and the last target. The other targets are the inputs that follow."""
    tokens, targets = loader.batch(first, count)
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert tokens.dtype == targets.dtype == loader.dtype
    return np.concatenate([tokens, targets[:, -1:]], 1)


def permutation_by_integers(seed: int, epoch: int, n: int) -> list[int]:
    """The same Feistel network in Python integers."""
    m = 2**64

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % m
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % m
        return x ^ (x >> 31)

    half = 3
    while 4**half < n:
        half += 1
    key = mix((mix(seed % m) + epoch) % m)
    keys = [mix((key + r * 0x9E3779B97F4A7C15) % m) for r in range(1, 9)]

    def encrypt(x: int) -> int:
        left, right = divmod(x, 2**half)
        for k in keys:
            left, right = right, left ^ (mix((right + k) % m) % 2**half)
        return left * 2**half + right

    out = []
    for i in range(n):
        x = encrypt(i)
        while x >= n:
            x = encrypt(x)
        out.append(x)
    return out


@pytest.mark.parametrize("n", [1, 2, 3, 7, 63, 64, 65, 97, 1000, 1024, 1025, 4097])
def test_permutation_is_the_documented_bijection(n: int) -> None:
    for seed, epoch in ((0, 0), (42, 0), (42, 1), (-1, 3), (2**63, 7)):
        order = permutation(seed, epoch, n)(np.arange(n))
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(n))
        assert order.tolist() == permutation_by_integers(seed, epoch, n)


def test_permutation_of_integers_shapes_and_a_large_range() -> None:
    p = permutation(42, 5, 10)
    assert [int(p(i)) for i in range(10)] == p(np.arange(10)).tolist()
    assert p(np.arange(10).reshape(2, 5)).tolist() == p(np.arange(10)).reshape(2, 5).tolist()
    big = 10**9 + 7
    some = permutation(42, 0, big)(np.arange(100_000))
    assert len(set(some.tolist())) == 100_000
    assert some.min() >= 0
    assert some.max() < big
    assert abs(some.mean() / big - 0.5) < 0.01


def test_every_order_of_a_small_set_is_about_equally_likely() -> None:
    orders = Counter(tuple(permutation(1, epoch, 3)(np.arange(3)).tolist()) for epoch in range(600))
    assert len(orders) == 6
    assert all(60 <= count <= 140 for count in orders.values())  # 100 +- 4.4 sigma


def test_permutations_of_other_epochs_and_seeds_are_unrelated() -> None:
    n = 5000
    base = permutation(42, 0, n)(np.arange(n))
    for other in (permutation(42, 1, n)(np.arange(n)), permutation(43, 0, n)(np.arange(n)), np.arange(n)):
        assert (base == other).sum() < 10  # 1 expected
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.06  # 4 sigma


@pytest.mark.parametrize(
    ("sizes", "T", "samples", "dropped"),
    [
        ([2], 1, 1, 0),
        ([3], 1, 2, 0),
        ([4], 1, 3, 0),
        ([9, 8], 4, 3, 3),  # 8 tokens hold one sample of 5, and 3 more
        ([30, 5, 4, 41], 4, 7 + 1 + 0 + 10, 1 + 0 + 4 + 0),
        ([101 * 3 + 1], 3, 101, 0),
    ],
)
def test_an_epoch_covers_every_sample_exactly_once(
    tmp_path: Path, sizes: list[int], T: int, samples: int, dropped: int
) -> None:
    shards = write_shards(tmp_path, sizes)
    loader = Loader(shards, T, seed=7, V=50257)
    assert (loader.samples_per_epoch, loader.dropped_tokens) == (samples, dropped)
    starts = [
        base + k * T
        for base, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False)
        for k in range((size - 1) // T)
    ]
    orders = []
    for epoch in range(3):
        batch = rows(loader, epoch * samples, samples)
        assert batch.dtype == np.uint16
        assert batch.shape == (samples, T + 1)
        assert (batch - batch[:, :1] == np.arange(T + 1)).all()  # consecutive tokens
        assert sorted(batch[:, 0].tolist()) == starts
        assert batch[:, 0].tolist() == [starts[k] for k in permutation_by_integers(7, epoch, samples)]
        orders.append(batch[:, 0].tolist())
    if samples > 10:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert starts not in orders
    straight = Loader(shards, T, shuffle=False, V=50257).batch(0, 2 * samples)[0][:, 0].tolist()
    assert straight == starts + starts


def test_a_batch_does_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    loader = Loader(write_shards(tmp_path, [30, 41]), 4, seed=3, V=50257)
    n = loader.samples_per_epoch
    for first in (0, n - 6, 5 * n - 1):  # within an epoch, across its end
        whole = rows(loader, first, 12)
        for cut in (1, 5, 6, 11):
            parts = [rows(loader, first, cut), rows(loader, first + cut, 12 - cut)]
            assert (np.concatenate(parts) == whole).all()
    assert (rows(loader, 0, 4 * n)[2 * n - 3 : 3 * n + 3] == rows(loader, 2 * n - 3, n + 6)).all()
    assert [part.shape for part in loader.batch(5, 0)] == [(0, 4), (0, 4)]
    again = Loader(loader.shards, 4, seed=3, V=50257)
    assert (rows(again, 9, 30) == rows(loader, 9, 30)).all()
    assert (rows(Loader(loader.shards, 4, seed=4, V=50257), 9, 30) != rows(loader, 9, 30)).any()


def test_more_shards_than_are_kept_open_and_many_threads(tmp_path: Path) -> None:
    loader = Loader(write_shards(tmp_path, [7] * 300), 3, seed=1, V=50257)
    assert loader.samples_per_epoch == 600
    whole = rows(loader, 0, 600)
    assert sorted(whole[:, 0].tolist()) == [7 * s + k for s in range(300) for k in (0, 3)]
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda first: rows(loader, first, 20), range(0, 600, 20)))
    assert (np.concatenate(parts) == whole).all()


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    a = write_shard(tmp_path / "a.bin", [1] * 9)
    b = write_shard(tmp_path / "b.bin", [1, 2, 3, 4, 5, 257, 256])
    message = r"b\.bin has token 257 at position 5, outside the vocabulary of 257"
    for shuffle in (True, False):
        with pytest.raises(DataError, match=message):
            Loader([a, b], 3, shuffle=shuffle, V=257).batch(0, 4)
    assert rows(Loader([a, b], 3, shuffle=False, V=258), 3, 1).tolist() == [[4, 5, 257, 256]]


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [8, 8])
    assert Loader(shards, 7, V=257).samples_per_epoch == 2
    with pytest.raises(
        DataError, match=r"too small: a sample needs T \+ 1 = 9 tokens .*, the largest, has 8; .*--val-fraction"
    ):
        Loader(shards, 8, V=257)
    with pytest.raises(DataError, match="too small"):
        Loader([], 8, V=257)


def test_fingerprint_is_the_shards(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [8, 8])
    assert Loader(shards, 3, seed=1, V=257).fingerprint == fingerprint_shards([s.path for s in shards])


def test_ahead_works_within_its_depth_and_in_order() -> None:
    computed: list[int] = []

    def square(i: int) -> int:
        computed.append(i)
        time.sleep(0.001 * (i % 3))
        return i * i

    with closing(ahead(square, itertools.count(5), threads=2, depth=3)) as squares:
        for i in range(20):
            assert next(squares) == (5 + i) ** 2
            until(lambda i=i: len(computed) == i + 3)  # two more than were taken
            assert sorted(computed) == list(range(5, 5 + i + 3))
    assert len(computed) == 22
    with pytest.raises(StopIteration):
        next(squares)
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
    assert list(ahead(square, range(4), threads=1, depth=9)) == [0, 1, 4, 9]
    assert list(ahead(square, range(0), threads=1, depth=1)) == []


def test_ahead_raises_in_turn() -> None:
    def fails_at_two(i: int) -> int:
        if i == 2:
            raise DataError("shard 2 is gone")
        return i

    items = ahead(fails_at_two, itertools.count(), threads=1, depth=4)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match="shard 2 is gone"):
        next(items)
    with pytest.raises(StopIteration):
        next(items)
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
