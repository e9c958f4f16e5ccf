"""Cases of causal attention: every backend, on slices of a packed qkv."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DECODE, DEVICE, Case, launch, rand
from torch import Tensor

from daybreak.kernels.cuda import missing_backends

EXEMPT = "bound by tensor cores and exponentials, not by memory"


def _packed(x: Tensor, NH: int) -> list[Tensor]:
    B, T, C3 = x.shape
    return [part.view(B, T, NH, C3 // 3 // NH) for part in x.split(C3 // 3, dim=2)]


def _forward(backend: str, B: int, T: int, C: int, NH: int) -> Case:
    def make() -> Callable[[], None]:
        out, lse = rand(B, T, NH, C // NH), rand(B, NH, T, dtype=torch.float32)
        q, k, v = _packed(rand(B, T, 3 * C), NH)
        return launch("attention_forward", backend, out, lse, q, k, v, scale=(C // NH) ** -0.5)

    nbytes = 4 * B * T * C * 2 + B * NH * T * 4
    return Case("attention_forward", backend, nbytes, 2 * B * T * (T + 1) * C, make, EXEMPT)


def _backward(backend: str, B: int, T: int, C: int, NH: int) -> Case:
    """Operations are those of the five products that a backward needs, whatever a kernel computes twice."""

    def make() -> Callable[[], None]:
        scale = (C // NH) ** -0.5
        out, lse = rand(B, T, NH, C // NH), rand(B, NH, T, dtype=torch.float32)
        qkv, dout = _packed(rand(B, T, 3 * C), NH), rand(B, T, NH, C // NH)
        launch("attention_forward", "triton", out, lse, *qkv, scale=scale)()
        dqkv = _packed(rand(B, T, 3 * C), NH)
        return launch("attention_backward", backend, *dqkv, dout, *qkv, out, lse, scale=scale)

    nbytes = 8 * B * T * C * 2 + B * NH * T * 4
    return Case("attention_backward", backend, nbytes, 5 * B * T * (T + 1) * C, make, EXEMPT)


def _decode(T: int, C: int, NH: int) -> Case:
    """The last place of one text: reading its keys and values is all there is to it."""

    def make() -> Callable[[], None]:
        q, k, v = rand(1, 3, NH, C // NH).unbind(1)
        cache, place = rand(2, 1, NH, T, C // NH), torch.tensor([T - 1], device=DEVICE)
        return launch(
            "attention_decode", "triton", rand(1, NH, C // NH), cache, q, k, v, place, scale=(C // NH) ** -0.5
        )

    return Case("attention_decode", "triton", (2 * T + 4) * C * 2, 4 * T * C, make, DECODE, "one row")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Both operations in each backend that this machine has, and the one row of a text under way."""
    missing = missing_backends(torch.cuda.get_device_capability()) if torch.cuda.is_available() else {}
    found = []
    for backend in ("triton", "cudnn", "fa4"):
        if backend not in missing:
            if backend != "fa4":  # its forward is cuDNN's
                found.append(_forward(backend, B, T, C, NH))
            found.append(_backward(backend, B, T, C, NH))
    return [*found, _decode(T, C, NH)]
