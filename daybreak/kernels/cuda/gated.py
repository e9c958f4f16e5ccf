"""The matmuls of a gated MLP, or of one with a squared ReLU, where no epilogue has that: cuBLASLt's matmul, then a pass
of glu.py or relu.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from daybreak.kernels import OPS, Scratch, Temps, backend, glu, relu, temps_bytes
from daybreak.kernels.cuda import cublaslt, missing_backends


def _pass(name: str, scratch: Scratch) -> Callable[..., None]:
    """An operation of glu.py or relu.py: the Triton kernel where there is Triton."""
    impl = OPS[name].impls["torch" if "triton" in missing_backends() else "triton"]
    return impl.fn if impl.temps is None else partial(impl.fn, scratch=scratch)


def forward_temps(out: Tensor, *_: object, **__: object) -> Temps:
    """The library's workspace and, later in the same bytes, what the pass needs."""
    return max(cublaslt.workspace(), glu.forward_temps(out), key=temps_bytes)


@backend("cublaslt", temps=forward_temps)
def matmul_swiglu_forward(
    out: Tensor, gateup: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None,
    *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """gateup (n, 2F) = x (n, I) @ w (2F, I)^T + b (2F); out (n, F) from its rounded values."""
    cublaslt.matmul_forward(gateup, x, w, b, scratch=scratch)
    if not out.is_meta:  # `cublaslt.listed` wants the matmul only
        _pass("swiglu_forward", scratch)(out, gateup, gelu=gelu)


def backward_temps(d_gateup: Tensor, rewrite: Tensor | None, d_act: Tensor, *_: object, **__: object) -> Temps:
    """The library's workspace and, later in the same bytes, what the pass needs."""
    return max(cublaslt.workspace(), glu.backward_temps(d_gateup, rewrite, d_act), key=temps_bytes)


@backend("cublaslt", temps=backward_temps)
def matmul_swiglu_backward(
    d_gateup: Tensor, rewrite: Tensor | None, d_act: Tensor, dout: Tensor, w: Tensor, gateup: Tensor,
    *, gelu: bool = False, scratch: Scratch,
) -> None:  # fmt: skip
    """d_act (n, F) = dout (n, O) @ w (O, F); d_gateup and rewrite from its rounded values."""
    cublaslt.matmul_backward_input(d_act, dout, w, scratch=scratch)
    if not d_act.is_meta:
        _pass("swiglu_backward", scratch)(d_gateup, rewrite, d_act, gateup, gelu=gelu)


def relu2_temps(dpre: Tensor, *_: object, **__: object) -> Temps:
    """The library's workspace and, later in the same bytes, what the pass needs."""
    return max(cublaslt.workspace(), relu.relu2_backward_temps(dpre), key=temps_bytes)


@backend("cublaslt", temps=relu2_temps)
def matmul_relu2_forward(out: Tensor, pre: Tensor, x: Tensor, w: Tensor, *, scratch: Scratch) -> None:
    """pre (n, O) = x (n, I) @ w (O, I)^T; out (n, O) from its rounded values."""
    cublaslt.matmul_forward(pre, x, w, scratch=scratch)
    if not out.is_meta:
        _pass("relu2_forward", scratch)(out, pre)


@backend("cublaslt", temps=relu2_temps)
def matmul_relu2_backward(
    dpre: Tensor, rewrite: Tensor | None, dout: Tensor, w: Tensor, pre: Tensor, *, scratch: Scratch
) -> None:
    """dpre (n, I) = dout (n, O) @ w (O, I), times the slope from its rounded values; rewrite in the same pass."""
    cublaslt.matmul_backward_input(dpre, dout, w, scratch=scratch)
    if not dpre.is_meta:
        _pass("relu2_backward", scratch)(dpre, rewrite, pre)
