"""Pieces that model files share: a few kernel calls each, forward and backward in pairs.

Every piece takes a layer's frame b, then names of parameters, then tensors. n rows are the tokens of a micro-batch, or
of the sequences that decode one token each. What you read is what runs, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from daybreak.models.frame import Frame, Matrix

Out = TypeVar("Out", bound=Matrix)
ACTS: Mapping[str, dict[str, bool]] = {"silu": {}, "gelu": {"gelu": True}}  # arguments of kernels, by a gate's act


def layernorm(b: Frame, name: str, x: Tensor, out: Out) -> Out:
    """out (n, C) = layernorm of the rows of x, with weight and bias `name`. Returns out."""
    n = x.shape[0]
    mean, rstd = b.a(name + ".mean", n, dtype=b.acc), b.a(name + ".rstd", n, dtype=b.acc)
    b.k.layernorm_forward(out, mean, rstd, x, b.w(name + "w"), b.w(name + "b"))
    return out


def layernorm_backward(
    b: Frame, name: str, d: Tensor, d_out: Tensor, x: Tensor, *, below: Tensor | None, starts: bool = False
) -> Matrix:
    """Add the gradient of layernorm's input x to d, the residual stream's gradient; `starts` overwrites d instead.

    d is then also the gradient of the linear layer whose output was added to the stream just before. The same pass
    sums it into `below`, the gradient of that layer's bias. Returns the layernorm's output."""
    (out, rewrite), n = b.output(name, *x.shape), x.shape[0]
    mean, rstd = b.a(name + ".mean", n, dtype=b.acc), b.a(name + ".rstd", n, dtype=b.acc)
    b.k.layernorm_backward(
        d, b.g(name + "w"), b.g(name + "b"), below, rewrite, d_out, x, mean, rstd,
        b.w(name + "w"), b.w(name + "b"), accumulate_dx=not starts, accumulate=b.mode.accumulate,
    )  # fmt: skip
    return out


def rmsnorm(b: Frame, name: str, x: Tensor, out: Out, **how: Any) -> Out:
    """out = RMSNorm of x (n, C), or of each head of x (n, heads, HS), with weight `name`. Returns out.

    how: eps, and if need be the offset of the weight and what to add (see kernels/norm.py)."""
    b.k.rmsnorm_forward(out, b.a(name + ".rstd", *x.shape[:-1], dtype=b.acc), x, b.w(name + "w"), **how)
    return out


def rmsnorm_backward(
    b: Frame, name: str, d: Tensor, d_out: Tensor, x: Tensor,
    *, starts: bool = False, kept: bool = True, offset: float = 0.0,
) -> Matrix:  # fmt: skip
    """Add the gradient of RMSNorm's input x to d; `starts` overwrites d instead, which may then be d_out.

    Returns the norm's output, or x if the output is not `kept`, as of a norm that is added to the residual stream."""
    out, rewrite = b.output(name, *x.shape) if kept else (x, None)
    rstd = b.a(name + ".rstd", *x.shape[:-1], dtype=b.acc)
    b.k.rmsnorm_backward(
        d, b.g(name + "w"), rewrite, d_out, x, rstd, b.w(name + "w"),
        accumulate_dx=not starts, accumulate=b.mode.accumulate, offset=offset,
    )  # fmt: skip
    return out


def linear(
    b: Frame, name: str, x: Any, out: Out,
    *, norm: str = "", pre: Tensor | None = None, add: Tensor | None = None, tied: str = "", bias: bool = True,
    rms: Mapping[str, float] | None = None, gate: str = "",
) -> Out:  # fmt: skip
    """out (n, O) = gelu(norm(x) @ w^T + bias) + add, where `norm` names a layernorm, and gelu is computed if `pre`, for
    its input, is given. `tied`: another parameter is the weight, and there is no bias. Returns out.

    rms: `norm` is an RMSNorm, with these options. gate: see `gated`, which asks for it where few rows decode. There
    one kernel does all of it: most of the time goes into reading w, and another launch would take about as long."""
    adapter = None if tied else b.adapter(name)
    few = b.mode.few and adapter is None
    if norm and not few:
        x = _normed(b, norm, rms, x)
    w, shift = b.matmul_w(tied or name + "w"), b.w(name + "b") if bias and not tied else None
    if few:
        _of_few_rows(b, norm, rms, gate, pre is not None, out, x, w, shift, add)
    elif adapter is not None or pre is None or (isinstance(out, Tensor) and not isinstance(w, Tensor)):
        _in_steps(b, name, adapter, out, pre, x, w, shift, add)
    else:
        b.k.matmul_gelu_forward(out, pre, x, w, shift)
    return out


def _normed(b: Frame, norm: str, rms: Mapping[str, float] | None, x: Tensor) -> Matrix:
    """The matrix that `linear` multiplies: the layernorm of x, or its RMSNorm with these options."""
    out = b.matmul_a(norm, *x.shape)
    return layernorm(b, norm, x, out) if rms is None else rmsnorm(b, norm, x, out, **rms)


def _of_few_rows(
    b: Frame, norm: str, rms: Mapping[str, float] | None, gate: str, gelu: bool,
    out: Any, x: Any, w: Any, shift: Tensor | None, add: Tensor | None,
) -> None:  # fmt: skip
    """`linear` of few rows that decode, in one kernel."""
    if rms is not None:
        b.k.matmul_rms_decode(out, x, w, shift, b.w(norm + "w"), gate=gate, **rms)
        return
    ln = (b.w(norm + "w"), b.w(norm + "b")) if norm else (None, None)
    b.k.matmul_decode(out, x, w, shift, add, *ln, gelu=gelu)


def _in_steps(b: Frame, name: str, adapter: Any, out: Any, pre: Tensor | None, x: Any, *w_bias_add: Any) -> None:
    """`linear` as a matmul, an adapter if there is one, and GELU. It also serves layers with only the weight in fp8."""
    y = out if pre is None else pre
    b.k.matmul_forward(y, b.matmul_copy(name + ".x", x), *w_bias_add)
    if adapter is not None:
        down, up = b.w(name + "_A"), b.w(name + "_B")
        u = b.a(name + ".u", x.shape[0], down.shape[0], plain=True)  # narrow, so it is always kept for backward
        b.k.lora_forward(y, u, x, down, up, scale=adapter.scale, columns=adapter.columns)
    if pre is not None:
        b.k.gelu_forward(out, pre)


def adapter_grad(b: Frame, name: str, dy: Any) -> None:
    """If a linear layer has an adapter, which adds B u with u = A x to it: the gradients of B and u. Call it before
    `input_grad` and `weight_grad`, which add the adapter's terms to theirs."""
    if (adapter := b.adapter(name)) is None:
        return
    up, n = b.w(name + "_B"), dy.shape[0]
    width = up.shape[1] * len(adapter.columns)
    u, du, how = b.a(name + ".u", n, width, plain=True), b.d(name + ".u", n, width), {"accumulate": b.mode.accumulate}
    b.k.lora_backward(du, b.g(name + "_B"), dy, u, up, scale=adapter.scale, columns=adapter.columns, **how)


def _d_u(b: Frame, name: str, n: int) -> tuple[Tensor, Tensor]:
    """The gradient that `adapter_grad` computed, and the adapter's A."""
    down = b.w(name + "_A")
    return b.d(name + ".u", n, down.shape[0]), down


def input_grad(b: Frame, name: str, dx: Any, dy: Matrix) -> Any:
    """dx (n, I) = dy (n, O) @ w: back through a linear layer. Returns dx."""
    b.k.matmul_backward_input(dx, b.matmul_copy(name + ".d_y", dy, plain=True), b.matmul_w(name + "w"))
    if b.adapter(name) is not None:
        b.k.lora_backward_input(dx, *_d_u(b, name, dx.shape[0]))
    return dx


def gelu_input_grad(b: Frame, name: str, before: str, d_pre: Matrix, dy: Matrix, pre: Tensor) -> Matrix:
    """Back through linear layer `name` and the GELU that feeds it, into d_pre. The linear layer `before` GELU gets the
    gradient of its bias. Returns GELU's output."""
    out, rewrite = b.output("gelu", *pre.shape)
    w, db = b.matmul_w(name + "w") if b.adapter(name) is None else None, b.g(before + "b")
    if w is None or (isinstance(d_pre, Tensor) and not isinstance(w, Tensor)):  # beside adapters no bias is trained
        b.k.gelu_backward(input_grad(b, name, d_pre, dy), rewrite, pre)
        return out
    b.k.matmul_gelu_backward(d_pre, rewrite, db, dy, w, pre, accumulate=b.mode.accumulate)
    return out


def fused_w(b: Frame, name: str, *others: Any) -> Tensor | None:
    """The weight of linear layer `name` if one kernel may compute the layer together with a function beside it: where
    there is no adapter, and all matrices are plain tensors. Else None."""
    w = b.matmul_w(name + "w") if b.adapter(name) is None else None
    return w if isinstance(w, Tensor) and all(isinstance(x, Tensor) for x in others) else None


def gated(
    b: Frame, name: str, x: Any, gateup: Tensor, out: Out, act: str,
    *, norm: str, rms: Mapping[str, float], bias: bool,
) -> Out:  # fmt: skip
    """out (n, F) = act(gate) * up, where gateup (n, 2F) = [gate, up] is linear layer `name` of the RMSNorm of
    x, and act is silu or gelu. Returns out. One kernel does both if `fused_w` gives a weight."""
    if b.mode.few and b.adapter(name) is None:
        return linear(b, name, x, out, norm=norm, rms=rms, bias=bias, gate=act)
    x = _normed(b, norm, rms, x)
    if (w := fused_w(b, name, x, out)) is not None:
        shift = b.w(name + "b") if bias else None
        b.k.matmul_swiglu_forward(out, gateup, x, w, shift, **ACTS[act])
    else:
        b.k.swiglu_forward(out, linear(b, name, x, gateup, bias=bias), **ACTS[act])
    return out


def gated_backward(b: Frame, name: str, gateup: Tensor, dy: Matrix, act: str) -> Matrix:
    """Back through linear layer `name` and the gate before it: gateup (n, 2F) becomes its own gradient. Returns the
    gate's output."""
    n, F = gateup.shape[0], gateup.shape[1] // 2
    d_act, (out, rewrite) = b.d("swiglu", n, F), b.output("swiglu", n, F)
    if (w := fused_w(b, name, dy, out)) is not None:
        b.k.matmul_swiglu_backward(gateup, rewrite, d_act, dy, w, gateup, **ACTS[act])
    else:
        b.k.swiglu_backward(gateup, rewrite, input_grad(b, name, d_act, dy), gateup, **ACTS[act])
    return out


def rope(b: Frame, heads: Sequence[Tensor], freq: Tensor, *, attention: float, back: bool = False) -> None:
    """Turn (B, T, heads, HS) by their places' angles, in place, and gradients `back`. `attention` scales both."""
    places = b.mode.places
    for x in heads:
        rows = x if places is None else x.view(-1, 1, *x.shape[2:])
        b.k.rope(rows, freq, places, attention=attention, back=back)


def weight_grad(b: Frame, name: str, dy: Matrix, x: Matrix, *, late: bool = False) -> None:
    """The gradient dy^T @ x of a linear layer's weight. `late` puts it off: the model calls what mode.late collects."""
    if late:
        b.mode.late.append(lambda: weight_grad(b, name, dy, x))
        return
    if (dw := b.g(name + "w")) is not None:
        b.k.matmul_backward_weight(dw, dy, x, accumulate=b.mode.accumulate)
    if b.adapter(name) is not None:
        da, (du, _) = b.g(name + "_A"), _d_u(b, name, x.shape[0])
        b.k.lora_backward_weight(da, du, x, accumulate=b.mode.accumulate)


def bias_grad(b: Frame, name: str, dy: Tensor) -> None:
    """The column sums of dy: the gradient of a linear layer's bias."""
    if (db := b.g(name + "b")) is not None:
        b.k.bias_backward(db, dy, accumulate=b.mode.accumulate)


def attention(b: Frame, out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, **sees: Any) -> None:
    """Causal attention. All are (B, T, heads, HS) views, which may be strided. `sees` may be window=W: W keys a query.
    Inside packed rows it stays in each document.

    Decoding has T = 1, and reads the keys and values of earlier tokens from the cache. Prefill only fills the cache."""
    cache = None if b.mode.cache is None else b.mode.cache[b.index]
    if b.mode.positions is not None:
        b.k.attention_decode(out[:, 0], cache, q[:, 0], k[:, 0], v[:, 0], b.mode.positions, scale=scale, **sees)
        return
    b.k.attention_forward(out, _logsumexp(b, q), q, k, v, scale=scale, **sees, **_documents(b))
    if cache is not None:
        b.k.cache_write(cache, k, v)


def attention_backward(
    b: Frame, grads: Sequence[Tensor], d_out: Tensor, qkv: Sequence[Tensor], out: Tensor, scale: float, **sees: int
) -> None:
    """The gradients of q, k and v, from that of the output."""
    b.k.attention_backward(*grads, d_out, *qkv, out, _logsumexp(b, out), scale=scale, **sees, **_documents(b))


def _documents(b: Frame) -> dict[str, Tensor]:
    """Attention's argument for packed rows: the first key that each query sees."""
    return {} if b.mode.documents is None else {"lo": b.mode.documents.lo}


def _logsumexp(b: Frame, x: Tensor) -> Tensor:
    """log(sum(exp)) of every query's scores, for x (B, T, NH, HS): all that backward needs of the softmax."""
    B, T, NH, _ = x.shape
    return b.a("lse", B, NH, T, dtype=b.acc)
