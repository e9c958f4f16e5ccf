"""Embedding forward and backward, against formulas in fp64."""

from __future__ import annotations

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import (
    DEVICE,
    close,
    draw,
    each_backend,
    each_dtype,
    either,
    f64,
    output,
    poison,
    run,
    skip_unless_served,
)

from daybreak.kernels.cuda import embedding as cuda_embedding

BF16 = torch.bfloat16


def some_tokens(B, T, V):
    """Random tokens; the first row is one token many times over."""
    tokens = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(T))
    tokens[0] = V - 1
    return tokens.to(DEVICE)


def check_backward(backend, dtype, tokens, V, C, *, accumulate):
    B, T = tokens.shape
    dout = draw(B * T, C, dtype=dtype, seed=1)
    dwte, dwte0 = output(V, C, dtype=dtype, accumulate=True)
    dwpe, dwpe0 = output(T + 2, C, dtype=dtype, accumulate=accumulate)
    run("embedding_backward", dwte, dwpe, dout, tokens, accumulate=accumulate, backend=backend)
    D = f64(dout).view(B, T, C)
    close(dwte, dwte0.index_add(0, tokens.flatten(), D.flatten(0, 1)))
    # The plain form rounds the sum over B before it adds it.
    twice = D.sum(0) if accumulate and backend == "torch" else None
    close(dwpe[:T], dwpe0[:T] + D.sum(0), also_rounded=twice)
    assert torch.equal(f64(dwpe[T:]), dwpe0[T:])


@each_backend
@each_dtype
@either
@pytest.mark.parametrize(
    ("B", "T", "C", "V"), [(1, 1, 63, 1), (3, 7, 1000, 5), (4, 33, 63, 40), (9, 5, 300, 700), (2, 3, 2100, 5)]
)
def test_embedding(backend, dtype, accumulate, B, T, C, V):
    skip_unless_served("embedding_forward", backend, dtype)
    wte, wpe = draw(V, C, dtype=dtype), draw(T + 2, C, dtype=dtype)
    tokens = some_tokens(B, T, V)
    out = poison(B * T, C, dtype=dtype)
    run("embedding_forward", out, tokens, wte, wpe, backend=backend)
    close(out, (f64(wte)[tokens] + f64(wpe)[:T]).view(B * T, C))
    check_backward(backend, dtype, tokens, V, C, accumulate=accumulate)


@each_backend
@each_dtype
@pytest.mark.parametrize("C", [24, 1025, 2100])
def test_decode(backend, dtype, C):
    skip_unless_served("embedding_decode", backend, dtype)
    wte, wpe = (draw(9, C, dtype=dtype, seed=s) for s in (0, 1))
    out, tokens, places = poison(3, C, dtype=dtype), torch.tensor([8, 0, 8]), torch.tensor([0, 7, 2])
    run("embedding_decode", out, tokens.to(DEVICE), places.to(DEVICE), wte, wpe, backend=backend)
    close(out, f64(wte)[[8, 0, 8]] + f64(wpe)[[0, 7, 2]])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_a_model_without_a_table_of_positions(backend, dtype):
    """And whose head has a weight of its own: the first micro-step overwrites the embedding's gradient."""
    V, C, tokens = 9, 40, torch.tensor([[8, 0, 8], [1, 8, 3]], device=DEVICE)
    wte, dout = draw(V, C, dtype=dtype), draw(6, C, dtype=dtype, seed=1)
    out, one = poison(6, C, dtype=dtype), poison(3, C, dtype=dtype)
    run("embedding_forward", out, tokens, wte, None, backend=backend)
    run("embedding_decode", one, tokens[0], tokens[1], wte, None, backend=backend)
    assert torch.equal(out, wte[tokens.flatten()])
    assert torch.equal(one, wte[tokens[0]])
    sums = torch.zeros(V, C, dtype=torch.float64, device=DEVICE).index_add(0, tokens.flatten(), f64(dout))
    for tied, accumulate in ((False, False), (False, True), (True, False), (True, True)):
        dwte, before = output(V, C, dtype=dtype, accumulate=tied or accumulate)
        run("embedding_backward", dwte, None, dout, tokens, backend=backend, accumulate=accumulate, tied=tied)
        close(dwte, before + sums)


@each_backend
@each_dtype
@pytest.mark.parametrize(("B", "T", "C", "V"), [(1, 1, 63, 1), (3, 40, 300, 5)])
def test_a_scaled_embedding(backend, dtype, B, T, C, V):
    """As in Gemma: rows of the table times a number, and their gradients too, rounded once. 40 times one token is a run
    over chunks."""
    skip_unless_served("embedding_forward", backend, dtype)
    how, wte, tokens = {"scale": 33.9375, "backend": backend}, draw(V, C, dtype=dtype), some_tokens(B, T, V)
    out, one = poison(B * T, C, dtype=dtype), poison(T, C, dtype=dtype)
    run("embedding_forward", out, tokens, wte, None, **how)
    run("embedding_decode", one, tokens[-1], tokens[0], wte, None, **how)
    assert torch.equal(out, wte[tokens.flatten()] * 33.9375)
    assert torch.equal(one, wte[tokens[-1]] * 33.9375)
    dout = draw(B * T, C, dtype=dtype, seed=1)
    dwte, before = output(V, C, dtype=dtype, accumulate=True)
    run("embedding_backward", dwte, None, dout, tokens, accumulate=False, **how)
    close(dwte, before.index_add(0, tokens.flatten(), 33.9375 * f64(dout)))


@each_backend
@pytest.mark.parametrize("V", [3, 300, 66000])
def test_runs_over_many_chunks(backend, V):
    """More positions than one block of the sort; runs of one token inside a chunk of 32 sorted positions, across two,
    and across more than the 16 that are added at a time; one, two and three digits of the sort."""
    tokens = torch.randint(V, (1, 700), generator=torch.Generator().manual_seed(V)).to(DEVICE)
    tokens[0, :560], tokens[0, 560:630] = V - 1, V // 2
    check_backward(backend, BF16, tokens, V, 8, accumulate=False)


@pytest.mark.parametrize("V", [2, 60000])
def test_the_sort_is_stable(V):
    """Equal tokens stay in the order of the batch: it is the order in which their rows are added."""
    n = 530
    tokens = torch.randint(V, (n,), generator=torch.Generator().manual_seed(V)).to(DEVICE)
    tokens[100:200] = V - 1
    pairs = [torch.full((n,), -1, dtype=torch.int32, device=DEVICE) for _ in range(4)]
    table = torch.full((-(-n // cuda_embedding.SORT_BLOCK), 256), -1, dtype=torch.int32, device=DEVICE)
    keys, rows = cuda_embedding._sort(tokens, pairs, table, V)
    want = torch.sort(tokens, stable=True)
    assert torch.equal(keys.long(), want.values)
    assert torch.equal(rows.long(), want.indices)


@each_backend
@pytest.mark.parametrize("n", [31, 32, 33, 64])
def test_one_token_throughout(backend, n):
    check_backward(backend, torch.float32, torch.full((1, n), 4, device=DEVICE), 9, 3, accumulate=True)


@each_backend
@pytest.mark.parametrize("tokens", [list(range(64)), [k // 32 for k in range(96)], [k // 16 for k in range(96)]])
def test_runs_that_end_with_a_chunk(backend, tokens):
    check_backward(backend, torch.float32, torch.tensor([tokens], device=DEVICE), 65, 3, accumulate=True)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_same_bits_in_every_run():
    """65,536 positions, every tenth of them one token."""
    B, T, C, V = 64, 1024, 768, 50304
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens = (torch.rand(B, T, generator=generator, device=DEVICE) ** 4 * V).long()
    tokens[torch.rand(B, T, generator=generator, device=DEVICE) < 0.1] = 11
    dout = draw(B * T, C, dtype=BF16)
    results = []
    for _ in range(3):
        dwte, dwte0 = output(V, C, dtype=BF16, accumulate=True)
        dwpe = poison(T, C, dtype=BF16)
        run("embedding_backward", dwte, dwpe, dout, tokens, accumulate=False, backend="triton")
        results.append((dwte, dwpe))
    close(results[0][0], dwte0.index_add(0, tokens.flatten(), f64(dout)))
    close(results[0][1], f64(dout).view(B, T, C).sum(0))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_beyond_2_to_the_31():
    """Rows of the batch and of the table whose first element lies beyond 2^31: 17 GB."""
    T, C = 1024, 1600
    B, V = (1 << 31) // (C * T) + 4, (1 << 31) // C + 100
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens = torch.randint(V, (B, T), generator=generator, device=DEVICE)
    tokens[-1, -40:] = V - 1
    wte = torch.empty(V, C, dtype=BF16, device=DEVICE).normal_(generator=generator)
    wpe = draw(T, C, dtype=BF16)
    out = torch.empty(B * T, C, dtype=BF16, device=DEVICE)
    run("embedding_forward", out, tokens, wte, wpe, backend="triton")
    n, flat = B * T, tokens.view(-1)
    far = torch.tensor([0, 1, n // 2, n - 1000, n - 2, n - 1], device=DEVICE)
    close(out[far], f64(wte[flat[far]]) + f64(wpe[far % T]))

    dwte, dwpe, dout = wte, poison(T, C, dtype=BF16), out
    rows = torch.cat([flat[far], torch.tensor([V - 100, V - 2, V - 1], device=DEVICE)]).unique()
    want = torch.stack([f64(dwte[v]) + f64(dout[flat == v]).sum(0) for v in rows])
    run("embedding_backward", dwte, dwpe, dout, tokens, accumulate=False, backend="triton")
    close(dwte[rows], want)
    positions = torch.tensor([0, 7, T - 1], device=DEVICE)
    close(dwpe[positions], torch.stack([f64(dout.view(B, T, C)[:, t]).sum(0) for t in positions]))
