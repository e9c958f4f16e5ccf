"""Cases of SwiGLU and GeGLU, with an MLP of four times the width as GPT-2's shapes have it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from timing import DECODE, PRODUCT, Case, launch, rand


def _forward(n: int, F: int, *, gelu: bool = False) -> Case:
    def make() -> Callable[[], None]:
        return launch("swiglu_forward", "triton", rand(n, F), rand(n, 2 * F), gelu=gelu)

    return Case("swiglu_forward", "triton", 3 * n * F * 2, 0, make, note="gelu" if gelu else "")


def _backward(n: int, F: int, *, again: bool, gelu: bool = False) -> Case:
    """In place, as a step has it."""

    def make() -> Callable[[], None]:
        gateup, d_out = rand(n, 2 * F), rand(n, F)
        return launch("swiglu_backward", "triton", gateup, rand(n, F) if again else None, d_out, gateup, gelu=gelu)

    note = ", ".join(["gelu"] * gelu + ["again"] * again)
    return Case("swiglu_backward", "triton", (5 + again) * n * F * 2, 0, make, note=note)


def _products(n: int, C: int, F: int) -> list[Case]:
    """The matmuls that have the gate inside, in turns with those that have it behind them."""
    found = []
    for backend in ("quack", "cublaslt"):

        def forward(backend: str = backend) -> Callable[[], None]:
            w = rand(2 * F, C, scale=C**-0.5)
            return launch("matmul_swiglu_forward", backend, rand(n, F), rand(n, 2 * F), rand(n, C), w)

        def backward(again: bool, backend: str = backend) -> Callable[[], None]:
            gateup, room, rewrite = rand(n, 2 * F), rand(n, F), rand(n, F) if again else None
            given = (rand(n, C), rand(C, F, scale=C**-0.5), gateup)
            return launch("matmul_swiglu_backward", backend, gateup, rewrite, room, *given)

        nbytes, flops = 2 * (n * (3 * F + C) + 2 * F * C), 4 * n * F * C
        found.append(Case("matmul_swiglu_forward", backend, nbytes, flops, forward, PRODUCT))
        for again in (False, True):
            nbytes, make = 2 * (n * ((4 + again) * F + C) + F * C), partial(backward, again)
            note = "again" if again else ""
            found.append(Case("matmul_swiglu_backward", backend, nbytes, 2 * n * F * C, make, PRODUCT, note))
    return found


def _decode(backend: str, name: str, I: int, O: int) -> Case:
    """A matmul for one sequence that decodes a token, after RMSNorm, and with its gate if it is gateup."""

    def make() -> Callable[[], None]:
        out, w, gate = (
            rand(1, O // 2 if name == "gateup" else O),
            rand(O, I, scale=I**-0.5),
            "silu" * (name == "gateup"),
        )
        return launch("matmul_rms_decode", backend, out, rand(1, I), w, None, rand(I), eps=1e-6, gate=gate)

    return Case("matmul_rms_decode", backend, 2 * I * O, 2 * I * O, make, DECODE, f"{name}, one row")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Forward, and backward with and without the output once more; both with GELU; and both inside their matmuls."""
    n, F = B * T, 4 * C
    gelu = [_forward(n, F, gelu=True), _backward(n, F, again=False, gelu=True)]
    passes = [_forward(n, F), _backward(n, F, again=False), _backward(n, F, again=True), *gelu]
    decode = [_decode(b, *size) for size in (("gateup", C, 2 * F), ("qkv", C, 3 * C)) for b in ("triton", "torch")]
    return [*passes, *_products(n, C, F), *decode]
