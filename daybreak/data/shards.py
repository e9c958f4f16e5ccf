"""Token shards, byte for byte llm.c's: 256 little-endian int32 (magic, version, tokens, zeros), then the ids.

GPT-2's form has uint16 ids; the Llama-3 form, for vocabularies above 65,536, has uint32 ids and its own magic number.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daybreak.errors import DataError

MAGIC, VERSION = 20240520, 1
MAGIC32, VERSION32 = 20240801, 7
HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1  # the count is an int32
_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
_FINGERPRINT_BLOCKS, _BLOCK_BYTES = 64, 4096


@dataclass(frozen=True)
class ShardInfo:
    """A shard whose header and size have been checked."""

    path: Path
    tokens: int
    width: int = 2  # bytes per token

    @property
    def size(self) -> int:
        """File size in bytes."""
        return HEADER_BYTES + self.tokens * self.width


def token_width(V: int) -> int:
    """Bytes per token of the shards of a vocabulary of V ids."""
    return 2 if V <= 1 << 16 else 4


def read_header(path: str | Path) -> ShardInfo:
    """Check a shard's magic, version, token count and exact file size. DataError names file, value and rule."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise DataError(f"cannot read the token shard {path}: {error.strerror}.") from None
    if len(data) < HEADER_BYTES:
        raise DataError(f"{path} is not a token shard: {size} bytes, shorter than the {HEADER_BYTES}-byte header.")
    magic, version, tokens = (int(value) for value in np.frombuffer(data, "<i4", 3))
    if magic not in (MAGIC, MAGIC32):
        raise DataError(f"{path} is not a GPT-2 token shard: magic number {magic} instead of {MAGIC}.")
    width, known = (2, VERSION) if magic == MAGIC else (4, VERSION32)
    if version != known:
        raise DataError(
            f"{path} has token shard version {version}; only version {known} (uint{8 * width} tokens) is read."
        )
    if tokens <= 0:
        raise DataError(f"{path} has a token count of {tokens} in its header; it must be positive.")
    info = ShardInfo(path, tokens, width)
    if size != info.size:
        raise DataError(
            f"{path} has {size} bytes but its header says {tokens} tokens, {info.size} bytes; copy it again."
        )
    return info


def open_shard(shard: ShardInfo | str | Path) -> np.memmap[tuple[int], np.dtype[Any]]:
    """The tokens of a shard, (tokens,), uint16 or uint32, mapped read-only. A path is checked first (DataError)."""
    info = shard if isinstance(shard, ShardInfo) else read_header(shard)
    return np.memmap(info.path, _DTYPES[info.width], "r", HEADER_BYTES, (info.tokens,))


def resolve_shards(*patterns: str | Path) -> list[Path]:
    """The files that glob patterns, folders (their *.bin) and file names stand for, sorted by path within each.

    Raises DataError for one that matches nothing.
    """
    paths: list[Path] = []
    for pattern in patterns:
        found = [str(pattern)] if Path(pattern).is_file() else sorted(glob.glob(str(pattern)))
        if Path(pattern).is_dir():
            found = [str(path) for path in sorted(Path(pattern).glob("*.bin"))]
        if not found:
            raise DataError(f"no token shard matches {str(pattern)!r}; give a glob, a folder or a .bin file.")
        paths += [Path(name) for name in found]
    return paths


def fingerprint_shards(paths: Iterable[str | Path]) -> str:
    """sha256 (hex) over names, sizes, headers and 64 evenly spaced 4 KiB blocks of each shard, in the given order.

    It is the start-up check that a run continues on the data it began with; it reads 256 KiB a shard, so a change
    between the blocks goes unseen.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{path.name}\0{size}\0".encode() + file.read(HEADER_BYTES))
                last = max(size - _BLOCK_BYTES, HEADER_BYTES)
                for i in range(_FINGERPRINT_BLOCKS):
                    file.seek(HEADER_BYTES + (last - HEADER_BYTES) * i // (_FINGERPRINT_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
        except OSError as error:
            raise DataError(f"cannot read the token shard {path}: {error.strerror}.") from None
    return digest.hexdigest()


def fsync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class ShardWriter:
    """Writes one shard: tokens stream to a hidden name beside `path`, which appears complete at `close` or not at all.

    As a context manager: an exception inside the block discards the shard. Raises DataError if it ends up empty.
    `resume` goes on after the first that many tokens of an unfinished (or finished) shard at `path`.
    """

    def __init__(self, path: str | Path, width: int = 2, resume: int = 0) -> None:
        self.path, self.width, self.tokens = Path(path), width, resume
        self._partial = self.path.with_name(f".{self.path.name}.tmp")
        if resume and not self._partial.exists():
            self.path.rename(self._partial)
        self._file = self._partial.open("r+b" if resume else "wb")
        if not resume:
            self._file.write(bytes(HEADER_BYTES))
        self._file.truncate(HEADER_BYTES + width * resume)
        self._file.seek(0, os.SEEK_END)

    def write(self, tokens: Sequence[int] | NDArray[np.integer]) -> None:
        """Append token ids, each below 65536 (2^32 where width is 4), at most 2^31 - 1 in all."""
        array, dtype = np.asarray(tokens), _DTYPES[self.width]
        fits = array.size == 0 or (array.min() >= 0 and array.max() <= np.iinfo(dtype).max)
        assert fits, f"token ids must fit in {dtype}"
        assert self.tokens + array.size <= MAX_TOKENS, "a shard holds fewer than 2^31 tokens"
        self._file.write(array.astype(dtype).tobytes())
        self.tokens += array.size

    def close(self) -> ShardInfo:
        """Finish the header, flush to disk and give the file its name."""
        if not self.tokens:
            self.discard()
            raise DataError(f"{self.path} would be an empty token shard.")
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = *((MAGIC, VERSION) if self.width == 2 else (MAGIC32, VERSION32)), self.tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self.path)
        fsync_folder(self.path.parent)
        return ShardInfo(self.path, self.tokens, self.width)

    def flush(self) -> None:
        """What was written so far is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close the file and leave what was written where `resume` finds it."""
        self._file.close()

    def discard(self) -> None:
        """Drop everything written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
