"""Token shards against bytes laid out by hand from llm.c's format."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from daybreak.data.shards import ShardInfo, ShardWriter, fingerprint_shards, open_shard, read_header, resolve_shards
from daybreak.errors import DataError

TOKENS = [50256, 0, 1, 65535, 15496, 995]


def shard_bytes(tokens: Sequence[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    header = struct.pack("<3i", magic, version, len(tokens) if count is None else count)
    return header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}H", *tokens)


def test_reads_a_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(shard_bytes(TOKENS))
    info = read_header(path)
    assert info == ShardInfo(path, 6)
    assert info.size == 1036 == path.stat().st_size
    tokens = open_shard(info)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == TOKENS
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes, shorter than the 1024-byte header"),
        (shard_bytes(TOKENS)[:1023], "1023 bytes, shorter than the 1024-byte header"),
        (b"<!DOCTYPE html>".ljust(2000), "magic number 1329865020 instead of 20240520"),
        (shard_bytes(TOKENS, magic=20240803), "magic number 20240803 instead of 20240520"),
        (shard_bytes(TOKENS, magic=20240801), "version 1; only version 7 (uint32 tokens)"),
        (shard_bytes(TOKENS, version=7), "version 7; only version 1"),
        (shard_bytes(TOKENS, count=0), "token count of 0"),
        (shard_bytes(TOKENS, count=-5), "token count of -5"),
        (shard_bytes(TOKENS)[:-1], "1035 bytes but its header says 6 tokens, 1036 bytes"),
        (shard_bytes(TOKENS) + b"\0", "1037 bytes but its header says 6 tokens, 1036 bytes"),
        (shard_bytes(TOKENS, count=2**31 - 1), "1036 bytes but its header says 2147483647 tokens"),
    ],
)
def test_refuses_what_is_not_a_shard(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.bin") as error:
        read_header(path)
    assert reason in str(error.value)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.bin \(No such file"):
        read_header(tmp_path / "none.bin")


def test_writer_lays_out_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    writer = ShardWriter(path)
    writer.write(TOKENS[:2])
    writer.write(np.array(TOKENS[2:], np.int64))
    assert not path.exists()
    assert writer.close() == ShardInfo(path, 6)
    assert path.read_bytes() == shard_bytes(TOKENS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_writer_leaves_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(shard_bytes([7]))

    writer = ShardWriter(path)
    writer.write(TOKENS)
    with pytest.raises(AssertionError, match="uint16"):
        writer.write([65536])
    writer.abandon()
    assert path.read_bytes() == shard_bytes([7])
    writer = ShardWriter(path, resume=4)  # the first four of what was written, and what follows now
    writer.write(TOKENS[4:])
    writer.close()
    assert path.read_bytes() == shard_bytes(TOKENS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_resolve_shards(tmp_path: Path) -> None:
    for name in ("b_2.bin", "b_10.bin", "a.bin", "notes.txt", "odd[1].bin"):
        (tmp_path / name).write_bytes(shard_bytes([1]))

    def names(pattern: str) -> list[str]:
        return [path.name for path in resolve_shards(str(tmp_path / pattern))]

    assert names("b_*.bin") == ["b_10.bin", "b_2.bin"]
    assert names("") == ["a.bin", "b_10.bin", "b_2.bin", "odd[1].bin"]
    assert names("odd[1].bin") == ["odd[1].bin"]
    with pytest.raises(DataError, match=r"no token shard matches '.*c_\*\.bin'"):
        names("c_*.bin")


def test_fingerprint_sees_names_sizes_headers_and_blocks(tmp_path: Path) -> None:
    n = 64 * 4096  # tokens: the 64 blocks of 4 KiB cover half of the body
    body = np.random.default_rng(0).integers(0, 50257, n).tolist()
    good = shard_bytes(body)
    a, b = tmp_path / "a.bin", tmp_path / "b.bin"
    a.write_bytes(good)
    b.write_bytes(shard_bytes(TOKENS))
    reference = fingerprint_shards([a, b])
    (tmp_path / "elsewhere").mkdir()
    moved = [Path(shutil.copy(path, tmp_path / "elsewhere")) for path in (a, b)]
    assert fingerprint_shards(moved) == reference

    seen = {reference, fingerprint_shards([b, a]), fingerprint_shards([a])}
    spacing = (2 * n - 4096) / 63
    offsets = [1024 + int(spacing * block) + 2048 for block in range(64)] + [1024, len(good) - 1, 1023]
    for offset in offsets:
        changed = bytearray(good)
        changed[offset] ^= 1
        a.write_bytes(changed)
        seen.add(fingerprint_shards([a, b]))
    a.write_bytes(good + b"\0")
    seen.add(fingerprint_shards([a, b]))
    renamed = a.rename(tmp_path / "c.bin")
    renamed.write_bytes(good)
    seen.add(fingerprint_shards([renamed, b]))
    assert len(seen) == 3 + len(offsets) + 2
    with pytest.raises(DataError, match=r"cannot read the token shard .*a\.bin"):
        fingerprint_shards([a])
