"""Matmuls on Hopper by quack: the package quack-kernels, whose CuTe DSL kernels FlashAttention-4 uses too.

The output is cut into tiles, and each multiprocessor computes one tile after the other. The epilogue of a tile runs
while the next tile is multiplied. It adds bias and residual, applies GELU or its derivative, and sums a bias gradient.
So all of these take almost no time, where cuBLASLt needs separate passes. An addend is added in fp32, before the only
rounding. At the power limit this is faster than cuBLASLt (bench/NOTES.md).

    output (m, n)   | tile 0 | tile 1 | tile 2 |      128 rows each, and 128 to 208 columns (`Tile`)
                    | tile 3 | tile 4 | tile 5 |      a cluster of 2 x 1 or 1 x 2 tiles shares what it reads

    multiprocessor  | multiply tile 0 | multiply tile 3  | multiply tile 6 ...
                                      | epilogue of 0    | epilogue of 3 ...

The tile decides the speed. It is chosen by rules that never measure time at run time:

    bias, none      the GPU's table (products.py) names a tile or cuBLASLt; `tiling` if the table has no entry
    GELU, gates     `tiling`: the tile that wastes least time in the last wave of multiprocessors
    cuBLASLt        if the tiles would not fill the GPU, and for odd strides, odd addresses and small batches

A gate needs both of its halves in one tile. So the matmul of gate and up takes a row of w from either half in turn, and
its epilogue writes the two halves of the result to their places, and what comes out of the gate:

    rows of w as they lie     gate 0, gate 1, ... | up 0, up 1, ...
    columns of a tile         gate 0, up 0, gate 1, up 1, ...  -> gate (n, F), up (n, F), silu(gate) * up (n, F)

Backward's epilogue reads gate and up from their places, and writes their gradients over them.

Kernels are compiled at the first call, in about two seconds each, and kept in a cache folder.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from daybreak.kernels import Scratch, Temps, backend
from daybreak.kernels.cuda import apart, bias, broken, cache_folder, cublaslt, gated
from daybreak.kernels.cuda.products import dense, nearest

ROWS, COLS = 128, (128, 160, 192, 208)  # of a tile; `tiling` chooses among these columns
GATED = COLS[:3]  # those that quack can cut in halves
START = 8  # the time of starting a tile, as a number of columns
FULL = 0.9  # the share of the GPU's time that the tiles must fill
BF16 = (torch.bfloat16,)


class Tile(NamedTuple):
    """The size of a tile in output entries. `down` x `across` tiles are a cluster, which shares what it reads.

    pair: two groups of warps compute a tile each in turns (pingpong), else they share each tile."""

    rows: int
    columns: int
    pair: bool
    down: int
    across: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns} {'pair' if self.pair else 'shared'} {self.down}x{self.across}"


@cache
def parse(text: str) -> Tile:
    """The tile that `str` wrote."""
    match = re.fullmatch(r"(\d+)x(\d+) (pair|shared) (\d)x(\d)", text)
    if not match:
        raise ValueError(f"not a tile: {text!r}")
    return Tile(int(match[1]), int(match[2]), match[3] == "pair", int(match[4]), int(match[5]))


def tiling(
    rows: int, columns: int, multiprocessors: int, cluster: tuple[int, int], widths: Sequence[int] = COLS
) -> Tile | None:
    """The tile for an output of this size, with this cluster if it is as good; None if no tiles would fill the GPU.

    The best of 30 measured matmuls of d12 and d48 were 0.7 % faster on an H200 (bench/NOTES.md).
    """
    options = []
    for width in widths:
        for down, across in (cluster, cluster[::-1]):
            tiles = -(-rows // (down * ROWS)) * -(-columns // (across * width)) * down * across
            waves = -(-tiles // multiprocessors)
            options.append((waves * (width + START), waves * width, Tile(ROWS, width, True, down, across)))
    _, taken, tile = min(options, key=lambda option: option[0])
    return tile if rows * columns >= FULL * taken * ROWS * multiprocessors else None


@cache
def _tiling(
    rows: int, columns: int, device: int, cluster: tuple[int, int], widths: Sequence[int] = COLS
) -> Tile | None:
    return tiling(rows, columns, torch.cuda.get_device_properties(device).multi_processor_count, cluster, widths)


@cache
def _measured(trans: str, m: int, n: int, k: int, epilogue: str, mode: str, device: int) -> Tile | str | None:
    """The choice of the GPU's table for a matmul: a tile, "cublaslt", or None if the table has no entry."""
    blas = cublaslt.blas_of(device)
    entry = nearest(blas.table, dense("bf16", trans, m, n, k, epilogue, mode))[1] if blas else {}
    return parse(entry["quack"]) if entry.get("quack") else "cublaslt" if "quack" in entry else None


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Inside, torch.compile and torch.compiler.disable do nothing. quack wraps functions in them that are not called
    here. Their modules take longer to load than quack and CUTLASS together."""

    def leave(fn: Any = None, *, recompile_limit: int | None = None, **_: Any) -> Any:
        return fn if fn is not None else lambda fn: fn

    wrappers = (torch, "compile"), (torch.compiler, "disable")
    plain = [getattr(module, name) for module, name in wrappers]
    try:
        for module, name in wrappers:
            setattr(module, name, leave)
        yield
    finally:
        for (module, name), fn in zip(wrappers, plain, strict=True):
            setattr(module, name, fn)


@cache
def epilogues() -> Any:
    """The module of the epilogues. The package reads the name of its cache folder when it is imported."""
    os.environ.setdefault("QUACK_CACHE_DIR", cache_folder("quack"))
    with _uncompiled():
        return importlib.import_module("daybreak.kernels.cuda.quack_epilogues")


def usable(capability: tuple[int, int]) -> str | None:
    """Why these operations cannot run on a GPU of this compute capability, or None."""
    if capability[0] != 9:
        return "used on Hopper (compute capability 9) only"
    if reason := cublaslt.usable(capability):
        return reason
    return broken("quack", epilogues)


def served(*operands: Tensor) -> bool:
    """Whether all strides and addresses are multiples of 16 bytes."""
    return not any(x.data_ptr() % 16 or any(s % 8 for s in x.stride() if s != 1) for x in operands)


def launch(
    epilogue: str, tile: Tile, d: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None = None,
    *, in_turn: tuple[str, ...] = (), **extra: Tensor,
) -> None:  # fmt: skip
    """d (m, n) = epilogue(a (m, k) b (n, k)^T, c (m, n), extra), `extra` by name, vectors as (1, n). in_turn: operands
    whose rows are read from either half in turn; then all have a dimension of size 1 in front."""
    with apart():  # it may compile
        getattr(epilogues(), epilogue).gemm(
            a, b, d, c, epi_args=extra, tile_M=tile.rows, tile_N=tile.columns, pingpong=tile.pair, cluster_M=tile.down,
            cluster_N=tile.across, concat_layout=in_turn,
        )  # fmt: skip


def product(tile: Tile, d: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, bias: Tensor | None = None) -> None:
    """d (m, n) = a (m, k) b (n, k)^T + bias (n) + c (m, n), which may be d itself, with this tile."""
    if bias is None:
        launch("plain" if c is None else "add", tile, d, a, b, c)
    else:
        launch("add_bias" if c is None else "add_bias_and", tile, d, a, b, c, bias=bias[None])


def _product(trans: str, d: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """d (m, n) = a (m, k) b (n, k)^T + bias (n) + c (m, n). trans: as in a `Key`. False: cuBLASLt should compute it."""
    operands = [x for x in (d, a, b, c, bias) if x is not None]
    if not served(*operands):
        return False
    (rows, columns), device = d.shape, d.get_device()
    mode, kind = "beta0" if c is None else "beta1" if c is d else "add", "plain" if bias is None else "bias"
    tile = _measured(trans, columns, rows, a.shape[1], kind, mode, device) or _tiling(rows, columns, device, (2, 1))
    if not isinstance(tile, Tile):
        return False
    product(tile, d, a, b, c, bias)
    return True


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_forward(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None, *, scratch: Scratch
) -> None:
    """out (n, O) = x (n, I) @ w (O, I)^T + b (O) + add (n, O), rounded once."""
    if not _product("tn", out, x, w, add, b):
        cublaslt.matmul_forward(out, x, w, b, add, scratch=scratch)


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, b: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O); out (n, O) = gelu(pre), from pre before its rounding."""
    tile = _tiling(*pre.shape, pre.get_device(), (1, 2))
    if tile and served(out, pre, x, w, b):
        launch("add_bias_gelu", tile, pre, x, w, bias=b[None], gelu=out)
    else:
        cublaslt.matmul_gelu_forward(out, pre, x, w, b, scratch=scratch)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up: the left and right half of x (n, 2F)."""
    F = x.shape[1] // 2
    return x[:, :F], x[:, F:]


@backend("quack", temps=gated.forward_temps, dtypes=BF16)
def matmul_swiglu_forward(
    out: Tensor, gateup: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None,
    *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """gateup (n, 2F) = x (n, I) @ w (2F, I)^T + b (2F); out (n, F) from it as it is stored."""
    tile = _tiling(*gateup.shape, gateup.get_device(), (1, 2), GATED)
    gate, up = halves(gateup)
    if b is None and tile and served(out, gate, up, x, w):
        stored = {"gate": gate[None], "up": up[None], "out": out[None]}
        launch("geglu" if gelu else "swiglu", tile, None, x[None], w[None], in_turn=("B",), **stored)
    else:
        gated.matmul_swiglu_forward(out, gateup, x, w, b, gelu=gelu, scratch=scratch)


@backend("quack", temps=gated.backward_temps, dtypes=BF16)
def matmul_swiglu_backward(
    d_gateup: Tensor, rewrite: Tensor | None, d_act: Tensor, dout: Tensor, w: Tensor, gateup: Tensor,
    *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """d_gateup (n, 2F), which may be gateup, from dout (n, O) @ w (O, F) before its rounding, which has no place in
    memory. If rewrite (n, F) is given, it becomes the gate's output in the same pass."""
    tile = _tiling(*d_act.shape, d_act.get_device(), (2, 1))
    (gate, up), (d_gate, d_up) = halves(gateup), halves(d_gateup)
    extra = {"up": up, "d_up": d_up} if rewrite is None else {"up": up, "d_up": d_up, "out": rewrite}
    if tile and served(d_gate, gate, dout, w, *extra.values()):
        epilogue = ("times_geglu" if gelu else "times_swiglu") + ("" if rewrite is None else "_again")
        launch(epilogue, tile, d_gate, dout, w.t(), gate, **extra)
    else:
        gated.matmul_swiglu_backward(d_gateup, rewrite, d_act, dout, w, gateup, gelu=gelu, scratch=scratch)


@backend("quack", temps=gated.relu2_temps, dtypes=BF16)
def matmul_relu2_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T; out (n, O) from it as it is stored."""
    tile = _tiling(*pre.shape, pre.get_device(), (1, 2))
    if tile and served(out, pre, x, w):
        launch("and_relu2", tile, pre, x, w, relu2=out)
    else:
        gated.matmul_relu2_forward(out, pre, x, w, scratch=scratch)


@backend("quack", temps=gated.relu2_temps, dtypes=BF16)
def matmul_relu2_backward(
    dpre: Tensor, rewrite: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor, *, scratch: Scratch
) -> None:
    """dpre (n, I) = (dout (n, O) @ w (O, I)) 2 max(pre (n, I), 0), rounded once. If rewrite (n, I) is given, it becomes
    the squared ReLU of pre in the same pass."""
    extra = {} if rewrite is None else {"relu2": rewrite}
    tile = _tiling(*dpre.shape, dpre.get_device(), (2, 1))
    if tile and served(dpre, dout, w, pre, *extra.values()):
        launch("times_relu2" if rewrite is None else "times_relu2_again", tile, dpre, dout, w.t(), pre, **extra)
    else:
        gated.matmul_relu2_backward(dpre, rewrite, dout, w, pre, scratch=scratch)


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_backward_input(dx: Tensor, dout: Tensor, w: Tensor, *, scratch: Scratch) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    if not _product("nn", dx, dout, w.t()):
        cublaslt.matmul_backward_input(dx, dout, w, scratch=scratch)


def gelu_backward_temps(dpre: Tensor, gelu: Tensor | None, db: Tensor | None, *_: object, **__: object) -> Temps:
    """cuBLASLt's temporaries, which come first, and partial sums of the bias gradient, a row for each row of tiles."""
    return [
        *cublaslt.gelu_backward_temps(dpre, gelu, db),
        ((1, -(-dpre.shape[0] // ROWS), dpre.shape[1]), torch.float32),
    ]


@backend("quack", temps=gelu_backward_temps, dtypes=BF16)
def matmul_gelu_backward(
    dpre: Tensor, gelu: Tensor | None, db: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)), and db (I) = its column sums before rounding. If gelu
    (n, I) is given, it becomes gelu(pre) in the same pass."""
    part = scratch(gelu_backward_temps(dpre, gelu, db))[-1]
    extra = {"db": part[0]} if gelu is None else {"db": part[0], "gelu": gelu}
    tile = _tiling(*dpre.shape, dpre.get_device(), (2, 1))
    if tile and served(dpre, dout, w, pre, *extra.values()):
        launch("times_slope" if gelu is None else "times_slope_gelu", tile, dpre, dout, w.t(), pre, **extra)
        bias.column_sums([db], part, accumulate)
    else:
        cublaslt.matmul_gelu_backward(dpre, gelu, db, dout, w, pre, accumulate=accumulate, scratch=scratch)


@backend("quack", temps=cublaslt.workspace, dtypes=BF16)
def matmul_backward_weight(dw: Tensor, dout: Tensor, x: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw in fp32 if `accumulate`, rounded once."""
    if not _product("nt", dw, dout.t(), x.t(), dw if accumulate else None):
        cublaslt.matmul_backward_weight(dw, dout, x, accumulate=accumulate, scratch=scratch)
