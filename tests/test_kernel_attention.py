"""Causal attention forward and backward in every backend, against formulas in fp64.

The fused kernels round P and dS to bf16 before their products, the reference only its results: what that may move is
bounded element by element with the products of absolute values, |P| |v| and so on, times bf16's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, each_dtype, f64, poison, run, skip_unless_served
from oracle import attention
from torch import Tensor

import daybreak.kernels.attention as attention_file
from daybreak.kernels import Kernels, acc_dtype, all_ops, choose, temps_bytes
from daybreak.kernels.cuda import cudnn, fa4

GPU = torch.cuda.is_available()
ROUNDING = 2.0**-8  # of a number to bf16, relative


def packed(x: Tensor, NH: int) -> list[Tensor]:
    """Q, K and V as (B, T, NH, HS) views of packed (B, T, 3C)."""
    B, T, C3 = x.shape
    return [part.view(B, T, NH, C3 // 3 // NH) for part in x.split(C3 // 3, dim=2)]


def scores(q: Tensor, k: Tensor, first: Tensor | None = None) -> Tensor:
    """Scaled (B, NH, T, T) of q (B, T, NH, HS) and k (B, T, NKV, HS), by the definition: neighbouring heads share keys,
    and query i sees keys first[i] (0 if not given) to i."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    S = q.shape[-1] ** -0.5 * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    places = torch.arange(S.shape[-1], device=S.device)
    seen = places[None, :] <= places[:, None]
    return S.masked_fill(~(seen if first is None else seen & (places >= first[:, None, :, None])), -math.inf)


def formulas(
    qkv: Sequence[Tensor], out: Tensor, dout: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor, list[Tensor], Tensor, list[Tensor]]:
    """In fp64: y (B, T, NH, HS), lse (B, NH, T), dq, dk and dv, the latter with the row sums of dout * out as given;
    and, for y and gradients, the same sums over absolute values of what a fused kernel rounds."""
    Q, K, V = map(f64, qkv)
    groups, group = K.shape[2], Q.shape[2] // K.shape[2]
    S = scores(Q, K, first)
    q, k, v = (x.transpose(1, 2) for x in (Q, *(x.repeat_interleave(group, 2) for x in (K, V))))
    g, o = (f64(x).transpose(1, 2) for x in (dout, out))
    P = S.softmax(-1)
    dS = P * (g @ v.transpose(2, 3) - (g * o).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5

    def shared(x: Tensor) -> Tensor:
        """Summed over the heads of a group."""
        return x.unflatten(1, (groups, group)).sum(2)

    def products(dS: Tensor, q: Tensor, k: Tensor, g: Tensor) -> list[Tensor]:
        dk, dv = dS.transpose(2, 3) @ q, P.transpose(2, 3) @ g
        return [x.transpose(1, 2) for x in (dS @ k, shared(dk), shared(dv))]

    grads, sizes = products(dS, q, k, g), products(dS.abs(), q.abs(), k.abs(), g.abs())
    return (P @ v).transpose(1, 2), S.logsumexp(-1), grads, (P @ v.abs()).transpose(1, 2), sizes


def compare(got: Tensor, want: Tensor, sizes: Tensor, backend: str) -> None:
    """`close`, but in bf16 a fused kernel may also be off by the rounding of P or dS."""
    if got.dtype != torch.bfloat16 or backend == "torch":
        close(got, want)
        return
    assert torch.isfinite(got).all()
    # Twice that for the vendors' kernels: how they scale P before rounding it is their own business.
    times = 1 if backend == "triton" else 2
    limit = 1e-5 * want.abs().amax() + ROUNDING * (want.abs() + times * sizes)
    excess = ((f64(got) - want).abs() / limit).amax().item()
    assert excess <= 1, f"{excess:.2f} times the tolerance"


def check(backend: str, dtype: torch.dtype, B: int, T: int, NH: int, HS: int) -> list[Tensor]:
    """Run both operations on packed views and compare; returns what they wrote."""
    C = NH * HS
    qkv, dout = draw(B, T, 3 * C, dtype=dtype), draw(B, T, NH, HS, dtype=dtype, seed=1)
    out, lse = poison(B, T, C, dtype=dtype).view(B, T, NH, HS), poison(B, NH, T, dtype=acc_dtype(dtype))
    run("attention_forward", out, lse, *packed(qkv, NH), backend=backend, scale=HS**-0.5)
    y, want_lse, want, y_sizes, sizes = formulas(packed(qkv, NH), out, dout)
    compare(out, y, y_sizes, backend)
    close(lse, want_lse)
    dqkv = poison(B, T, 3 * C, dtype=dtype)
    run("attention_backward", *packed(dqkv, NH), dout, *packed(qkv, NH), out, lse, backend=backend, scale=HS**-0.5)
    compare(dqkv, *(torch.cat([x.flatten(2) for x in parts], 2) for parts in (want, sizes)), backend)
    if dtype != torch.bfloat16:
        X = f64(qkv).requires_grad_()
        close(dqkv, torch.autograd.grad(attention(X, NH), X, f64(dout).view(B, T, C))[0])
    return [out, lse, dqkv]


@each_dtype
@pytest.mark.parametrize(("B", "T", "NH", "HS"), [(1, 1, 1, 8), (3, 7, 3, 5), (2, 128, 1, 16), (3, 300, 2, 8)])
@pytest.mark.parametrize("rows", [1 << 12, 512], ids=["whole batch", "batch cut"])
def test_reference(monkeypatch, dtype, B, T, NH, HS, rows):
    monkeypatch.setattr(attention_file, "ROWS", rows)
    check("torch", dtype, B, T, NH, HS)


LO = {
    "causal": lambda T: torch.zeros(T),
    "window of 5": lambda T: (torch.arange(T) - 4).clamp(min=0),
    "documents of 40": lambda T: torch.arange(T) // 40 * 40,
    "itself": torch.arange,
    "any": lambda T: (torch.rand(T, generator=torch.Generator().manual_seed(T)) * (torch.arange(T) + 1)).floor(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("kind", LO)
def test_reference_where_queries_see_less(monkeypatch, dtype, softcap, kind):
    """Against autograd in fp64, forward and backward; the rows of a batch see different keys, and are cut in groups."""
    monkeypatch.setattr(attention_file, "ROWS", 512)
    B, T, NH, HS = 3, 150, 2, 8
    lo = torch.stack([LO[kind](T), torch.zeros(T), LO[kind](T)]).to(DEVICE, torch.int32)
    qkv, dout = draw(B, T, 3 * NH * HS, dtype=dtype), draw(B, T, NH, HS, dtype=dtype, seed=1)
    out, lse = poison(B, T, NH, HS, dtype=dtype), poison(B, NH, T, dtype=dtype)
    how = {"scale": HS**-0.5, "lo": lo, "softcap": softcap}
    run("attention_forward", out, lse, *packed(qkv, NH), **how)
    X = f64(qkv).requires_grad_()
    q, k, v = packed(X, NH)
    S = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * HS**-0.5
    S = softcap * torch.tanh(S / softcap) if softcap else S
    S = S.masked_fill(scores(q, k, lo).isneginf(), -math.inf)
    y = (S.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)
    close(out, y.detach())
    close(lse, S.logsumexp(-1).detach())
    dqkv = poison(B, T, 3 * NH * HS, dtype=dtype)
    run("attention_backward", *packed(dqkv, NH), dout, *packed(qkv, NH), out, lse, **how)
    close(dqkv, torch.autograd.grad(y, X, f64(dout))[0])
    if kind == "causal" and not softcap:  # the same bits as without
        plain = [torch.empty_like(x) for x in (out, lse, dqkv)]
        run("attention_forward", *plain[:2], *packed(qkv, NH), scale=HS**-0.5)
        run("attention_backward", *packed(plain[2], NH), dout, *packed(qkv, NH), *plain[:2], scale=HS**-0.5)
        assert all(map(torch.equal, plain, (out, lse, dqkv)))


def grouped(B: int, T: int, NH: int, NKV: int, HS: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Q (B, T, NH, HS), K and V (B, T, NKV, HS), views of one packed buffer."""
    return list(draw(B, T, NH + 2 * NKV, HS, dtype=dtype, seed=seed).split([NH, NKV, NKV], 2))


def check_grouped(
    backend: str, dtype: torch.dtype, B: int, T: int, NH: int, NKV: int, HS: int,
    lo: Tensor | None = None, window: int = 0,
) -> None:  # fmt: skip
    """Both operations on packed views where heads share keys: against formulas and, but in bf16, against autograd."""
    qkv, dout = grouped(B, T, NH, NKV, HS, dtype), draw(B, T, NH, HS, dtype=dtype, seed=1)
    out, lse = poison(B, T, NH, HS, dtype=dtype), poison(B, NH, T, dtype=acc_dtype(dtype))
    how: dict[str, Any] = {"backend": backend, "scale": HS**-0.5}
    how |= ({} if lo is None else {"lo": lo}) | ({"window": window} if window else {})
    run("attention_forward", out, lse, *qkv, **how)
    first = torch.zeros(B, T, device=DEVICE) if lo is None else lo
    if window:
        first = torch.maximum(first, torch.arange(T, device=DEVICE) - window + 1)
    y, want_lse, want, y_sizes, sizes = formulas(qkv, out, dout, first)
    grads = list(poison(B, T, NH + 2 * NKV, HS, dtype=dtype).split([NH, NKV, NKV], 2))
    run("attention_backward", *grads, dout, *qkv, out, lse, **how)
    close(lse, want_lse)
    compare(out, y, y_sizes, backend)
    compare(*(torch.cat(parts, 2) for parts in (grads, want, sizes)), backend)
    if dtype != torch.bfloat16:
        exact = [f64(x).requires_grad_() for x in qkv]
        V = exact[2].repeat_interleave(NH // NKV, 2).transpose(1, 2)
        y = (scores(exact[0], exact[1], first).softmax(-1) @ V).transpose(1, 2)
        close(torch.cat(grads, 2), torch.cat(torch.autograd.grad(y, exact, f64(dout)), 2))


GROUPED = [(1, 1, 2, 1, 8), (2, 9, 6, 2, 5), (3, 150, 4, 1, 8), (1, 300, 6, 3, 16)]  # B, T, NH, NKV, HS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("rows", [1 << 12, 512], ids=["whole batch", "batch cut"])
@pytest.mark.parametrize(("B", "T", "NH", "NKV", "HS"), GROUPED)
def test_reference_where_heads_share_keys(monkeypatch, dtype, rows, B, T, NH, NKV, HS):
    monkeypatch.setattr(attention_file, "ROWS", rows)
    check_grouped("torch", dtype, B, T, NH, NKV, HS)


@pytest.mark.parametrize("window", [1, 5, 130, 200])
@pytest.mark.parametrize("documents", [False, True])
def test_reference_with_a_window(window, documents):
    B, T, NH, NKV, HS = 2, 150, 4, 2, 8
    lo = (torch.arange(T) // 40 * 40).expand(B, T).to(DEVICE, torch.int32).contiguous() if documents else None
    check_grouped("torch", torch.float64, B, T, NH, NKV, HS, lo, window)


def test_a_backend_without_an_argument_is_passed_over():
    """A model that gives `lo` gets the backend that takes it, also where another was asked for."""
    ops = ("attention_forward", "attention_backward")
    for forced in (None, {"attention": "cudnn"}):
        plain = choose("cuda", torch.bfloat16, forced)
        assert {plain[name] for name in ops} <= {"fa4", "cudnn"}
        for asks, backend in ((("lo",), "triton"), (("lo", "softcap"), "torch")):
            assert choose("cuda", torch.bfloat16, forced, asks=dict.fromkeys(ops, asks)) == plain | dict.fromkeys(
                ops, backend
            )
        assert choose("cuda", torch.bfloat16, forced, asks=dict.fromkeys(ops, ("window",))) == plain


SHAPES = [(1, 1, 1, 64), (2, 7, 3, 5), (1, 128, 2, 64), (2, 150, 1, 16), (1, 33, 2, 80), (1, 140, 1, 128)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "T", "NH", "HS"), SHAPES)
def test_triton(dtype, B, T, NH, HS):
    skip_unless_served("attention_backward", "triton", dtype)
    check("triton", dtype, B, T, NH, HS)


GROUPED_TRITON = [(1, 1, 2, 1, 64), (2, 7, 6, 2, 5), (1, 100, 4, 2, 16), (1, 128, 3, 1, 64)]  # B, T, NH, NKV, HS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "T", "NH", "NKV", "HS"), GROUPED_TRITON)
def test_triton_where_heads_share_keys(dtype, B, T, NH, NKV, HS):
    check_grouped("triton", dtype, B, T, NH, NKV, HS)


LESS = [(None, 1, 100), (None, 20, 128), (None, 70, 100), ("documents of 40", 0, 100), ("itself", 0, 128)]
LESS += [("any", 0, 128), ("any", 30, 100), ("causal", 500, 40)]


@pytest.mark.parametrize(("kind", "window", "T"), LESS)
def test_triton_where_queries_see_less(kind, window, T):
    NH, NKV, HS = 2, 1, 16
    lo = None if kind is None else torch.stack([LO[kind](T), LO["window of 5"](T)]).to(DEVICE, torch.int32)
    check_grouped("triton", torch.float32, 2, T, NH, NKV, HS, lo, window)


def test_triton_reads_no_block_that_no_query_sees():
    """The last block of queries, whose window lies far behind the keys that are NaN."""
    T, HS, poisoned = 260, 16, 128
    q, k, v = (draw(1, T, 1, HS, dtype=torch.float32, seed=s) for s in range(3))
    k[:, :poisoned] = v[:, :poisoned] = math.nan
    out, lse = poison(1, T, 1, HS, dtype=torch.float32), poison(1, 1, T, dtype=torch.float32)
    run("attention_forward", out, lse, q, k, v, backend="triton", scale=0.25, window=8)
    assert out[:, 192:].isfinite().all()
    assert out[:, :poisoned].isnan().all()


def test_triton_takes_any_strides():
    """Queries, keys and values in buffers of their own, as a cache of keys has them."""
    B, T, NH, HS = 2, 40, 3, 16
    q = draw(B, T, NH, HS, dtype=torch.float32)
    k, v = (draw(B, NH, T + 9, HS, dtype=torch.float32, seed=s)[:, :, :T].transpose(1, 2) for s in (1, 2))
    out, lse = poison(B, NH, T, HS, dtype=torch.float32).transpose(1, 2), poison(B, NH, T, dtype=torch.float32)
    run("attention_forward", out, lse, q, k, v, backend="triton", scale=HS**-0.5)
    want = attention(torch.cat([f64(x).flatten(2) for x in (q, k, v)], 2), NH)
    close(out, want.view(B, T, NH, HS))


def check_decode(
    backend: str, dtype: torch.dtype, places: list[int], T: int, NH: int, NKV: int, HS: int, window: int = 0,
    turned: int = 0,
) -> None:  # fmt: skip
    """One query a row over a cache that is NaN where the row has no keys; the newest key and value are kept."""
    skip_unless_served("attention_decode", backend, dtype)
    b = len(places)
    q, k, v = draw(b, NH + 2 * NKV, HS, dtype=dtype).split([NH, NKV, NKV], 1)
    q = q if NH == NKV else q.clone()  # as after a norm of heads: in a buffer of its own
    cache = draw(2, b, NKV, T, HS, dtype=dtype, seed=1)
    for i, place in enumerate(places):
        cache[:, i, :, place:] = math.nan
        if window:
            cache[:, i, :, : max(place - window + 1, 0)] = math.nan
    want_cache, want = cache.clone(), []
    out, positions, kept = poison(b, NH, HS, dtype=dtype), torch.tensor(places, device=DEVICE), (q.clone(), k.clone())
    how = {"backend": backend, "scale": HS**-0.5} | ({"window": window} if window else {})
    if turned:  # as the operation of its own does it
        how |= (turns := {"freq": torch.rand(turned, device=DEVICE) / 3, "attention": 0.75})
        (q, k), given = (x.clone() for x in kept), kept
        for x in (q, k):
            run("rope", x[:, None], turns["freq"], positions, attention=0.75, backend=backend)
    else:
        given = q, k
    for i, place in enumerate(places):
        want_cache[:, i, :, place] = torch.stack([k[i], v[i]])
        first = max(place - window + 1, 0) if window else 0
        keys, values = f64(want_cache[:, i, :, first : place + 1]).repeat_interleave(NH // NKV, 1)
        want.append(((f64(q[i])[:, None] @ keys.mT) * HS**-0.5).softmax(-1) @ values)
    run("attention_decode", out, cache, *given, v, positions, **how)
    assert torch.equal(given[0], kept[0])
    assert torch.equal(given[1], kept[1])
    close(out, torch.stack(want)[:, :, 0])
    torch.testing.assert_close(cache, want_cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@each_dtype
@pytest.mark.parametrize(
    ("places", "T", "NH", "HS"),
    [([0], 1, 1, 8), ([5, 5, 0, 69], 70, 3, 20), ([63, 64], 65, 2, 64), ([300, 8, 255, 256], 301, 1, 64)],
)
def test_decode(backend, dtype, places, T, NH, HS):
    check_decode(backend, dtype, places, T, NH, NH, HS)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@each_dtype
@pytest.mark.parametrize(
    ("places", "T", "NH", "NKV", "HS"), [([0, 3], 4, 2, 1, 8), ([5, 5, 0, 69], 70, 6, 2, 20), ([300, 8], 301, 9, 3, 64)]
)
@pytest.mark.parametrize("window", [0, 1, 6, 280])
def test_decode_where_heads_share_keys(backend, dtype, places, T, NH, NKV, HS, window):
    check_decode(backend, dtype, places, T, NH, NKV, HS, window)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@each_dtype
@pytest.mark.parametrize(("NH", "NKV", "HS", "half"), [(2, 1, 8, 4), (6, 2, 20, 6), (4, 4, 64, 32), (2, 1, 128, 64)])
def test_decode_that_turns_queries_and_keys(backend, dtype, NH, NKV, HS, half):
    """With the bits of rope before it, also where a part of a head passes unchanged."""
    check_decode(backend, dtype, [5, 300], 301, NH, NKV, HS, turned=half)


@each_dtype
def test_cache_write(dtype):
    k, v = (draw(2, 3, 4, 8, dtype=dtype, seed=s) for s in (0, 1))
    cache = poison(2, 2, 4, 5, 8, dtype=dtype)
    run("cache_write", cache, k, v)
    for kept, x in zip(cache, (k, v), strict=True):
        assert torch.equal(kept[:, :, :3], x.transpose(1, 2))
        assert kept[:, :, 3:].isnan().all()


def bind(backend: str, name: str, *args, **kwargs) -> None:
    """Call an operation without the harness's copies of its inputs."""
    impl = all_ops("cuda")[name].impls[backend]
    size = temps_bytes(impl.temps(*args, **kwargs)) if impl.temps else 0
    getattr(Kernels(torch.empty(size, dtype=torch.uint8, device=DEVICE), {name: backend}), name)(*args, **kwargs)


def skip_unless_usable(backend: str) -> None:
    if not GPU:
        pytest.skip("needs a CUDA device")
    reason = {"cudnn": cudnn, "fa4": fa4}[backend].usable(torch.cuda.get_device_capability())
    if reason is not None:
        pytest.skip(reason)


GPU_SHAPES = [(2, 1024, 5, 64), (3, 256, 12, 64), (1, 320, 2, 128), (2, 200, 3, 64), (1, 64, 2, 80)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "fa4"])
@pytest.mark.parametrize(("B", "T", "NH", "HS"), GPU_SHAPES)
def test_bf16_on_gpu(backend, B, T, NH, HS):
    """Training shapes; three runs are equal bit for bit."""
    if backend != "triton":
        skip_unless_usable(backend)
    elif not GPU:
        pytest.skip("needs a CUDA device")
    first = check(backend, torch.bfloat16, B, T, NH, HS)
    for _ in range(2):
        for a, b in zip(first, check(backend, torch.bfloat16, B, T, NH, HS), strict=True):
            assert torch.equal(a, b)


# B, T, NH, NKV, HS, window
GPU_GROUPED = [(2, 1024, 32, 8, 64, 0), (1, 512, 24, 8, 128, 0), (2, 1024, 9, 3, 64, 300), (1, 320, 14, 2, 64, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "fa4"])
@pytest.mark.parametrize(("B", "T", "NH", "NKV", "HS", "window"), GPU_GROUPED)
def test_shared_keys_on_gpu(backend, B, T, NH, NKV, HS, window):
    """The heads of Llama 1B and 3B, SmolLM2 and Qwen 2.5; Triton also with documents."""
    if backend != "triton":
        skip_unless_usable(backend)
    elif not GPU:
        pytest.skip("needs a CUDA device")
    check_grouped(backend, torch.bfloat16, B, T, NH, NKV, HS, None, window)
    if backend == "triton":
        check_grouped(
            backend, torch.bfloat16, B, T, NH, NKV, HS, LO["any"](T).expand(B, T).int().contiguous().to(DEVICE), window
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "fa4"])
@pytest.mark.parametrize(("NKV", "window"), [(4, 0), (1, 0), (4, 50), (1, 50)])
@pytest.mark.parametrize("HS", [*range(8, 136, 8), 192, 256])
def test_every_head_size_on_gpu(backend, HS, NKV, window):
    """All multiples of 8, with and without shared keys and a window."""
    if backend != "triton":
        skip_unless_usable(backend)
    elif not GPU:
        pytest.skip("needs a CUDA device")
    check_grouped(backend, torch.bfloat16, 2, 192, 4, NKV, HS, None, window)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cudnn", "fa4"])
def test_more_lengths_than_plans(backend):
    """Sampling asks for every length once: what gets no plan of its own is served all the same."""
    skip_unless_usable(backend)
    for T in (*range(1, 12), *range(64, 64 * 8, 64)):
        qkv = draw(1, T, 3 * 128, dtype=torch.bfloat16)
        out, lse = poison(1, T, 2, 64, dtype=torch.bfloat16), poison(1, 2, T, dtype=torch.float32)
        run("attention_forward", out, lse, *packed(qkv, 2), backend=backend, scale=0.125)
        y, want_lse, _, sizes, _ = formulas(packed(qkv, 2), out, out)
        compare(out, y, sizes, backend)
        close(lse, want_lse)
    assert not any(key[1][0][1] % cudnn.GRAPH_LENGTHS for key in cudnn.FORWARD_GRAPHS)  # scale, (shape, stride) ...


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cudnn", "fa4"])
def test_far_rows(backend):
    """Packed qkv of more than 2^31 elements: the last batch row is right (4.3 GB each for qkv and its gradient)."""
    if backend == "triton" and not GPU:
        pytest.skip("needs a CUDA device")
    if backend != "triton":
        skip_unless_usable(backend)
    if backend == "cudnn":
        pytest.skip("its deterministic backward wants a workspace of 22 GB at this size")
    B, T, NH, HS = 440, 1024, 25, 64
    torch.cuda.empty_cache()
    kwargs = {"dtype": torch.bfloat16, "device": DEVICE}
    qkv = torch.empty(B, T, 3 * NH * HS, **kwargs)
    assert qkv.numel() > 2**31
    small = draw(1, T, 3 * NH * HS, dtype=torch.bfloat16)
    qkv[:] = small
    dout = draw(1, T, NH, HS, dtype=torch.bfloat16, seed=1).expand(B, T, NH, HS).contiguous()
    out, lse = torch.empty(B, T, NH, HS, **kwargs), torch.empty(B, NH, T, device=DEVICE)
    dqkv = torch.empty_like(qkv)
    bind(backend, "attention_forward", out, lse, *packed(qkv, NH), scale=HS**-0.5)
    bind(backend, "attention_backward", *packed(dqkv, NH), dout, *packed(qkv, NH), out, lse, scale=HS**-0.5)
    for b in (0, B - 1):
        y, want_lse, want, y_sizes, sizes = formulas(packed(small, NH), out[b : b + 1], dout[:1])
        compare(out[b : b + 1], y, y_sizes, backend)
        close(lse[b : b + 1], want_lse)
        for got, *expected in zip(packed(dqkv[b : b + 1], NH), want, sizes, strict=True):
            compare(got, *expected, backend)
    del qkv, dqkv, out, lse, dout
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("HS", "taken"), [(32, True), (64, True), (96, True), (128, True), (48, False), (80, False)])
def test_flash_attention_4_leaves_heads_that_it_gets_wrong_to_cudnn(HS, taken):
    q = torch.empty(2, 64, 4, HS, dtype=torch.bfloat16)
    wanted = fa4.backward_temps(q, q, q, q, q), fa4.workspace_bytes(2, 64, 4, HS) > 0
    assert wanted == (([], True) if taken else (cudnn.backward_temps(q, q, q, q, q), False))


def test_workspaces_are_stated_without_a_gpu():
    """The measured memory of cuDNN's deterministic backward, 801 and 1539 MiB, fits the formulas closely."""
    for B, T, NH, measured in ((16, 1024, 25, 801), (64, 1024, 12, 1539)):
        stated = cudnn.backward_workspace(B, T, NH) / 2**20
        assert measured <= stated <= measured + 3
    # FlashAttention-4: dq in fp32, two rows of statistics, turn counters; and where heads share keys dk, dv in fp32
    assert 100 <= fa4.workspace_bytes(16, 1024, 25, 64) / 2**20 <= 107
    shared = 2 * 4 * (1024 * 8 * 128) * 4 / 2**20
    assert (
        shared
        <= (fa4.workspace_bytes(4, 1024, 32, 128, 8) - fa4.workspace_bytes(4, 1024, 32, 128)) / 2**20
        <= shared + 8
    )
    assert (
        cudnn.backward_workspace(4, 1024, 32, 128) - cudnn.backward_workspace(4, 1024, 32)
        == 2 * 4 * 32 * 1024 * 128 * 4
    )
