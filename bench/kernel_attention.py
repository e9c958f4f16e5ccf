"""Cases of causal attention: every backend, on slices of a packed qkv."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DECODE, DEVICE, Case, launch, rand
from torch import Tensor

from daybreak.kernels.cuda import missing_backends

EXEMPT = "bound by tensor cores and exponentials, not by memory"


def _packed(x: Tensor, NH: int, HS: int) -> list[Tensor]:
    """Queries, keys and values of packed x (B, T, (NH + 2 NKV) HS)."""
    heads = x.unflatten(2, (-1, HS))
    NKV = (heads.shape[2] - NH) // 2
    return list(heads.split([NH, NKV, NKV], 2))


def _work(T: int, window: int) -> int:
    """Pairs of a query and a key that it sees."""
    seen = min(T, window or T)
    return seen * (seen + 1) // 2 + (T - seen) * seen


def _forward(backend: str, B: int, T: int, C: int, NH: int, NKV: int, window: int = 0) -> Case:
    HS, how = C // NH, {"window": window} if window else {}

    def make() -> Callable[[], None]:
        out, lse = rand(B, T, NH, HS), rand(B, NH, T, dtype=torch.float32)
        q, k, v = _packed(rand(B, T, C + 2 * NKV * HS), NH, HS)
        return launch("attention_forward", backend, out, lse, q, k, v, scale=HS**-0.5, **how)

    nbytes = 2 * B * T * (C + NKV * HS) * 2 + B * NH * T * 4
    note = _note(NH, NKV, window, HS)
    return Case("attention_forward", backend, nbytes, 4 * B * C * _work(T, window), make, EXEMPT, note)


def _backward(backend: str, B: int, T: int, C: int, NH: int, NKV: int, window: int = 0) -> Case:
    """Operations are those of the five matmuls that a backward needs, whatever a kernel computes twice."""
    HS, how = C // NH, {"window": window} if window else {}

    def make() -> Callable[[], None]:
        out, lse = rand(B, T, NH, HS), rand(B, NH, T, dtype=torch.float32)
        qkv, grads = (_packed(rand(B, T, C + 2 * NKV * HS), NH, HS) for _ in range(2))
        dout = rand(B, T, NH, HS)
        launch("attention_forward", "triton", out, lse, *qkv, scale=HS**-0.5, **how)()
        return launch("attention_backward", backend, *grads, dout, *qkv, out, lse, scale=HS**-0.5, **how)

    nbytes = 4 * B * T * (C + NKV * HS) * 2 + B * NH * T * 4
    note = _note(NH, NKV, window, HS)
    return Case("attention_backward", backend, nbytes, 10 * B * C * _work(T, window), make, EXEMPT, note)


def _note(NH: int, NKV: int, window: int, HS: int) -> str:
    wide = [f"heads of {HS}"] * (HS > 128)
    return ", ".join(wide + [f"{NKV} heads of keys"] * (NKV < NH) + [f"window {window}"] * (window > 0))


def _decode(T: int, C: int, NH: int) -> Case:
    """The last place of one text: reading its keys and values is all there is to it."""

    def make() -> Callable[[], None]:
        q, k, v = rand(1, 3, NH, C // NH).unbind(1)
        cache, place = rand(2, 1, NH, T, C // NH), torch.tensor([T - 1], device=DEVICE)
        return launch(
            "attention_decode", "triton", rand(1, NH, C // NH), cache, q, k, v, place, scale=(C // NH) ** -0.5
        )

    return Case("attention_decode", "triton", (2 * T + 4) * C * 2, 4 * T * C, make, DECODE, "one row")


def _shared(NH: int) -> int:
    """Heads of keys where up to five of queries share one."""
    return next(NH // group for group in (5, 4, 2, 1) if NH % group == 0)


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Both operations in each backend that this machine has, also with shared keys and a window, the heads of Gemma 3,
    and one sequence that decodes a token."""
    missing = missing_backends(torch.cuda.get_device_capability()) if torch.cuda.is_available() else {}
    found = []
    for backend in ("triton", "cudnn", "fa4"):
        if backend not in missing:
            for NKV, window in ((NH, 0), (_shared(NH), 0), (_shared(NH), T // 4)):
                if backend != "fa4":  # its forward is cuDNN's
                    found.append(_forward(backend, B, T, C, NH, NKV, window))
                found.append(_backward(backend, B, T, C, NH, NKV, window))
    gemma = [make("triton", B, T, 1024, 4, 1, 512) for make in (_forward, _backward)]
    return [*found, *gemma, _decode(T, C, NH)]
