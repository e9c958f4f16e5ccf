"""Cases of SwiGLU, with an MLP of four times the width as GPT-2's shapes have it."""

from __future__ import annotations

from collections.abc import Callable

from timing import Case, launch, rand


def _forward(n: int, F: int) -> Case:
    def make() -> Callable[[], None]:
        return launch("swiglu_forward", "triton", rand(n, F), rand(n, 2 * F))

    return Case("swiglu_forward", "triton", 3 * n * F * 2, 0, make)


def _backward(n: int, F: int, *, again: bool) -> Case:
    """In place, as a step has it."""

    def make() -> Callable[[], None]:
        gateup, d_out = rand(n, 2 * F), rand(n, F)
        return launch("swiglu_backward", "triton", gateup, rand(n, F) if again else None, d_out, gateup)

    return Case("swiglu_backward", "triton", (5 + again) * n * F * 2, 0, make, note="again" if again else "")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Forward, and backward with and without the output once more."""
    n, F = B * T, 4 * C
    return [_forward(n, F), _backward(n, F, again=False), _backward(n, F, again=True)]
