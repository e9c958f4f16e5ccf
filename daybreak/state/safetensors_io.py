"""safetensors files, streamed: writing hashes and fsyncs in one pass, reading copies any element range.

The `safetensors` package clones every tensor to save it and can neither hash nor fsync; a checkpoint of 20 GB needs
both, in bounded memory. The package checks the headers of files that are read, but maps a file to read its values: all
pages would then count as memory of the process. Format: u64 little-endian header length, JSON header, then the tensors'
bytes back to back (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from daybreak.checked import MOST_BYTES
from daybreak.data.kinds import HEAD, identify
from daybreak.errors import CheckpointError, explained
from daybreak.files import flush

CHUNK = 16 << 20  # bytes staged at a time, on the way out and in

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None,
    parts: Callable[[str], Iterable[tuple[int, torch.Tensor]]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write contiguous tensors of any device to a new file, fsynced. The tensors must not change meanwhile.

    Returns the file's size in bytes and its sha256 in hex, as "size" and "sha256".

    parts: gives a tensor's values one piece after the other; of `tensors` only shapes and dtypes are read then.
    Raises OSError (FileExistsError: the file is there already).
    """
    # Largest items first, as the library itself does: every tensor then starts at a multiple of its item size.
    ordered = _ordered(tensors)
    digest = hashlib.sha256()
    with open(path, "xb") as file, ThreadPoolExecutor(1) as hasher:
        header = _header(ordered, metadata or {})
        file.write(header)
        digest.update(header)
        pieces = (piece for name, whole in ordered for _, piece in (parts(name) if parts else [(0, whole)]))
        for chunk in chain.from_iterable(map(_chunks, pieces)):
            # hashlib and write both release the GIL: the slower of the two sets the pace.
            hashing = hasher.submit(digest.update, chunk)
            file.write(chunk)
            hashing.result()
        flush(file)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def _ordered(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return sorted(tensors.items(), key=lambda item: -item[1].element_size())


def create_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make a new file for tensors of which only shape and dtype are read; several processes then `fill_safetensors`."""
    header = _header(_ordered(tensors), {})
    with open(path, "xb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in tensors.values()))
        flush(file)


def fill_safetensors(path: Path, parts: Mapping[str, Iterable[tuple[int, torch.Tensor]]]) -> None:
    """Write parts of tensors, (first element, 1-D tensor), into a file that `create_safetensors` made; fsynced."""
    entries = SafetensorsFile(path).entries
    with open(path, "r+b") as file:
        for name, pieces in parts.items():
            for first, tensor in pieces:
                assert tensor.dtype == entries[name].dtype
                file.seek(entries[name].offset + first * tensor.element_size())
                for chunk in _chunks(tensor):
                    file.write(chunk)
        flush(file)


def _header(tensors: list[tuple[str, torch.Tensor]], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors:
        assert name != "__metadata__"
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes: views of its own memory, or of one pinned buffer that the next chunk overwrites."""
    assert tensor.is_contiguous()
    parts = _split(tensor.detach().view(-1).view(torch.uint8), CHUNK)
    if tensor.device.type == "cpu":
        yield from (part.numpy().data for part in parts)
    else:
        staging = torch.empty(min(CHUNK, tensor.nbytes), dtype=torch.uint8, pin_memory=True)
        yield from (staging[: part.numel()].copy_(part).numpy().data for part in parts)


def _split(flat: torch.Tensor, n: int) -> Iterator[torch.Tensor]:
    return (flat[at : at + n] for at in range(0, flat.numel(), n))


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its bytes start (from the file's beginning) and how to read them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFile:
    """The checked header of a safetensors file; `read` fetches values. Holds no open file.

    Raises CheckpointError when the header is malformed, out of bounds, or does not describe every byte of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, StoredTensor] = {}
        with explained(CheckpointError, f"{path} cannot be read", "restore or remove it"), open(path, "rb") as file:
            head = file.read(HEAD)
        if head.startswith(b"version "):
            self._refuse(f"it is {identify(head)}")
        if (size := int.from_bytes(head[:8], "little")) > MOST_BYTES:  # each tensor in it costs time
            self._refuse(f"its header has {size} bytes, and at most {MOST_BYTES} are read")
        try:
            with safe_open(path, "np") as header:
                self.metadata: dict[str, str] = header.metadata() or {}
                at = 8 + size
                for name in header.offset_keys():
                    row = header.get_slice(name)
                    entry = self.entries[name] = StoredTensor(DTYPES[row.get_dtype()], tuple(row.get_shape()), at)
                    at += prod(entry.shape) * entry.dtype.itemsize
        except KeyError as error:
            self._refuse(f"tensor {name!r} has the dtype {error}, which daybreak does not read")
        except (OSError, SafetensorError) as error:
            self._refuse(str(error).removeprefix("Error while deserializing header: "))

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is not a readable safetensors file: {reason}; restore or remove it.")

    def read(self, name: str, out: torch.Tensor, start: int = 0) -> None:
        """Copy elements start .. start + out.numel() of a tensor, in row-major order, into contiguous `out`.

        `out` may be on any device and of another float dtype. Raises CheckpointError for a missing tensor, a range
        outside it, an integer / float mix-up, or a file cut short since its header was read.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}.")
        if start < 0 or start + out.numel() > prod(entry.shape):
            span = f"elements {start} to {start + out.numel()}"
            raise CheckpointError(f"{self.path}: {span} lie outside {name!r}, shape {entry.shape}.")
        if entry.dtype != out.dtype and not (entry.dtype.is_floating_point and out.is_floating_point()):
            raise CheckpointError(f"{self.path}: {name!r} is {entry.dtype}, which does not convert to {out.dtype}.")
        itemsize = entry.dtype.itemsize
        staging = memoryview(bytearray(min(CHUNK, out.numel() * itemsize)))
        with open(self.path, "rb") as file:
            file.seek(entry.offset + start * itemsize)
            for part in _split(out.detach().view(-1), CHUNK // itemsize):
                chunk = staging[: part.numel() * itemsize]
                if file.readinto(chunk) != len(chunk):
                    self._refuse(f"it ends inside tensor {name!r}")
                part.copy_(torch.frombuffer(chunk, dtype=entry.dtype))
