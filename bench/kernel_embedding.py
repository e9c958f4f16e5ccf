"""Cases of the embedding: tokens with the frequencies of text, and with every tenth of them one token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import DECODE, DEVICE, Case, launch, rand
from torch import Tensor

SORTED = "sorts the tokens to fix the order of its sums: under 1 % of the micro-step instead"


def zipf_tokens(B: int, T: int, V: int, seed: int) -> Tensor:
    """(B, T) int64 on the device: token k about as often as 1 / k."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    u = torch.rand(B, T, generator=generator, device=DEVICE, dtype=torch.float64)
    return ((V + 1.0) ** u - 1).long().clamp(max=V - 1)


def _forward(B: int, T: int, C: int, Vp: int) -> Case:
    used = zipf_tokens(B, T, Vp, 0).unique().numel() if torch.cuda.is_available() else B * T

    def make() -> Callable[[], None]:
        wte, wpe, out = rand(Vp, C), rand(T, C), rand(B * T, C)
        return launch("embedding_forward", "triton", out, zipf_tokens(B, T, Vp, 0), wte, wpe)

    return Case("embedding_forward", "triton", (B * T + used + T) * C * 2 + B * T * 8, 0, make)


def _scaled(B: int, T: int, C: int, Vp: int) -> list[Case]:
    """As Gemma has it: without positions, times a number, forward and backward."""
    used = zipf_tokens(B, T, Vp, 0).unique().numel() if torch.cuda.is_available() else B * T

    def forward() -> Callable[[], None]:
        tokens, wte, out = zipf_tokens(B, T, Vp, 0), rand(Vp, C), rand(B * T, C)
        return launch("embedding_forward", "triton", out, tokens, wte, None, scale=C**0.5)

    def backward() -> Callable[[], None]:
        tokens, dwte, dout = zipf_tokens(B, T, Vp, 0), rand(Vp, C), rand(B * T, C)
        return launch("embedding_backward", "triton", dwte, None, dout, tokens, accumulate=True, scale=C**0.5)

    rows, ids = (B * T + used) * C * 2, B * T * 8
    return [
        Case("embedding_forward", "triton", rows + ids, 0, forward, note="scaled, no positions"),
        Case("embedding_backward", "triton", rows + used * C * 2 + ids, 0, backward, SORTED, "scaled, no positions"),
    ]


def _backward(B: int, T: int, C: int, Vp: int, tenth: bool) -> Case:
    def tokens() -> Tensor:
        drawn = zipf_tokens(B, T, Vp, 0)
        if tenth:
            generator = torch.Generator(DEVICE).manual_seed(1)
            drawn[torch.rand(B, T, generator=generator, device=DEVICE) < 0.1] = 11
        return drawn

    used = tokens().unique().numel() if torch.cuda.is_available() else B * T

    def make() -> Callable[[], None]:
        dwte, dwpe, dout = rand(Vp, C), rand(T, C), rand(B * T, C)
        return launch("embedding_backward", "triton", dwte, dwpe, dout, tokens(), accumulate=True)

    nbytes = (B * T + 2 * used + 2 * T) * C * 2 + B * T * 8
    note = "a tenth is one token" if tenth else "frequencies of text"
    return Case("embedding_backward", "triton", nbytes, 0, make, SORTED, note)


def _decode(T: int, C: int, Vp: int) -> Case:
    def make() -> Callable[[], None]:
        ids = torch.tensor([[Vp - 1], [T - 1]], device=DEVICE)
        return launch("embedding_decode", "triton", rand(1, C), *ids, rand(Vp, C), rand(T, C))

    return Case("embedding_decode", "triton", 3 * C * 2 + 16, 0, make, DECODE, "one row")


def cases(B: int, T: int, C: int, NH: int, Vp: int) -> list[Case]:
    """Forward, backward with the two kinds of tokens, both scaled, and one sequence that decodes a token."""
    backward = [_backward(B, T, C, Vp, tenth) for tenth in (False, True)]
    return [_forward(B, T, C, Vp), *backward, *_scaled(B, T, C, Vp), _decode(T, C, Vp)]
