"""NF4: a frozen matrix in 4 bits and an eighth for each weight (Dettmers et al. 2023, QLoRA).

A block is 64 neighbours in a row. Its scale is its largest magnitude, and a weight is the nearest of 16 CODES times
that. Codes are the quantiles of normal numbers, so each is used about as often. Scales are rounded too: a group of 256
has its mean taken away, and is 8-bit codes times the group's largest magnitude.

    64 weights     0.021  -0.0043 ...     value: two codes in a byte, the first in the upper half      (O, I / 2)
    scale          0.0583                 absmax: an 8-bit code of a map with a dynamic exponent       (O I / 64)
                                          nested: fp32, one for 256 scales      offset: fp32, one for each part

A part is one of the matrices that lie in a packed layer, such as queries. Each has its own offset and groups. So all
bytes are those that the library bitsandbytes makes of the separate matrices, on a CPU with as many threads. (The mean
is summed in fp32, in an order that depends on them.)

A matmul reads the matrix in compute dtype, so that is made before each matmul, in memory that the next one reuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from daybreak.errors import ConfigError
from daybreak.kernels import CHUNK, Scratch, Temps, op

BLOCK, GROUP = 64, 256  # weights that share a scale, and scales that share one
PIECE = 1 << 20  # weights that are quantised at a time
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
SUFFIXES = (".nf4", ".absmax", ".nested", ".offset")  # what its four tensors are called, after its own name


@dataclass(frozen=True)
class Packed:
    """A matrix (O, I) in NF4. rows: of each part. dtype: of what is in memory, not of weights."""

    shape: tuple[int, ...]
    rows: tuple[int, ...]
    value: Tensor
    absmax: Tensor
    nested: Tensor
    offset: Tensor
    dtype = torch.uint8

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of SUFFIXES."""
        return self.value, self.absmax, self.nested, self.offset


def packed_parts(name: str, shape: tuple[int, ...], rows: tuple[int, ...]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the four tensors of matrix `name`. Raises ConfigError if its blocks would not be whole."""
    O, I = shape
    if odd := next((r for r in rows if r * I % BLOCK), None):
        raise ConfigError(
            f"lora.base = nf4 takes blocks of {BLOCK} weights, and a matrix of {name} has {odd} x {I}; use compute."
        )
    groups = sum(math.ceil(r * I / (BLOCK * GROUP)) for r in rows)
    u8, f32 = torch.uint8, torch.float32
    return [((O * I // 2,), u8), ((O * I // BLOCK,), u8), ((groups,), f32), ((len(rows),), f32)]


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The 16 codes, the two of every byte (256, 2), and the 256 codes of scales (Dettmers et al. 2022, 8-bit optimizers
    via block-wise quantization: the dynamic map), in fp32."""
    codes, dynamic = torch.tensor(CODES), [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1)
        middles = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        dynamic += [*middles, *(-x for x in middles)]
    byte = torch.arange(256)
    pairs = torch.stack([codes[byte >> 4], codes[byte & 15]], 1)
    return codes.to(device), pairs.to(device), torch.tensor(sorted(dynamic)).to(device)


def _nearest(x: Tensor, codes: Tensor, grid: int = 0) -> tuple[Tensor, Tensor]:
    """Of rows of x: the codes nearest to x over its row's largest magnitude (uint8), and that magnitude. grid: first
    rounds what codes are compared with to so many steps from -1 to 1, as bitsandbytes does with scales on a CPU."""
    largest = x.abs().amax(1)
    scaled = (x * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp_(-1.0, 1.0)
    if grid:
        scaled.add_(1.0).mul_(grid / 2).add_(0.5).floor_().mul_(2 / grid).sub_(1.0)
    return torch.bucketize(scaled, (codes[:-1] + codes[1:]) / 2, out_int32=True).to(torch.uint8), largest


@torch.no_grad()
def pack(out: Packed, value: Tensor) -> None:
    """out = value (O, I), of any float dtype and device, in NF4."""
    codes, device, flat = tables(out.value.device)[0], out.value.device, value.reshape(-1)
    dynamic, at, group = tables(torch.device("cpu"))[2], 0, 0
    for i, rows in enumerate(out.rows):
        stop = at + rows * out.shape[1]
        scales = torch.empty((stop - at) // BLOCK)  # on the CPU, so that all devices take the same mean
        for start in range(at, stop, PIECE):
            piece = flat[start : min(start + PIECE, stop)].to(device, torch.float32).view(-1, BLOCK)
            index, largest = _nearest(piece, codes)
            out.value[start // 2 : start // 2 + index.numel() // 2] = (index[:, ::2] << 4 | index[:, 1::2]).view(-1)
            scales[(start - at) // BLOCK :][: len(largest)] = largest.cpu()
        out.offset[i] = mean = scales.mean()
        first, whole = at // BLOCK, len(scales) // GROUP * GROUP
        for part in (scales[:whole].view(-1, GROUP), scales[whole:].view(1, -1)):
            if part.numel():
                index, largest = _nearest(part - mean, dynamic, 65535)
                out.absmax[first : first + part.numel()] = index.view(-1).to(device)
                out.nested[group : group + len(part)] = largest.to(device)
                first, group = first + part.numel(), group + len(part)
        at = stop


def unpack_temps(out: Tensor, *_: object, **__: object) -> Temps:
    i32, f32 = torch.int32, torch.float32
    return [((CHUNK // 2,), i32), ((CHUNK // 2, 2), f32), ((CHUNK // BLOCK,), i32), ((CHUNK // BLOCK,), f32)]


@op("out", temps=unpack_temps)
def nf4_unpack(
    out: Tensor, value: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor, *, rows: tuple[int, ...],
    scratch: Scratch,
) -> None:  # fmt: skip
    """out (O, I) = the matrix in NF4 (see Packed), in fp32 and rounded once."""
    _, pairs, dynamic = tables(out.device)
    flat, at, group = out.view(-1), 0, 0
    for i, r in enumerate(rows):
        stop = at + r * out.shape[1]
        for start in range(at, stop, CHUNK):
            n = min(CHUNK, stop - start)
            index, codes, index8, scale = (
                x[: n // k] for x, k in zip(scratch(unpack_temps(out)), (2, 2, 64, 64), strict=True)
            )
            index8.copy_(absmax[start // BLOCK : (start + n) // BLOCK])
            torch.index_select(dynamic, 0, index8, out=scale)
            for part in torch.split(scale, GROUP):
                part.mul_(nested[group])
                group += 1
            scale.add_(offset[i])
            index.copy_(value[start // 2 : (start + n) // 2])
            torch.index_select(pairs, 0, index, out=codes)
            flat[start : start + n].view(-1, BLOCK).copy_(codes.view(-1, BLOCK).mul_(scale[:, None]))
        at = stop


def dense(packed: Packed, out: Tensor) -> Tensor:
    """out (O, I), of any float dtype, on the CPU or where the matrix is, = the matrix. Returns out."""
    temps = [torch.empty(shape, dtype=dtype, device=packed.value.device) for shape, dtype in unpack_temps(out)]
    nf4_unpack(out, *packed.tensors, rows=packed.rows, scratch=lambda _: temps)
    return out
