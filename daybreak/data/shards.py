"""Token shards, byte for byte llm.c's: a header of 1,024 bytes, then the token ids. All numbers are little-endian.

    byte         0        4         8         12          1024
                 | magic  | version | tokens  | zeros ... | id | id | id | ...
    GPT-2's      20240520   1         an int32              uint16 each
    Llama 3's    20240801   7         an int32              uint32 each, for vocabularies above 65,536

`read_header` accepts a shard whose size is exactly what its header says. `open_shard` maps the ids, and reads none.

`ShardWriter` writes to a hidden file beside the shard's place. The header is written last, then the file is renamed:

    .x_train_000000.bin.tmp    zeros  | id | id | ...     until `close`, and after a kill
     x_train_000000.bin        header | id | id | ...     after `close`: complete

With `resume` = n the writer opens what a kill left, cuts it after n ids and continues there.

`fingerprint_shards` reads 256 KiB of each shard: enough to see at every start that the data is still the same. The
sha256 of whole files is in a prepared data set's manifest, and `daybreak doctor RUN` compares it.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daybreak.data.kinds import guess
from daybreak.errors import ConfigError, DataError, explained
from daybreak.files import flush, fsync_folder

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


def check_shard_tokens(tokens: int) -> None:
    """Raise ConfigError unless shards may have so many tokens."""
    if not 1 <= tokens <= MAX_TOKENS:
        raise ConfigError(f"shard-tokens = {tokens} must be from 1 to {MAX_TOKENS}.")


def read_header(path: str | Path) -> ShardInfo:
    """Check a shard's magic, version, token count and exact file size. DataError names file, value and rule."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is a folder, pipe or device, not a token shard; name a file.")
    with explained(DataError, f"cannot read the token shard {path}"), path.open("rb") as file:
        data = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    magic, version, tokens = (int(value) for value in np.frombuffer(data[:12].ljust(12, b"\0"), "<i4"))
    it_is = guess(data, MAGIC, MAGIC32)
    if len(data) < HEADER_BYTES:
        short = f"{size} bytes, shorter than the {HEADER_BYTES}-byte header"
        raise DataError(f"{path} is not a token shard: {short}{it_is}.")
    if magic not in (MAGIC, MAGIC32):
        raise DataError(f"{path} is not a GPT-2 token shard: magic number {magic} instead of {MAGIC}{it_is}.")
    width, known = (2, VERSION) if magic == MAGIC else (4, VERSION32)
    if version != known:
        only = f"only version {known} (uint{8 * width} tokens) is read"
        raise DataError(f"{path} has token shard version {version}; {only}.")
    if tokens <= 0:
        raise DataError(f"{path} has a token count of {tokens} in its header; it must be positive.")
    info = ShardInfo(path, tokens, width)
    if size != info.size:
        said = f"{tokens} tokens, {info.size} bytes"
        raise DataError(f"{path} has {size} bytes but its header says {said}; copy it again.")
    return info


def open_shard(shard: ShardInfo) -> np.memmap[tuple[int], np.dtype[Any]]:
    """The tokens of a shard, (tokens,), uint16 or uint32, mapped read-only."""
    return np.memmap(shard.path, _DTYPES[shard.width], "r", HEADER_BYTES, (shard.tokens,))


def resolve_shards(pattern: str | Path) -> list[Path]:
    """The files, sorted, that a glob pattern, a folder (its *.bin) or a file's name stands for. DataError for none. The
    marks of packed rows are no shards."""
    path = Path(pattern)
    named = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(pattern)))]
    found = [file for file in named if file.suffix != ".marks"]
    if path.is_dir():
        found = sorted(path.glob("*.bin"))
    if not found:
        raise DataError(f"no token shard matches {str(pattern)!r}; give a glob, a folder or a .bin file.")
    return found


def fingerprint_shards(paths: Iterable[str | Path]) -> str:
    """sha256 (hex) over names, sizes, headers and 64 evenly spaced 4 KiB blocks of each shard, in the given order.

    It is the start-up check that a run continues on the data it began with; it reads 256 KiB a shard, so a change
    between the blocks goes unseen.
    """
    digest = hashlib.sha256()
    for path in map(Path, paths):
        with explained(DataError, f"cannot read the token shard {path}"), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name}\0{size}\0".encode() + file.read(HEADER_BYTES))
            last = max(size - _BLOCK_BYTES, HEADER_BYTES)
            for i in range(_FINGERPRINT_BLOCKS):
                file.seek(HEADER_BYTES + (last - HEADER_BYTES) * i // (_FINGERPRINT_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


class ShardWriter:
    """Writes one shard: tokens stream to a hidden name beside `path`, which appears complete at `close` or not at all.

    resume: continue an unfinished (or finished) shard after so many tokens.
    """

    def __init__(self, path: str | Path, width: int = 2, resume: int = 0) -> None:
        self.path, self.width, self.tokens = Path(path), width, resume
        self._partial = self.path.with_name(f".{self.path.name}.tmp")
        if resume and not self._partial.exists():
            self.path.rename(self._partial)
        self._file = self._partial.open("r+b" if resume else "wb")
        if not resume:
            self._file.write(bytes(HEADER_BYTES))
        if resume and self._partial.stat().st_size < HEADER_BYTES + width * resume:
            raise DataError(f"{self.path} has fewer than the {resume} tokens after which it is continued.")
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
        assert self.tokens, "an empty shard"
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = *((MAGIC, VERSION) if self.width == 2 else (MAGIC32, VERSION32)), self.tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self.flush()
        self._file.close()
        os.replace(self._partial, self.path)
        fsync_folder(self.path.parent)
        return ShardInfo(self.path, self.tokens, self.width)

    def flush(self) -> None:
        """All that was written so far is on the disk."""
        flush(self._file)

    def abandon(self) -> None:
        """Close the file and leave what was written where `resume` finds it."""
        self._file.close()
