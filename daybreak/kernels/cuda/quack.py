"""Matrix products on Hopper by quack (the package quack-kernels: CuTe DSL kernels, the ones behind FlashAttention-4).

At the power limit they are faster than cuBLASLt's (bench/NOTES.md): a tile's epilogue runs while the next tile is
multiplied, so bias, residual, GELU, its derivative, the bias gradient and GELU once more cost next to nothing, and an
addend is added in fp32 before the one rounding.

Which tile a product gets follows from its size and the card's multiprocessors by `tiling`, never from timing: bits
would change. Products with too few tiles to fill the card (they would have to be split over k), odd strides and small
batches go to cuBLASLt. Kernels are compiled at the first call, in about two seconds each, and kept in a cache folder.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import bias, cublaslt

ROWS, COLS = 128, (128, 160, 192, 208)  # a tile's rows; what its columns may be
START = 8  # columns' worth of time that starting a tile takes
FULL = 0.9  # of the card's time that the tiles must fill
BF16 = (torch.bfloat16,)


def tiling(
    rows: int, columns: int, multiprocessors: int, cluster: tuple[int, int]
) -> tuple[int, tuple[int, int]] | None:
    """(columns of a tile, cluster) for an output of this size, `cluster` preferred; None if it does not fill the card.

    Two tiles in a cluster share what they read. Measured choices of 30 products are 0.7 % faster (bench/NOTES.md).
    """
    options = []
    for width in COLS:
        for down, across in (cluster, cluster[::-1]):
            tiles = -(-rows // (down * ROWS)) * -(-columns // (across * width)) * down * across
            waves = -(-tiles // multiprocessors)
            options.append((waves * (width + START), waves * width, width, (down, across)))
    _, taken, width, best = min(options, key=lambda option: option[0])
    return (width, best) if rows * columns >= FULL * taken * ROWS * multiprocessors else None


@cache
def _tiling(rows: int, columns: int, device: int, cluster: tuple[int, int]) -> Any:
    return tiling(rows, columns, torch.cuda.get_device_properties(device).multi_processor_count, cluster)


@cache
def _epilogues() -> Any:
    """The kernels' epilogues; the package reads where to keep what it compiles when it is imported."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("QUACK_CACHE_DIR", str(Path(home) / "daybreak" / "quack"))
    return importlib.import_module("daybreak.kernels.cuda.quack_epilogues")


def usable(capability: tuple[int, int]) -> str | None:
    """Why these operations cannot run on a card of this compute capability, or None."""
    if capability[0] != 9:
        return "used on Hopper (compute capability 9) only"
    if reason := cublaslt.usable(capability):
        return reason
    try:
        _epilogues()
    except Exception as error:  # packages that do not fit each other raise anything
        return f"the package quack does not work ({type(error).__name__}: {error})"
    return None


def _gemm(
    epilogue: str, d: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, cluster: tuple[int, int] = (2, 1),
    **extra: Tensor,
) -> bool:  # fmt: skip
    """d (m, n) = epilogue(a (m, k) b (n, k)^T, c, extra), `extra` by name. False: not done, too small or odd."""
    operands = [d, a, b, *extra.values(), *([] if c is None else [c])]
    chosen = _tiling(*d.shape, d.get_device(), cluster)
    if chosen is None or any(x.data_ptr() % 16 or any(s % 8 for s in x.stride() if s != 1) for x in operands):
        return False
    width, (down, across) = chosen
    given = {name: x if x.ndim == 2 else x[None] for name, x in extra.items()}
    getattr(_epilogues(), epilogue).gemm(
        a, b, d, c, epi_args=given, tile_M=ROWS, tile_N=width, pingpong=True, cluster_M=down, cluster_N=across
    )
    return True


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_forward(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None, *, scratch: Scratch
) -> None:
    """out (n, O) = x (n, I) @ w (O, I)^T + b (O) + add (n, O), rounded once."""
    epilogue = ("plain" if add is None else "add") if b is None else "add_bias" if add is None else "add_bias_and"
    if not _gemm(epilogue, out, x, w, add, **({} if b is None else {"bias": b})):
        cublaslt.matmul_forward(out, x, w, b, add, scratch=scratch)


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O); out (n, O) = gelu of it, before its rounding."""
    if not _gemm("add_bias_gelu", pre, x, w, cluster=(1, 2), bias=b, gelu=out):
        cublaslt.matmul_gelu_forward(out, pre, x, w, b, scratch=scratch)


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_backward_input(dx: Tensor, dout: Tensor, w: Tensor, *, scratch: Scratch) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    if not _gemm("plain", dx, dout, w.t()):
        cublaslt.matmul_backward_input(dx, dout, w, scratch=scratch)


def gelu_backward_temps(dpre: Tensor, gelu: Tensor | None, db: Tensor, *_: object, **__: object) -> Temps:
    """cuBLASLt's temporaries, which go first, and partial sums of the bias gradient: one row for each row of tiles."""
    return [
        *cublaslt.gelu_backward_temps(dpre, gelu, db),
        ((1, -(-dpre.shape[0] // ROWS), dpre.shape[1]), torch.float32),
    ]


@backend("quack", temps=gelu_backward_temps, dtypes=BF16)
def matmul_gelu_backward(
    dpre: Tensor, gelu: Tensor | None, db: Tensor, dout: Tensor, w: Tensor, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)), its column sums to db (I) before its rounding, and
    gelu (n, I) = gelu(pre) if it is wanted, all in one pass."""
    part = scratch(gelu_backward_temps(dpre, gelu, db))[-1]
    extra = {"db": part[0]} if gelu is None else {"db": part[0], "gelu": gelu}
    if _gemm("times_slope" if gelu is None else "times_slope_gelu", dpre, dout, w.t(), pre, **extra):
        bias.column_sums([db], part, accumulate)
    else:
        cublaslt.matmul_gelu_backward(dpre, gelu, db, dout, w, pre, accumulate=accumulate, scratch=scratch)


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_backward_weight(dw: Tensor, dout: Tensor, x: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw in fp32 if `accumulate`, rounded once."""
    if not _gemm("add" if accumulate else "plain", dw, dout.t(), x.t(), dw if accumulate else None):
        cublaslt.matmul_backward_weight(dw, dout, x, accumulate=accumulate, scratch=scratch)
