"""Cases of SwiGLU and GeGLU, with an MLP of four times the width as GPT-2's shapes have it."""

from __future__ import annotations

from collections.abc import Callable

from timing import Case, launch, rand


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


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Forward, and backward with and without the output once more; both with GELU."""
    n, F = B * T, 4 * C
    gelu = [_forward(n, F, gelu=True), _backward(n, F, again=False, gelu=True)]
    return [_forward(n, F), _backward(n, F, again=False), _backward(n, F, again=True), *gelu]
