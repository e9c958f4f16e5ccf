"""Text to token shards: `data/NAME/{manifest.json, NAME_train_%06d.bin, NAME_val_%06d.bin}`.

Every document is preceded by EOT and documents run on across shards, as in llm.c. The text is cut into units that
depend on the source alone; threads encode them (tiktoken releases the GIL) and they are written in order, so the files
are the same for any number of workers. A bounded number of units is in flight. The dataset is built in a hidden folder
beside its place and renamed into it at the end: it is there complete, or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daybreak.data.dataset import MANIFEST, Manifest, ShardRecord, SplitRecord, check_name, dataset_name
from daybreak.data.shards import MAX_TOKENS, ShardWriter, fsync_folder
from daybreak.data.sources import SPLITS, Piece, Source, resolve_source
from daybreak.data.tokenizer import Tokenizer, get_tokenizer
from daybreak.errors import ConfigError, DataError

UNIT = 1 << 20  # characters a worker encodes at a time

Progress = Callable[[int, int, int], None]
Encoded = dict[str, NDArray[np.uint16]]


@dataclass
class _Split:
    """One split being written: its shards so far and its counts."""

    prefix: str
    folder: Path
    shard_tokens: int
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    shards: list[ShardRecord] = field(default_factory=list)
    writer: ShardWriter | None = None

    def write(self, tokens: NDArray[np.uint16]) -> None:
        self.tokens += tokens.size
        while tokens.size:
            if self.writer is None:
                self.writer = ShardWriter(self.folder / f"{self.prefix}_{len(self.shards):06d}.bin")
            room = self.shard_tokens - self.writer.tokens
            self.writer.write(tokens[:room])
            tokens = tokens[room:]
            if self.writer.tokens == self.shard_tokens:
                self.finish_shard()

    def finish_shard(self) -> None:
        if self.writer is not None:
            info, self.writer = self.writer.close(), None
            with info.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.shards.append(ShardRecord(info.path.name, info.tokens, info.size, digest))

    def discard(self) -> None:
        if self.writer is not None:
            self.writer.discard()

    def record(self) -> SplitRecord:
        self.finish_shard()
        return SplitRecord(self.tokens, self.documents, self.bytes, tuple(self.shards))


def prepare(
    names: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    data_dir: str | Path = "data",
    tokenizer: str = "gpt2",
    val_fraction: float | None = None,
    shard_tokens: int = 100_000_000,
    workers: int = 0,
    text_field: str = "text",
    progress: Progress | None = None,
) -> Manifest:
    """Tokenize a catalogue dataset, or text and JSON Lines files and folders of them, into `data_dir/NAME`.

    name: the dataset's; by default the catalogue name or the first path's stem, with `-TOKENIZER` appended unless that
    is gpt2. val_fraction: see `sources.file_source`. workers: threads, 0 = all cores; they don't change the result.
    progress(done, total, tokens) is called as units are written, in UTF-8 bytes of text; `total` is an estimate until
    the last call. A dataset of the same name, source and tokenizer is replaced; any other is a ConfigError.
    Raises DataError for text that cannot be read or is too little for both splits; nothing is then left behind.
    """
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise ConfigError(f"shard-tokens = {shard_tokens} must be from 1 to {MAX_TOKENS}.")
    if workers < 0:
        raise ConfigError(f"workers = {workers} must be 0 (all cores) or more.")
    encoder = get_tokenizer(tokenizer)
    source = resolve_source([names] if isinstance(names, str | Path) else names, text_field, val_fraction)
    name = name or dataset_name(source.name, tokenizer)
    check_name(name)
    final = Path(data_dir) / name
    _check_replaceable(final, source, tokenizer)
    try:
        with _workspace(final) as folder:
            return _build(folder, name, source, encoder, shard_tokens, workers or os.cpu_count() or 1, progress)
    except OSError as error:
        raise DataError(f"preparing {name!r} failed: {error}.") from error


def _build(
    folder: Path,
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    shard_tokens: int,
    workers: int,
    progress: Progress | None,
) -> Manifest:
    splits = {split: _Split(f"{name}_{split}", folder, shard_tokens) for split in SPLITS}
    digest = hashlib.sha256()

    def counted() -> Iterator[Piece]:
        for piece in source.pieces():
            data = piece.text.encode()
            digest.update(data)
            splits[piece.split].documents += piece.starts
            splits[piece.split].bytes += len(data)
            yield piece

    def report(total: int) -> None:
        if progress is not None:
            done, tokens = (sum(getattr(split, key) for split in splits.values()) for key in ("bytes", "tokens"))
            progress(done, max(done, total), tokens)

    try:
        for encoded in _encode(_units(counted()), tokenizer, workers):
            for key, tokens in encoded.items():
                splits[key].write(tokens)
            report(source.size)
        train, val = (splits[key].record() for key in SPLITS)
    finally:
        for split in splits.values():
            split.discard()
    if not (train.tokens and val.tokens):
        raise DataError(f"{source.origin} is too little text to split into train and val; add more.")
    report(0)
    revision = source.revision or f"sha256:{digest.hexdigest()}"
    manifest = Manifest(
        name, tokenizer.name, tokenizer.fingerprint, source.origin, revision, source.licence, train, val
    )
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    return manifest


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _encode_unit(tokenizer: Tokenizer, unit: Sequence[Piece]) -> Encoded:
    eot = np.array([tokenizer.eot], np.uint16)
    parts: dict[str, list[NDArray[np.uint16]]] = {}
    for piece in unit:
        part = parts.setdefault(piece.split, [])
        if piece.starts:
            part.append(eot)
        part.append(tokenizer.encode(piece.text))
    return {split: np.concatenate(part) for split, part in parts.items()}


def _encode(units: Iterable[list[Piece]], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """The encoded units in their order, at most two a worker in flight."""
    pending: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers, "prepare") as pool:
        try:
            for unit in units:
                pending.append(pool.submit(_encode_unit, tokenizer, unit))
                if len(pending) >= 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _check_replaceable(final: Path, source: Source, tokenizer: str) -> None:
    if not final.exists():
        return
    if not (final / MANIFEST).is_file():
        raise ConfigError(f"{final} exists and is not a prepared dataset; choose another --name.")
    old = Manifest.load(final / MANIFEST)
    if (old.source, old.tokenizer) != (source.origin, tokenizer):
        raise ConfigError(
            f"{final} exists, made from {old.source} with tokenizer {old.tokenizer!r}; choose another --name or "
            "delete it."
        )
    ours = {MANIFEST, *(shard.file for split in (old.train, old.val) for shard in split.shards)}
    if foreign := sorted(path.name for path in final.iterdir() if path.name not in ours):
        raise ConfigError(f"{final} also holds {foreign[0]!r}, which is not part of the dataset; move it away first.")


@contextmanager
def _workspace(final: Path) -> Iterator[Path]:
    """An empty folder beside `final` that takes its place when the block ends well, and vanishes otherwise."""
    folder, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{final} is being prepared by another process; wait for it or choose another --name."
            ) from None
        for leftover in folder.iterdir():  # of a prepare that was killed
            leftover.unlink()
        try:
            yield folder
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            fsync_folder(folder)
            folder.rename(final)
            fsync_folder(final.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        os.close(fd)
