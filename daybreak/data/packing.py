"""Packed rows: several short examples in each row of T tokens, with a mark for every token; files and loader.

    x_train_000000.bin      header | id | id | ...      a token shard as any other, of whole rows
    x_train_000000.marks    header | byte | byte ...    1: starts an example, 2: is learned, 3: both

`pack` puts the longest example first, each into the row that it fills best (best fit decreasing). An example is never
cut in two, so a row may end in padding: an example of end-of-text tokens of which nothing is learned.

The loader gives tokens, targets and positions. Of these the engine finds where each example begins, and attention stays
inside it. A target is -1 where the next token is not learned, or belongs to the next example.

Rows of text need no files: `FittedLoader` packs the documents of plain shards when it opens them, and cuts those that
fit nowhere. There attention sees all of a row.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from daybreak.data.dataset import ShardRecord, SplitRecord
from daybreak.data.loader import Batch, Loader, Starts, mapped, places_of
from daybreak.data.shards import HEADER_BYTES, ShardInfo, ShardWriter, fingerprint_shards, open_shard
from daybreak.errors import DataError, explained
from daybreak.files import flush

MAGIC, VERSION = 20261129, 1
START, LEARNED = 1, 2
WINDOW = 8192  # examples that are packed together


class Example(NamedTuple):
    """Token ids (n), which of them are learned (n), and the UTF-8 bytes that they spell."""

    ids: NDArray[np.integer]
    learned: NDArray[np.bool_]
    nbytes: int


def pack(lengths: Sequence[int], T: int, crop: bool = False) -> list[list[int]]:
    """Which examples are in each row of T tokens. Every one has 1 to T tokens and is in one row, whole.

    crop: rows are full instead, and examples may be longer. A row takes the longest that fits, again and again. Where
    none fits it takes the shortest, which the row's end cuts. Tokens that are left at last and fill no row are in none.

    `free` has a bit for every room that a row still has, so the best fit is the lowest bit from a length on.
    """
    if crop:
        return _cropped(lengths, T)
    rows: list[list[int]] = []
    by_room = defaultdict[int, list[int]](list)
    free = 0
    for example in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = free >> lengths[example]
        if fitting:
            room = lengths[example] + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            free &= ~(0 if by_room[room] else 1 << room)
        else:
            room, row = T, len(rows)
            rows.append([])
        rows[row].append(example)
        if left := room - lengths[example]:
            by_room[left].append(row)
            free |= 1 << left
    return sorted(sorted(row) for row in rows)


def _cropped(lengths: Sequence[int], T: int) -> list[list[int]]:
    """`pack` with crop. `has` has a bit for every length that waits; all above T are one."""
    waiting = defaultdict[int, deque[int]](deque)
    for example, length in enumerate(lengths):
        waiting[min(length, T)].append(example)
    rows, has = list[list[int]](), sum(1 << length for length in waiting)
    while has:
        row, room = list[int](), T
        while room and has:
            fitting = has & ((2 << room) - 1)
            length = (fitting or has & -has).bit_length() - 1
            row.append(waiting[length].popleft())
            if not waiting[length]:
                has ^= 1 << length
            room -= min(length, room)
        if not room:
            rows.append(row)
    return rows


def marks_of(shard: Path) -> Path:
    """The file with the marks of a shard."""
    return shard.with_suffix(".marks")


def row_tokens(shard: ShardInfo) -> int:
    """T of a shard of packed rows, 0 of any other. DataError for marks that do not fit the shard."""
    path = marks_of(shard.path)
    if not path.is_file():
        return 0
    with explained(DataError, f"cannot read {path}"), path.open("rb") as file:
        header, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
    magic, version, tokens, T = (int(value) for value in np.frombuffer(header[:16].ljust(16, b"\0"), "<i4"))
    if (magic, version) != (MAGIC, VERSION):
        said = f"begins with {magic}, {version} and not with {MAGIC}, {VERSION}"
        raise DataError(f"{path} are no marks that this daybreak reads: it {said}; prepare the data set again.")
    if (tokens, size) != (shard.tokens, HEADER_BYTES + tokens) or T < 1 or tokens % T:
        said = f"is for {tokens} tokens in rows of {T}, and has {size} bytes"
        raise DataError(f"{path} {said}; {shard.path} has {shard.tokens} tokens. Prepare the data set again.")
    return T


def rows_of(shards: Iterable[ShardInfo]) -> int:
    """T of shards of packed rows, 0 of others. DataError if they differ."""
    found = {row_tokens(shard): shard.path for shard in shards}
    if len(found) > 1:
        said = " and ".join(f"{path} has {f'rows of {T}' if T else 'no rows'}" for T, path in found.items())
        raise DataError(f"{said}; train on shards of one kind.")
    return next(iter(found), 0)


def open_marks(shard: ShardInfo) -> NDArray[np.uint8]:
    """The marks of a shard's tokens, mapped read-only."""
    return np.memmap(marks_of(shard.path), np.uint8, "r", HEADER_BYTES, (shard.tokens,))


class PackedLoader(Loader):
    """A loader of packed rows: a row is a sample. `batch` also gives positions. DataError for shards of other rows."""

    beyond, documents = 0, True

    def __init__(self, shards: Sequence[ShardInfo], T: int, seed: int = 0, shuffle: bool = True, *, V: int) -> None:
        if (rows := rows_of(shards)) != T:
            fix = f"use --batch.T {rows}, or prepare the data again with --row-tokens {T}"
            raise DataError(f"{shards[0].path} has rows of {rows} tokens, not of batch.T = {T}; {fix}.")
        super().__init__(shards, T, seed, shuffle, V=V)
        self.target_dtype = np.dtype(np.int32)

    @cached_property
    def fingerprint(self) -> str:
        """Of the shards and of their marks."""
        return fingerprint_shards(path for s in self.shards for path in (s.path, marks_of(s.path)))

    def batch(self, first_sample: int, count: int) -> Batch:
        """Tokens, targets (-1: not learned) and positions, all (count, T)."""
        tokens, where = self.rows(first_sample, count)
        marks = np.empty((count, self.T), np.uint8)
        for row, (shard, start) in enumerate(where):
            marks[row] = mapped(self._owner, open_marks, shard)[start : start + self.T]
        targets, places = np.full(tokens.shape, -1, np.int32), np.arange(self.T, dtype=np.int32)
        np.copyto(targets[:, :-1], tokens[:, 1:], where=marks[:, 1:] == LEARNED, casting="unsafe")
        return tokens, targets, places - np.maximum.accumulate(np.where(marks & START, places, 0), axis=1)


class Fitted(NamedTuple):
    """Rows of a shard: row i consists of the pieces ends[i - 1] to ends[i], each a run of `sizes` tokens from `starts`
    on."""

    ends: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


def fit_documents(tokens: NDArray[Any], eot: int, size: int) -> Fitted:
    """The documents of a shard, which begin with `eot`, in rows of `size` tokens by `pack` with crop."""
    at = places_of(tokens, eot)
    lengths, order, ends = np.diff(at, append=len(tokens)), list[int](), list[int]()
    for first in range(0, len(at), WINDOW):
        for row in pack(lengths[first : first + WINDOW].tolist(), size, crop=True):
            order += [first + i for i in row]
            ends.append(len(order))
    stops, chosen = np.array(ends, np.int64), np.array(order, np.int64)
    sizes = lengths[chosen]
    sizes[stops - 1] -= np.diff(np.cumsum(sizes)[stops - 1], prepend=0) - size  # the last one of a row is cut
    return Fitted(stops, at[chosen], sizes)


class FittedLoader(Loader):
    """Rows of T + 1 tokens that whole documents fill, each from its start; only the last one of a row may be cut
    (nanochat's BOS-aligned rows). Documents that fit badly are cut, and the rest of them is dropped."""

    def _divide(self, shard: ShardInfo, eot: int | None) -> tuple[Starts, int]:
        assert eot is not None
        rows = self._fitted[shard] = fit_documents(open_shard(shard), eot, self.T + 1)
        return range(len(rows.ends)), len(rows.ends) * (self.T + 1)

    @cached_property  # the constructor of Loader divides the shards, before one of ours could set it
    def _fitted(self) -> dict[ShardInfo, Fitted]:
        return {}

    def _pieces(self, shard: ShardInfo, row: int) -> Iterator[tuple[int, int]]:
        """(first token, tokens) of each piece of a row."""
        ends, starts, sizes = self._fitted[shard]
        part = slice(int(ends[row - 1]) if row else 0, int(ends[row]))
        return zip(starts[part].tolist(), sizes[part].tolist(), strict=True)

    def _read(self, out: NDArray[Any], shard: ShardInfo, start: int) -> None:
        tokens, at = mapped(self._owner, open_shard, shard), 0
        for first, size in self._pieces(shard, start):
            out[at : at + size] = tokens[first : first + size]
            at += size

    def _position(self, shard: ShardInfo, start: int, column: int) -> int:
        for first, size in self._pieces(shard, start):
            if column < size:
                return first + column
            column -= size
        raise AssertionError


class RowWriter:
    """Packs the examples of one split, and writes their rows into shards. `prefix` begins the names of the files.

    counts: of the rows, examples, tokens of theirs, learned ones among these, and bytes of text.
    """

    def __init__(self, folder: Path, prefix: str, T: int, width: int, shard_tokens: int, padding: int) -> None:
        self.folder, self.prefix, self.T, self.width, self.padding = folder, prefix, T, width, padding
        self.rows_each = max(1, shard_tokens // T)
        self.counts: Counter[str] = Counter()
        self.shards: list[ShardRecord] = []
        self._waiting: list[Example] = []
        self._writer: ShardWriter | None = None
        self._marks: list[NDArray[np.uint8]] = []  # of the rows of the open shard

    def add(self, example: Example) -> None:
        """Take an example of at most T tokens, the first of which is not learned."""
        self._waiting.append(example)
        self.counts.update(examples=1, bytes=example.nbytes, used=len(example.ids), learned=int(example.learned.sum()))
        if len(self._waiting) == WINDOW:
            self._pack()

    def _pack(self) -> None:
        examples, self._waiting = self._waiting, []
        for row in pack([len(example.ids) for example in examples], self.T):
            self._write([examples[i] for i in row])

    def _write(self, row: list[Example]) -> None:
        """A row, and padding up to T."""
        ids, marks = np.full(self.T, self.padding, np.int64), np.zeros(self.T, np.uint8)
        at = 0
        for example in row:
            n = len(example.ids)
            ids[at : at + n], marks[at : at + n] = example.ids, example.learned * np.uint8(LEARNED)
            marks[at] = START
            at += n
        marks[at : at + 1] = START  # of the padding, if there is any
        if self._writer is None:
            self._writer = ShardWriter(self.folder / f"{self.prefix}_{len(self.shards):06d}.bin", self.width)
        self._writer.write(ids)
        self._marks.append(marks)
        self.counts["rows"] += 1
        if len(self._marks) == self.rows_each:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        info, self._writer = self._writer.close(), None
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:4] = MAGIC, VERSION, info.tokens, self.T
        data = header.tobytes() + np.concatenate(self._marks).tobytes()
        self._marks = []
        with marks_of(info.path).open("wb") as file:
            file.write(data)
            flush(file)
        self.shards.append(ShardRecord.of(info, hashlib.sha256(data).hexdigest()))

    def finish(self) -> SplitRecord:
        """Write what waits, and what the manifest says of it all."""
        self._pack()
        self._finish_shard()
        tokens = sum(shard.tokens for shard in self.shards)
        return SplitRecord(tokens, self.counts["examples"], self.counts["bytes"], tuple(self.shards))

    def close(self) -> None:
        """Leave an unfinished shard, after an error."""
        if self._writer is not None:
            self._writer.abandon()


def read_examples(shards: Sequence[ShardInfo], count: int) -> list[list[tuple[NDArray[Any], bool]]]:
    """The first `count` examples of packed shards with something to learn, each as runs of ids, learned or not."""
    found: list[list[tuple[NDArray[Any], bool]]] = []
    for shard in shards:
        marks, ids = open_marks(shard), open_shard(shard)
        starts = np.flatnonzero(marks & START)
        for a, b in zip(starts, [*starts[1:], shard.tokens], strict=True):
            learned = marks[a:b] == LEARNED
            if learned.any() and len(found) < count:
                cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1), b - a]
                found.append([(np.array(ids[a + i : a + j]), bool(learned[i])) for i, j in pairwise(cuts)])
            if len(found) == count:
                return found
    return found
