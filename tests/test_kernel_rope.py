"""Rotary positions, against complex multiplication in fp64."""

from __future__ import annotations

import math

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, each_backend, each_dtype, f64, poison, run, skip_unless_served

from daybreak.kernels import acc_dtype

SHAPES = [(1, 1, 1, 2, 2), (2, 7, 3, 8, 8), (3, 5, 2, 12, 8), (1, 130, 2, 64, 64), (2, 70, 3, 20, 4)]


def turned(x, places, freq, attention=1.0, back=False, dtype=None):
    """The pairs (j, j + R/2) of x (B, T, heads, HS) in fp64, as complex numbers, times exp(i p freq).

    places (B or 1, T). dtype: the kernel's, if x has another one. An angle is a product in the kernel's precision: far
    from 0, its rounding is seen in fp32.
    """
    half, acc = len(freq), acc_dtype(dtype or x.dtype)
    angle = f64(places.to(acc)[..., None, None] * freq.to(acc)) * (-1 if back else 1)
    x = x.double()
    points = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(
        torch.full_like(angle, attention), angle
    )
    return torch.cat([points.real, points.imag, x[..., 2 * half :]], -1)


def packed(B, T, heads, HS, dtype):
    """Heads in the middle of a wider buffer, and that buffer."""
    whole = draw(B, T, heads + 2, HS, dtype=dtype)
    return whole, whole[:, :, 1:-1]


def frequencies(R):
    return (10000.0 ** (-torch.arange(0, R, 2) / R)).to(DEVICE, torch.float32)


@each_backend
@each_dtype
@pytest.mark.parametrize(("B", "T", "heads", "HS", "R"), SHAPES)
@pytest.mark.parametrize(("attention", "back"), [(1.0, False), (1.25, True)])
def test_rope(backend, dtype, B, T, heads, HS, R, attention, back):
    """In place, in a view; heads beside it and elements from R on keep their bits."""
    skip_unless_served("rope", backend, dtype)
    whole, x = packed(B, T, heads, HS, dtype)
    before, freq = whole.clone(), frequencies(R)
    want = turned(x, torch.arange(T, device=DEVICE)[None], freq, attention, back)
    run("rope", x, freq, None, backend=backend, attention=attention, back=back)
    close(x, want)
    whole[:, :, 1:-1, :R] = before[:, :, 1:-1, :R]
    assert torch.equal(whole, before)


@each_backend
@each_dtype
def test_places_of_tokens_that_decode(backend, dtype):
    skip_unless_served("rope", backend, dtype)
    _, x = packed(4, 1, 3, 8, dtype)
    places, freq = torch.tensor([0, 5, 5, 8191], device=DEVICE), frequencies(8)
    want = turned(x, places[:, None], freq)
    run("rope", x, freq, places, backend=backend)
    close(x, want)


def test_backward_is_the_gradient():
    x = draw(2, 9, 2, 8, dtype=torch.float64).requires_grad_()
    freq, dout = frequencies(8), draw(2, 9, 2, 8, dtype=torch.float64, seed=1)
    want = torch.autograd.grad(turned(x, torch.arange(9, device=DEVICE)[None], freq, 0.5), x, dout)[0]
    run("rope", dout, freq, None, attention=0.5, back=True)
    close(dout, want)


def test_rope_has_the_bits_of_llama():
    """In fp32, as Hugging Face writes it, on the CPU. A cosine's last bit depends on the machine: both get ours."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=192, num_attention_heads=3, head_dim=64))
    q, k = (draw(2, 300, heads, 64, dtype=torch.float32, seed=heads).cpu() for heads in (3, 1))
    angles = torch.arange(300.0)[:, None, None] * rotary.inv_freq
    ours = [f(angles).view(1, 300, 32).repeat(1, 1, 2) for f in (torch.cos, torch.sin)]
    for x, theirs in zip(ours, rotary(q, torch.arange(300)[None]), strict=True):
        assert (x - theirs).abs().max() <= 2**-23
    want = apply_rotary_pos_emb(q, k, *ours, unsqueeze_dim=2)
    for x, expected in zip((q, k), want, strict=True):
        run("rope", x, rotary.inv_freq)
        assert torch.equal(x, expected)


def test_poison_outside_is_not_read():
    whole = poison(1, 6, 4, 8, dtype=torch.float32)
    whole[:, :, 1:3] = 1.0
    run("rope", whole[:, :, 1:3], frequencies(8))
    assert whole[:, :, [0, 3]].isnan().all()
    assert whole[:, :, 1:3].square().sum().item() == pytest.approx(6 * 2 * 8, rel=1e-6)
    assert whole[0, 0, 1, 0] == 1.0
    assert whole[0, 1, 1, 0].item() == pytest.approx(math.cos(1) - math.sin(1), rel=1e-6)


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("B", "T", "heads", "HS"), [(1, 1, 1, 2), (2, 7, 3, 8), (1, 130, 12, 64), (3, 5, 5, 12), (2, 3, 40, 128)]
)
@pytest.mark.parametrize("given", [False, True], ids=["rows", "places"])
def test_heads_that_are_turned_and_normed(backend, dtype, B, T, heads, HS, given):
    """One rounding; backward in place, in a view beside which all keeps its bits. Places of packed rows, or of rows."""
    skip_unless_served("rope_norm_backward", backend, dtype)
    n, eps, freq = B * T, 1e-3, frequencies(HS)
    whole, grads = draw(n, heads + 2, HS, dtype=dtype), draw(n, heads + 2, HS, dtype=dtype, seed=1)
    x, d, out, before = whole[:, 1:-1], grads[:, 1:-1], poison(n, heads, HS, dtype=dtype), grads.clone()
    places = torch.arange(n, device=DEVICE) % T
    if given:
        places = (places * 37 + 5) % 8191
    X = f64(x).requires_grad_()
    want = (
        turned(X[:, None], places[:, None], freq, dtype=dtype)[:, 0] / (X.square().mean(-1, keepdim=True) + eps).sqrt()
    )
    how = {"T": T, "eps": eps, "backend": backend}
    run("rope_norm_forward", out, x, freq, places if given else None, **how)
    close(out, want.detach())
    (want_d,) = torch.autograd.grad((want * f64(d)).sum(), X)
    run("rope_norm_backward", d, x, freq, places if given else None, **how)
    scale = 1 / (f64(x).square().mean(-1, keepdim=True) + eps).sqrt()
    close(d, want_d, terms=f64(before[:, 1:-1]).abs() * scale * 2)
    grads[:, 1:-1] = before[:, 1:-1]
    assert torch.equal(grads, before)
