"""Linear layers: out = x w^T + b with w stored (out, in), and the three matmuls of its backward.

With y = x w^T + b and gradient dy:  dx = dy w,  dw = dy^T x,  db = sum over rows of dy.

The matmuls with something attached (an addend, GELU, GELU's derivative) are operations of their own because a GEMM
library computes them in the epilogue, before its result goes to memory.

GELU is the tanh form, which GPT-2 uses (Hendrycks & Gimpel 2016, section 2), with u = sqrt(2/pi) (x + 0.044715 x^3):

gelu(x) = x/2 (1 + tanh u)
gelu'(x) = (1 + tanh u)/2 + x/2 (1 - tanh^2 u) sqrt(2/pi) (1 + 3 * 0.044715 x^2)
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daybreak.kernels import Flops, Scratch, Temps, acc_dtype, glu, op, relu
from daybreak.kernels.norm import forward_temps, layernorm_forward, rms_temps, rmsnorm_forward

FEW = range(2, 17)
LARGE = 1 << 24  # multiplications from which oneDNN's start is worth its while
PIECE = 1 << 21  # entries (8 MB) of a piece of its result: the allocator hands the same bytes out again and again
DEPTH = 1024  # rows that a weight gradient sums over at once
BLOCKS = 16  # of a matrix for one row: as many threads can read it; fixed, so that bits do not depend on how many do


@cache
def onednn() -> Any:
    """oneDNN's fp32 matmul on CPUs where it beats torch.mm's, MKL's, else None: MKL uses no AVX-512 on AMD's."""
    info = Path("/proc/cpuinfo")
    amd = info.exists() and "AuthenticAMD" in info.read_text()
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if amd and wide else None


def _for_onednn(out: Tensor, k: int) -> bool:
    """Whether oneDNN is to compute this output of sums of k terms."""
    small = out.numel() * k < LARGE
    return out.dtype == torch.float32 and out.device.type == "cpu" and not small and onednn() is not None


def _by_onednn(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, accumulate: bool = False) -> None:
    """out (p, q) = a (p, k) b (q, k)^T + bias (q), or added to out.

    oneDNN returns a tensor of its own, so a side goes in pieces: small enough for the cache, and for the allocator to
    hand the same bytes out again. Not the side of a transposed b, for which oneDNN has no fast matmul.
    """
    p, q = out.shape
    rows = p >= q or b.stride(1) != 1
    side = p if rows else q
    step = -(-side // -(-p * q // PIECE))
    for part in (slice(start, start + step) for start in range(0, side, step)):
        if rows:
            into, piece = out[part], onednn()(a[part], b, bias, "none", [], "")
        else:
            into, piece = out[:, part], onednn()(a, b[part], None if bias is None else bias[part], "none", [], "")
        into.add_(piece) if accumulate else into.copy_(piece)


def _few_rows(out: Tensor, x: Tensor, w: Tensor) -> bool:
    """out = x w^T for a few rows in fp32 on a CPU; False if it is another case.

    One row: torch multiplies a vector on one thread, but several matrices on all, 1.4 times as fast with w on the left;
    reading w is all there is to it.
    More: oneDNN takes half of MKL's time. w goes in as the left operand, which is read as it lies. The result is a
    temporary of oneDNN's, the size of out.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if x.shape[0] == 1:
        n = math.gcd(w.shape[0], BLOCKS)
        torch.bmm(w.view(n, -1, w.shape[1]), x.t().expand(n, -1, 1), out=out.view(n, -1, 1))
        return True
    oneDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if oneDNN is None or x.shape[0] not in FEW:
        return False
    out.copy_(oneDNN(w, x, None, "none", [], "").t())
    return True


def product(rows: str, matrix: str) -> Flops:
    """Of a matmul between each row of one argument and a matrix."""
    return lambda given: int(2 * given[rows].shape[0] * given[matrix].numel())


@op("out", flops=product("x", "w"))
def matmul_forward(out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None) -> None:
    """out (n, O) = x (n, I) @ w (O, I)^T + b (O) + add (n, O), which is not out itself."""
    if _few_rows(out, x, w):
        if b is not None:
            out.add_(b)
    elif _for_onednn(out, x.shape[1]):
        _by_onednn(out, x, w, b)
    elif b is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(b, x, w.t(), out=out)
    if add is not None:
        out.add_(add)


@op("out", "pre", flops=product("x", "w"))
def matmul_gelu_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, b: Tensor) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T + b (O), kept for backward; out (n, O) = gelu(pre)."""
    matmul_forward(pre, x, w, b)
    gelu_forward(out, pre)


@op("out")
def gelu_forward(out: Tensor, pre: Tensor) -> None:
    """out = gelu(pre), of one shape: alone where something is added to pre between the matmul and GELU."""
    torch.ops.aten.gelu.out(pre, approximate="tanh", out=out)


@op("dpre", "gelu", adds=("dpre",))
def gelu_backward(dpre: Tensor, gelu: Tensor | None, pre: Tensor) -> None:
    """dpre *= gelu'(pre); gelu = gelu(pre) once more, if it is wanted."""
    torch.ops.aten.gelu_backward.grad_input(dpre, pre, approximate="tanh", grad_input=dpre)
    if gelu is not None:
        gelu_forward(gelu, pre)


@op("dx", flops=product("dout", "w"))
def matmul_backward_input(dx: Tensor, dout: Tensor, w: Tensor) -> None:
    """dx (n, I) = dout (n, O) @ w (O, I)."""
    if _for_onednn(dx, dout.shape[1]):
        _by_onednn(dx, dout, w.t())
    else:
        torch.mm(dout, w, out=dx)


@op("dw", adds=("dw",), flops=product("dout", "dw"))
def matmul_backward_weight(dw: Tensor, dout: Tensor, x: Tensor, *, accumulate: bool) -> None:
    """dw (O, I) = dout (n, O)^T @ x (n, I), added to dw if `accumulate`."""
    step = min(len(x), DEPTH)
    if _for_onednn(dw, step):  # in pieces: oneDNN is slower where it sums over many rows at once
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            _by_onednn(dw, dout[rows].t(), x[rows].t(), accumulate=accumulate or start > 0)
        return
    if accumulate:
        dw.addmm_(dout.t(), x)
    else:
        torch.mm(dout.t(), x, out=dw)


@op("out", flops=lambda given: 2 * given["out"].numel() * given["a"].shape[2])
def matmul_batched(
    out: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0
) -> None:
    """out (N, p, q) = alpha a (N, p, k) @ b (N, k, q) + beta add (N, p, q), which is not out itself.

    a, b: contiguous, or the transposed view of a contiguous tensor."""
    if add is None:
        torch.baddbmm(out, a, b, beta=0.0, alpha=alpha, out=out)
    else:
        torch.baddbmm(add, a, b, beta=beta, alpha=alpha, out=out)


def bias_temps(db: Tensor | None, dout: Tensor, **_: object) -> Temps:
    return [((dout.shape[1],), dout.dtype)]


@op("db", temps=bias_temps, adds=("db",))
def bias_backward(db: Tensor, dout: Tensor, *, accumulate: bool, scratch: Scratch) -> None:
    """db (O) = column sums of dout (n, O), added to db if `accumulate`. torch sums bf16 columns in fp32."""
    if accumulate:
        (total,) = scratch(bias_temps(db, dout))
        torch.sum(dout, 0, out=total)
        db.add_(total)
    else:
        torch.sum(dout, 0, out=db)


def gelu_backward_temps(dpre: Tensor, gelu: Tensor | None, db: Tensor | None, *_: object, **__: object) -> Temps:
    return bias_temps(db, dpre)


@op("dpre", "gelu", "db", temps=gelu_backward_temps, adds=("db",), flops=product("dout", "w"))
def matmul_gelu_backward(
    dpre: Tensor, gelu: Tensor | None, db: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor,
    *, accumulate: bool, scratch: Scratch,
) -> None:  # fmt: skip
    """Back through a linear layer, the GELU before it and the bias before that.

    dpre (n, I) = (dout (n, O) @ w (O, I)) * gelu'(pre (n, I)); db (I) = its column sums, added to db if `accumulate`;
    gelu (n, I) = gelu(pre) once more. db and gelu may be None, where nobody wants them.
    """
    matmul_backward_input(dpre, dout, w)
    gelu_backward(dpre, gelu, pre)
    if db is not None:
        bias_backward(db, dpre, accumulate=accumulate, scratch=scratch)


@op("out", "gateup", temps=glu.forward_temps, flops=product("x", "w"))
def matmul_swiglu_forward(
    out: Tensor, gateup: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None,
    *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """gateup (n, 2F) = x (n, I) @ w (2F, I)^T + b (2F), kept for backward; out (n, F) = the gated product of its halves
    (glu.py), with gelu instead of silu if asked for."""
    matmul_forward(gateup, x, w, b)
    glu.swiglu_forward(out, gateup, gelu=gelu, scratch=scratch)


@op("d_gateup", "rewrite", "d_act", temps=glu.backward_temps, flops=product("dout", "w"))
def matmul_swiglu_backward(
    d_gateup: Tensor, rewrite: Tensor | None, d_act: Tensor, dout: Tensor, w: Tensor, gateup: Tensor,
    *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """Back through a linear layer and the gate before it: d_gateup (n, 2F), which may be gateup, from dout (n, O) and w
    (O, F). rewrite (n, F) = the gate's output once more, if wanted. d_act (n, F) is room for that output's gradient, if
    a backend needs it."""
    matmul_backward_input(d_act, dout, w)
    glu.swiglu_backward(d_gateup, rewrite, d_act, gateup, gelu=gelu, scratch=scratch)


@op("out", "pre", temps=relu.relu2_temps, flops=product("x", "w"))
def matmul_relu2_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T, kept for backward; out (n, O) = the squared ReLU of pre as it is stored."""
    matmul_forward(pre, x, w)
    relu.relu2_forward(out, pre, scratch=scratch)


@op("dpre", "rewrite", temps=relu.relu2_backward_temps, flops=product("dout", "w"))
def matmul_relu2_backward(
    dpre: Tensor, rewrite: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor, *, scratch: Scratch
) -> None:
    """Back through a linear layer and the squared ReLU before it: dpre (n, I) = (dout (n, O) @ w (O, I)) 2 max(pre, 0).
    rewrite (n, I) = the squared ReLU of pre once more, if wanted."""
    matmul_backward_input(dpre, dout, w)
    relu.relu2_backward(dpre, rewrite, pre, scratch=scratch)


def decode_temps(out: Tensor, x: Tensor, w: Tensor, *_: object, **__: object) -> Temps:
    """The layernorm's output and statistics, and what it needs itself."""
    n, acc = x.shape[0], acc_dtype(x.dtype)
    own = [(x.shape, x.dtype), ((n,), acc), ((n,), acc)]
    return [*own, *forward_temps(x, x, x, x)]


@op("out", temps=decode_temps)
def matmul_decode(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None, add: Tensor | None = None,
    lnw: Tensor | None = None, lnb: Tensor | None = None, *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """out (n, O) = act(norm(x (n, I)) @ w (O, I)^T + b (O)) + add (n, O): a matmul while one or two
    sequences are decoded, with all that is around it. norm: layernorm with weight lnw (I) and bias lnb (I), where they
    are given; act: GELU, if asked for."""
    if lnw is not None and lnb is not None:
        ln, mean, rstd, *rest = scratch(decode_temps(out, x, w))
        layernorm_forward(ln, mean, rstd, x, lnw, lnb, scratch=lambda _: rest)
        x = ln
    matmul_forward(out, x, w, b, add)
    if gelu:
        torch.ops.aten.gelu.out(out, approximate="tanh", out=out)


def rms_decode_temps(out: Tensor, x: Tensor, w: Tensor, *_: object, gate: str = "", **__: object) -> Temps:
    """The norm's output and statistic, with a gate its input, and what they need themselves."""
    own = [(x.shape, x.dtype), ((x.shape[0],), acc_dtype(x.dtype)), *rms_temps(x, x, x)]
    return [*own, ((x.shape[0], w.shape[0]), x.dtype), *glu.forward_temps(out)] if gate else own


@op("out", temps=rms_decode_temps)
def matmul_rms_decode(
    out: Tensor, x: Tensor, w: Tensor, b: Tensor | None, normw: Tensor,
    *, eps: float, offset: float = 0.0, gate: str = "", scratch: Scratch,
) -> None:  # fmt: skip
    """matmul_decode for the decoder family: out (n, O) = y @ w (O, I)^T + b (O), where y is the RMSNorm of x (n, I),
    with weight normw (I). With a `gate` of silu or gelu, out (n, O / 2) is the gated product of that's halves."""
    temps = scratch(rms_decode_temps(out, x, w, gate=gate))
    (y, rstd), inside, more = temps[:2], temps[2:5], temps[5:]
    rmsnorm_forward(y, rstd, x, normw, eps=eps, offset=offset, scratch=lambda _: inside)
    matmul_forward(more[0] if gate else out, y, w, b)
    if gate:
        glu.swiglu_forward(out, more[0], gelu=gate == "gelu", scratch=lambda _: more[1:])
