"""safetensors files: the library and we read each other's; malformed ones are refused; memory stays bounded."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from daybreak.errors import CheckpointError
from daybreak.state import safetensors_io
from daybreak.state.safetensors_io import SafetensorsFile, write_safetensors

torch.set_num_threads(1)

ALL_DTYPES = [
    torch.tensor([True, False, True]),
    torch.arange(5, dtype=torch.int64) - 2**62,
    torch.tensor([1.5, float("nan"), -0.0, float("inf")], dtype=torch.float64),
    torch.randn(7, 3, generator=torch.Generator().manual_seed(1)),
    torch.randn(33, generator=torch.Generator().manual_seed(2)).bfloat16(),
    torch.tensor([3.0], dtype=torch.float16),
    torch.tensor([-3], dtype=torch.int16),
    torch.arange(-5, 6, dtype=torch.int8),
    torch.arange(11, dtype=torch.uint8),
    torch.tensor(42, dtype=torch.int32),
    torch.empty(0, 4),
]


def as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("chunk", [16, 64, 16 << 20])
def test_the_library_reads_what_we_write(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_io, "CHUNK", chunk)
    tensors = {f"t{i}": t for i, t in enumerate(ALL_DTYPES)}
    path = tmp_path / "x.safetensors"
    written = write_safetensors(path, tensors, {"a": "é\n"})

    data = path.read_bytes()
    assert written == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (length,) = struct.unpack("<Q", data[:8])
    assert (8 + length) % 8 == 0
    for row in (row for name, row in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"):
        assert row["data_offsets"][0] % safetensors_io.DTYPES[row["dtype"]].itemsize == 0
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(as_bytes(loaded[name]), as_bytes(tensor))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "é\n"}
    with pytest.raises(FileExistsError):
        write_safetensors(path, tensors)


@pytest.mark.parametrize("chunk", [16, 16 << 20])
def test_we_read_what_the_library_writes(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(safetensors_io, "CHUNK", chunk)
    tensors = {f"t{i}": t for i, t in enumerate(ALL_DTYPES)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"}
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        file.read(name, out)
        assert torch.equal(as_bytes(out), as_bytes(tensor))
    part = torch.empty(4, dtype=torch.float64)
    file.read("t4", part, start=20)  # bf16 -> fp64
    assert torch.equal(part, tensors["t4"][20:24].double())
    with pytest.raises(CheckpointError, match=r"elements 30 to 34 lie outside 't4'"):
        file.read("t4", part, start=30)
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        file.read("nope", part)
    with pytest.raises(CheckpointError, match="does not convert"):
        file.read("t1", part)


def handmade(table: object, data: bytes, length: int | None = None) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def f32(begin: object, end: object, shape: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        handmade({}, b"", 2**63),
        handmade({}, b"", 3),
        handmade(b"{}}", b""),
        handmade(b'{"\xff": 1}', b""),
        handmade(b"[" * 100_000, b""),
        handmade([], b""),
        handmade({"__metadata__": {"a": 1}}, b""),
        handmade({"a": 1}, b""),
        handmade({"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
        handmade({"a": {"dtype": "Q99", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        handmade({"a": f32(0, 4, [-1])}, bytes(4)),
        handmade({"a": f32(0, 4, [True])}, bytes(4)),
        handmade({"a": f32(0, 4, "1")}, bytes(4)),
        handmade({"a": f32(0, 4.0, [1])}, bytes(4)),
        handmade({"a": f32(0, 8, [1])}, bytes(8)),
        handmade({"a": f32(0, 4, [2**40, 2**40])}, bytes(4)),
        handmade({"a": f32(0, 8, [2])}, bytes(4)),
        handmade({"a": f32(0, 4, [1])}, bytes(8)),
        handmade({"a": f32(4, 8, [1])}, bytes(8)),
        handmade({"a": f32(0, 4, [1]), "b": f32(0, 4, [1])}, bytes(4)),
        handmade({"a": f32(0, 4, [1]), "b": f32(8, 12, [1])}, bytes(12)),
    ],
)
def test_malformed_headers_are_refused(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"bad.safetensors is not a readable safetensors file: .+; restore or remove it\.$"
    ):
        SafetensorsFile(path)


def test_other_files_and_kinds_of_numbers_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"x.safetensors cannot be read \(No such file or directory\); restore"):
        SafetensorsFile(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="it is a Git LFS pointer"):
        SafetensorsFile(path)
    path.write_bytes(handmade({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)))
    with pytest.raises(CheckpointError, match="tensor 'a' has the dtype 'F8_E4M3', which daybreak does not read"):
        SafetensorsFile(path)


def test_a_file_cut_short_after_opening(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(1000)})
    file = SafetensorsFile(path)
    os.truncate(path, 2000)
    with pytest.raises(CheckpointError, match="ends inside tensor 'a'"):
        file.read("a", torch.empty(1000))


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of memory")
def test_writing_and_reading_take_bounded_memory(tmp_path):
    def peak_mib() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10

    tensor = torch.ones(24 << 20)  # 96 MiB
    out = torch.zeros(24 << 20, dtype=torch.bfloat16)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_mib()
    write_safetensors(tmp_path / "big", {"a": tensor})
    SafetensorsFile(tmp_path / "big").read("a", out)
    assert peak_mib() - before < 40  # one 16 MiB chunk, and its conversion
    assert bool((out == 1).all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_go_through_a_bounded_host_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "CHUNK", 1 << 10)
    tensors = {"a": torch.randn(5000, device="cuda"), "b": torch.randn(77, device="cuda").bfloat16()}
    write_safetensors(tmp_path / "x", tensors | {"none": torch.empty(0, device="cuda")})
    loaded = safetensors.torch.load_file(tmp_path / "x")
    for name, tensor in tensors.items():
        out = torch.empty_like(tensor)
        SafetensorsFile(tmp_path / "x").read(name, out)
        assert torch.equal(loaded[name], tensor.cpu())
        assert torch.equal(out, tensor)
