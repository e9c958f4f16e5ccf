"""NF4: the bytes of bitsandbytes, and the kernel that unpacks them against its formula in fp64."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from kernel_harness import DEVICE, close, each_backend, f64, poison, run
from torch import Tensor

from daybreak.errors import ConfigError
from daybreak.kernels.nf4 import Packed, dense, pack, packed_parts, tables

GOLDEN = json.loads((Path(__file__).parent / "golden/nf4_bitsandbytes.json").read_text())
# Rows of each part, and columns: one block; parts whose last group is not whole; more than one group; blocks of 2 rows.
CASES = [((1,), 64), ((3, 2), 128), ((300, 40, 40), 192), ((8, 2), 96), ((2100,), 64)]
narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_case = pytest.mark.parametrize(("rows", "I"), CASES, ids=str)


def made(O: int, I: int) -> Tensor:
    """Weights by arithmetic alone, many near 0: no generator has to stay as it is."""
    i = torch.arange(O * I, dtype=torch.int64)
    x = ((i * 7919 + i * i * 104729) % 65521).double() / 65521 - 0.5
    return x.pow(3).mul(0.4).float().view(O, I)


def packed(value: Tensor, rows: tuple[int, ...], device: str = DEVICE) -> Packed:
    parts = packed_parts("w", tuple(value.shape), rows)
    tensors = [torch.full(shape, 99, dtype=dtype, device=device) for shape, dtype in parts]
    found = Packed(tuple(value.shape), rows, *tensors)
    pack(found, value)
    return found


def sha(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


@narrow
def test_every_byte_is_that_of_bitsandbytes(dtype: torch.dtype) -> None:
    rows = tuple(part["rows"] for part in GOLDEN["parts"])
    x = made(sum(rows), 192).to(dtype)
    found, at, block, group = packed(x, rows), 0, 0, 0
    whole = dense(found, torch.empty(x.shape, dtype=dtype, device=DEVICE))
    for i, part in enumerate(GOLDEN["parts"]):
        blocks, groups = part["rows"] * 192 // 64, len(part["nested"])
        assert sha(whole[at : at + part["rows"]]) == part["fp32" if dtype == torch.float32 else "bf16"]
        if dtype == torch.float32:
            assert sha(found.value[block * 32 : (block + blocks) * 32]) == part["value"]
            assert sha(found.absmax[block : block + blocks]) == part["absmax"]
            assert found.nested[group : group + groups].tolist() == [float.fromhex(v) for v in part["nested"]]
            assert found.offset[i].item() == float.fromhex(part["offset"])
        at, block, group = at + part["rows"], block + blocks, group + groups


@narrow
@each_backend
@each_case
def test_unpacked_values(rows: tuple[int, ...], I: int, backend: str, dtype: torch.dtype) -> None:
    """Codes times scales in fp64, from bytes of any value."""
    O, g = sum(rows), torch.Generator().manual_seed(I)
    shapes = packed_parts("w", (O, I), rows)
    value, absmax = (torch.randint(256, s, dtype=torch.uint8, generator=g).to(DEVICE) for s, _ in shapes[:2])
    nested, offset = (torch.rand(s, generator=g).to(DEVICE) for s, _ in shapes[2:])
    out = poison(O, I, dtype=dtype)
    run("nf4_unpack", out, value, absmax, nested, offset, backend=backend, rows=rows)
    codes, _, dynamic = (t.double() for t in tables(torch.device(DEVICE)))
    index = torch.stack([value >> 4, value & 15], 1).view(-1).long()
    scales, at, group = [], 0, 0
    for i, r in enumerate(rows):
        blocks = r * I // 64
        which = group + torch.arange(blocks, device=DEVICE) // 256
        scales.append(dynamic[absmax[at : at + blocks].long()] * f64(nested)[which] + f64(offset)[i])
        at, group = at + blocks, group + math.ceil(blocks / 256)
    close(out, (codes[index].view(-1, 64) * torch.cat(scales)[:, None]).view(O, I))


@narrow
@each_case
def test_backends_have_the_same_bits(rows: tuple[int, ...], I: int, dtype: torch.dtype) -> None:
    """So that a run's losses do not depend on who unpacks."""
    x = made(sum(rows), I)
    found = packed(x, rows)
    results = [poison(*x.shape, dtype=dtype) for _ in range(2)]
    for out, backend in zip(results, ("torch", "triton"), strict=True):
        run("nf4_unpack", out, *found.tensors, backend=backend, rows=rows)
    assert torch.equal(*results)


def test_the_error_is_the_published_one() -> None:
    """9.2 % of normal weights (RMS), of which rounding of scales is 0.2 %; zeros stay zeros."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = dense(packed(x, (512,)), torch.empty(x.shape, device=DEVICE)).cpu() - x
    assert (error.norm() / x.norm()).item() == pytest.approx(0.092, abs=0.001)
    assert not dense(packed(torch.zeros(4, 64), (4,)), torch.empty(4, 64, device=DEVICE)).any()


def test_blocks_must_be_whole() -> None:
    with pytest.raises(ConfigError, match=r"blocks of 64 weights, and a matrix of h\.0\.qkvw has 3 x 96; use compute"):
        packed_parts("h.0.qkvw", (5, 96), (2, 3))
