"""The products of a few rows, as writing text makes them: bound by reading the weights once.

A program asks for its whole tile of w before anything else, so that all of w is on its way at once; the layernorm of
the input, which every program computes for itself, costs no launch. On cards that have it (compute capability 9 and
up) a launch begins while the one before it still runs (programmatic dependent launch) and waits for its results only
where it needs them: by then its weights have been asked for. Every kernel of such a chain waits before it touches what
others write, so whatever lies further back is over too.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels import matmul as reference
from daybreak.kernels.cuda import tl, triton
from daybreak.kernels.norm import EPS

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # no Triton: see kernels.cuda

    def gdc_wait() -> None: ...
    def gdc_launch_dependents() -> None: ...


TILE = 1 << 14  # weights of one program, which it holds in registers
PROGRAMS = 3 * 132  # as few rows to a program as it takes to have so many; of any card, for the same bits on all
MAX_ROWS = 16  # of x: with more of them tensor cores are faster


@triton.jit
def begin_early(EARLY: tl.constexpr):
    """Let the next kernel of the stream be launched once all programs of this one are here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(EARLY: tl.constexpr):
    """Until the kernels before this one have ended and what they wrote can be seen."""
    if EARLY:
        gdc_wait()


@cache
def early(device: torch.device) -> bool:
    """Whether kernels may be launched before the one ahead of them has ended."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def _decode_matmul_kernel(
    out, x, w, b, add, lnw, lnb, n, I, O, eps,
    NORM: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, GELU: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin_early(EARLY)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside, real = cols < I, rows < O
    at = rows.to(tl.int64)[:, None] * I + cols[None, :]
    tile = tl.load(w + at, mask=real[:, None] & inside[None, :], other=0.0)
    if BIAS:
        bias = tl.load(b + rows, mask=real, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(lnw + cols, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(lnb + cols, mask=inside, other=0.0).to(tl.float32)
    wait_for_inputs(EARLY)
    for row in range(n):
        xf = tl.load(x + row * I + cols, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            xf = tl.where(inside, xf - tl.sum(xf, 0) / I, 0.0)
            xf = xf * (1.0 / tl.sqrt(tl.sum(xf * xf, 0) / I + eps)) * scale + shift
            xf = xf.to(x.dtype.element_ty).to(tl.float32)  # as the layernorm of a whole batch is stored
        y = tl.sum(tile.to(tl.float32) * xf[None, :], 1)
        if BIAS:
            y += bias
        if GELU:
            y = y.to(out.dtype.element_ty).to(tl.float32)  # likewise
            u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
            y *= 1.0 - 1.0 / (tl.exp(2.0 * u) + 1.0)
        if ADD:
            y += tl.load(add + row * O + rows, mask=real, other=0.0).to(tl.float32)
        tl.store(out + row * O + rows, y.to(out.dtype.element_ty), mask=real)


def _tile(I: int, O: int) -> tuple[int, int, int]:
    """Rows and columns of w that a program takes, and its warps."""
    cols = 1 << (I - 1).bit_length()
    rows = max(1, TILE // cols)
    while rows > 1 and -(-O // rows) < PROGRAMS:
        rows //= 2
    return rows, cols, min(8, max(1, cols // 256))


def _served(x: Tensor) -> bool:
    return x.shape[0] <= MAX_ROWS and x.shape[1] <= TILE


def decode_temps(out: Tensor, x: Tensor, w: Tensor, *rest: Tensor | None, **kwargs: bool) -> Temps:
    return () if _served(x) else reference.decode_temps(out, x, w, *rest, **kwargs)


@backend("triton", temps=decode_temps)
def matmul_decode(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None,
    lnw: Tensor | None = None, lnb: Tensor | None = None, *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """out (n, O) = act(norm(x (n, I)) @ w (O, I)^T + b (O)) + add (n, O) for n <= MAX_ROWS; more in the library."""
    if not _served(x):
        reference.matmul_decode(out, x, w, b, add, lnw, lnb, gelu=gelu, scratch=scratch)
        return
    (n, I), O = x.shape, w.shape[0]
    rows, cols, warps = _tile(I, O)
    launch = {"launch_pdl": True} if early(x.device) else {}
    _decode_matmul_kernel[(-(-O // rows),)](
        out, x, w, w if b is None else b, x if add is None else add, w if lnw is None else lnw,
        w if lnb is None else lnb, n, I, O, EPS, NORM=lnw is not None, BIAS=b is not None, ADD=add is not None,
        GELU=gelu, ROWS=rows, COLS=cols, EARLY=bool(launch), num_warps=warps, **launch,
    )  # fmt: skip
