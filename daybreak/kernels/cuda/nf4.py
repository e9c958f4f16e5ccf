"""A matrix in NF4 into compute dtype on GPUs; formulas in kernels/nf4.py.

A program reads the codes of 32 blocks, and their scales, and writes 2,048 weights. Products and sums are rounded one by
one, as the reference does, so that all devices compute the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daybreak.kernels import backend
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.nf4 import BLOCK, GROUP, tables

BLOCKS, WARPS = 32, 4  # of a program


@triton.jit
def _nf4_kernel(
    out, value, absmax, nested, offset, codes, dynamic, blocks,
    HALF: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    mask = b < blocks
    index = tl.load(absmax + b, mask=mask, other=0).to(tl.int32)
    scale = tl.load(dynamic + index) * tl.load(nested + b // GROUP, mask=mask, other=0.0) + tl.load(offset)
    at, rows = b[:, None] * HALF + tl.arange(0, HALF)[None, :], mask[:, None]
    byte = tl.load(value + at, mask=rows, other=0).to(tl.int32)
    high, low = tl.load(codes + (byte >> 4)) * scale[:, None], tl.load(codes + (byte & 15)) * scale[:, None]
    y = tl.interleave(high, low)
    to = b[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=rows)


@backend("triton")
def nf4_unpack(
    out: Tensor, value: Tensor, absmax: Tensor, nested: Tensor, offset: Tensor, *, rows: tuple[int, ...]
) -> None:
    """out (O, I) = the matrix in NF4, in fp32 and rounded once. A launch for each part."""
    codes, _, dynamic = tables(torch.device(out.device))
    flat, first, group = out.view(-1), 0, 0
    for i, r in enumerate(rows):
        blocks = r * out.shape[1] // BLOCK
        _nf4_kernel[(triton.cdiv(blocks, BLOCKS),)](
            flat[first * BLOCK :], value[first * BLOCK // 2 :], absmax[first:], nested[group:], offset[i:],
            codes, dynamic, blocks, HALF=BLOCK // 2, GROUP=GROUP, BLOCKS=BLOCKS, num_warps=WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
        first, group = first + blocks, group + triton.cdiv(blocks, GROUP)
