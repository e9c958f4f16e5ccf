"""The Triton kernel that rounds to fp8, beside the reference: bytes, transposed copies, magnitudes, ragged tiles.

test_fp8.py holds the reference to the formats' tables.
"""

from __future__ import annotations

import math
from dataclasses import replace

import interpreter  # noqa: F401
import pytest
import torch
from kernel_harness import DEVICE, close, draw, f64, poison
from torch import Tensor

from daybreak.kernels import OPS, Kernels, all_ops, temps_bytes
from daybreak.kernels.fp8 import E4M3, E5M2
from daybreak.kernels.operand import Format, Operand

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = [(16, 16), (16, 48), (144, 80), (528, 64), (704, 272)]  # multiples of 16; most end inside a tile
each_format = pytest.mark.parametrize("format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
each_shape = pytest.mark.parametrize(("n", "C"), SHAPES)


def operand(
    format: Format, n: int, C: int, *, scale: float = 1.0, parts: str = "both", current: bool = False
) -> Operand:
    """Poisoned: every byte is NaN."""
    value, other = (torch.full(s, 0x7F, dtype=torch.uint8, device=DEVICE).view(format.dtype) for s in ((n, C), (C, n)))
    slots = torch.tensor([scale, 0.0], device=DEVICE)
    return Operand(
        format,
        None if parts == "transposed" else value,
        slots[0],
        None if parts == "value" else other,
        slots[1],
        current,
    )


def run(name: str, *args: object, backend: str = "fp8 cuda", **kwargs: object) -> None:
    impl = all_ops("cuda")[name].impls[backend]
    given = [replace(x, format=replace(x.format, backend=backend)) if isinstance(x, Operand) else x for x in args]
    size = temps_bytes(impl.temps(*given, **kwargs)) if impl.temps else 0
    scratch = torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)
    getattr(Kernels(scratch).in_formats({backend}), name)(*given, **kwargs)


def same(a: Operand, b: Operand) -> None:
    """The same bytes, and copies of each other."""
    for x, y in ((a.value, b.value), (a.transposed, b.transposed)):
        if x is not None and y is not None:
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    if a.value is not None and a.transposed is not None:
        assert torch.equal(a.transposed.view(torch.uint8), a.value.view(torch.uint8).t())
    assert torch.equal(a.scale, b.scale)


def values(n: int, C: int) -> Tensor:
    """Of all sizes, subnormal and too large ones too."""
    g = torch.Generator().manual_seed(n + C)
    return (torch.randn(n, C, generator=g) * 2.0 ** torch.randint(-22, 19, (n, C), generator=g)).to(DEVICE, BF16)


@each_format
@each_shape
@pytest.mark.parametrize("parts", ["both", "value", "transposed"])
@pytest.mark.parametrize("current", [False, True], ids=["given scale", "own scale"])
def test_quantise(format, n, C, parts, current):
    x, found = values(n, C), []
    for backend in ("fp8 cuda", "fp8"):
        out = operand(format, n, C, scale=2.0**-3, parts=parts, current=current)
        run("quantise", out, x, backend=backend)
        found.append(out)
    same(*found)
    assert found[0].amax == found[1].amax == x.abs().max()


@pytest.mark.parametrize("parts", ["both", "value"])
@pytest.mark.parametrize(("n", "C"), [(16, 48), (528, 80)])
def test_quantise_and_column_sums(n, C, parts):
    """The bytes of quantise alone. In plain torch the sums have the bits of bias_backward."""
    x = draw(n, C, dtype=BF16)
    alone, before = operand(E5M2, n, C, scale=2.0**-5, parts=parts), draw(C, dtype=BF16, seed=3)
    run("quantise", alone, x)
    for backend in ("fp8 cuda", "fp8"):
        for accumulate in (False, True):
            out, db = operand(E5M2, n, C, scale=2.0**-5, parts=parts), before.clone()
            run("quantise", out, x, db, accumulate=accumulate, backend=backend)
            same(out, alone)
            assert out.amax == alone.amax
            sums = f64(x).sum(0)
            want = sums + (f64(before) if accumulate else 0.0)
            close(db, want, also_rounded=sums if backend == "fp8" and accumulate else None, terms=f64(x).abs().sum(0))
            if backend == "fp8":
                plain, bias = before.clone(), OPS["bias_backward"].impls["torch"]
                temps = [poison(*s, dtype=d) for s, d in bias.temps(plain, x)]
                bias.fn(plain, x, accumulate=accumulate, scratch=lambda _, temps=temps: temps)
                assert torch.equal(db, plain)


@each_format
def test_infinities_and_nan(format):
    x = torch.zeros(208, 208, dtype=BF16, device=DEVICE)
    x[3, 70], x[190, 207], x[5, 5] = math.inf, -math.inf, 1.0
    found = []
    for backend in ("fp8 cuda", "fp8"):
        found.append(operand(format, 208, 208))
        run("quantise", found[-1], x, backend=backend)
        assert found[-1].amax == math.inf
    same(*found)
    x[0, 0] = math.nan
    out = operand(format, 208, 208)
    run("quantise", out, x)
    assert out.value is not None
    assert out.value.float()[0, 0].isnan()
    assert out.amax is not None
    assert out.amax.isnan()


def test_the_largest_of_several_calls_is_kept():
    out = operand(E4M3, 16, 16)
    for size in (2.0, 8.0, 4.0):
        run("quantise", out, torch.full((16, 16), size, dtype=BF16, device=DEVICE))
    assert out.amax == 8.0


@each_shape
def test_gelu_and_its_slope(n, C):
    """Against fp64, within half a step of the format; and the transposed copy that backward makes is forward's."""
    from daybreak.kernels.cuda.rounding import programs, write

    pre, grad = draw(n, C, dtype=BF16, scale=2.0), draw(n, C, dtype=BF16, seed=1, scale=1e-3)
    x = f64(pre).requires_grad_()
    gelu = torch.nn.functional.gelu(x, approximate="tanh")
    (slope,) = torch.autograd.grad(gelu, x, f64(grad))
    forward, again = operand(E4M3, n, C, scale=2.0**-5), operand(E4M3, n, C, scale=2.0**-5, parts="transposed")
    back, part = operand(E5M2, n, C, scale=2.0**-20), poison(programs(n, C)[1], C, dtype=F32)
    write(forward, pre, "gelu")
    write(back, grad, "slope", pre, again, part)
    for out, want, step, least in ((forward, gelu.detach(), 2.0**-4, 2.0**-15), (back, slope, 2.0**-3, 2.0**-37)):
        assert out.value is not None
        error = (f64(out.value.float() * out.scale) - want).abs()
        assert (error <= 1.001 * step * want.abs() + least).all()
        assert out.amax is not None
        assert out.amax.item() == pytest.approx(want.abs().max().item(), rel=1e-5)
    assert forward.transposed is not None
    assert again.transposed is not None
    assert torch.equal(forward.transposed.view(torch.uint8), again.transposed.view(torch.uint8))
    same(back, back)
    close(part.sum(0), slope.sum(0))


@pytest.mark.parametrize(("n", "C"), [(3, 96), (67, 100)])
def test_layernorm_writes_fp8(n, C):
    """Where nobody wants a transposed copy. Within half a step of fp64, and statistics as in bf16."""
    x, w, b = draw(n, C, dtype=BF16), draw(C, dtype=BF16, seed=1), draw(C, dtype=BF16, seed=2)
    stats, others = ([poison(n, dtype=F32), poison(n, dtype=F32)] for _ in range(2))
    out = operand(E4M3, n, C, scale=2.0**-4, parts="value")
    run("layernorm_forward", out, *stats, x, w, b)
    all_ops("cuda")["layernorm_forward"].impls["triton"].fn(poison(n, C, dtype=BF16), *others, x, w, b)
    assert all(torch.equal(s, o) for s, o in zip(stats, others, strict=True))
    want = torch.nn.functional.layer_norm(f64(x), (C,), f64(w), f64(b))
    assert out.value is not None
    error = (f64(out.value.float() * out.scale) - want).abs()
    assert (error <= 2.0**-4 * 1.001 * want.abs() + 2.0**-14).all()


@pytest.mark.parametrize("parts", ["transposed", "both"])
@pytest.mark.parametrize(("n", "C"), [(16, 96), (144, 80)])
def test_layernorm_backward_writes_the_copy_that_matmuls_read(n, C, parts):
    """The bytes that forward writes, with and without a transposed copy."""
    x, dout = draw(n, C, dtype=BF16), draw(n, C, dtype=BF16, seed=3)
    w, b = draw(C, dtype=BF16, seed=1), draw(C, dtype=BF16, seed=2)
    stats = [poison(n, dtype=F32), poison(n, dtype=F32)]
    forward = operand(E4M3, n, C, scale=2.0**-4, parts="value")
    run("layernorm_forward", forward, *stats, x, w, b)
    whole = operand(E4M3, n, C, scale=2.0**-4)
    run("layernorm_forward", whole, *stats, x, w, b)
    same(forward, whole)
    found = []
    for again in (operand(E4M3, n, C, scale=2.0**-4, parts=parts), None):
        grads = [dout.clone(), *(torch.zeros(C, dtype=BF16, device=DEVICE) for _ in range(3))]
        args = (*grads, again, draw(n, C, dtype=BF16, seed=4), x, *stats, w, b)
        how = {"accumulate_dx": True, "accumulate": False}
        if again is None:
            impl = all_ops("cuda")["layernorm_backward"].impls["triton"]
            temps = [poison(*s, dtype=d) for s, d in impl.temps(*args, **how)]
            impl.fn(*args, **how, scratch=lambda _, temps=temps: temps)
        else:
            run("layernorm_backward", *args, **how)
            copy = again
        found.append(grads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    same(copy, whole)
    assert copy.amax == whole.amax
    want = torch.nn.functional.layer_norm(f64(x), (C,), f64(w), f64(b)).abs().max().item()
    assert copy.amax is not None
    assert copy.amax.item() == pytest.approx(want, rel=1e-5)


def within_half_a_step(out: Operand, want: Tensor, least: float) -> None:
    """e4m3: half of the step between its numbers is 1/16 of them, and `least` for subnormal ones."""
    part = out.value if out.value is not None else out.transposed
    assert part is not None
    found = f64(part.float() * out.scale)
    found = found if out.value is not None else found.t()
    assert ((found - want).abs() <= 2.0**-4 * 1.001 * want.abs() + least).all()


@pytest.mark.parametrize(("n", "C", "offset"), [(16, 96, 0.0), (144, 80, 1.0)])
def test_rmsnorm_in_forward_and_backward(n, C, offset):
    """Forward writes rows; backward the copy that matmuls read: the same bytes turned. Gradients are those of bf16."""
    x, dout, w = draw(n, C, dtype=BF16), draw(n, C, dtype=BF16, seed=3), draw(C, dtype=BF16, seed=1)
    rstd, other = poison(n, dtype=F32), poison(n, dtype=F32)
    forward = operand(E4M3, n, C, scale=2.0**-4, parts="value")
    run("rmsnorm_forward", forward, rstd, x, w, eps=1e-6, offset=offset)
    plain = all_ops("cuda")["rmsnorm_forward"].impls["triton"]
    plain.fn(poison(n, C, dtype=BF16), other, x, w, eps=1e-6, offset=offset)
    assert torch.equal(rstd, other)
    want = f64(x) / (f64(x).square().mean(1, keepdim=True) + 1e-6).sqrt() * (f64(w) + offset)
    within_half_a_step(forward, want, 2.0**-14)
    whole = operand(E4M3, n, C, scale=2.0**-4)
    run("rmsnorm_forward", whole, rstd, x, w, eps=1e-6, offset=offset)
    same(forward, whole)
    found = []
    for again in (operand(E4M3, n, C, scale=2.0**-4, parts="transposed"), None):
        dx, dw = dout.clone(), torch.zeros(C, dtype=BF16, device=DEVICE)
        args = (dx, dw, again, draw(n, C, dtype=BF16, seed=4), x, rstd, w)
        how = {"accumulate_dx": True, "accumulate": False, "offset": offset}
        if again is None:
            impl = all_ops("cuda")["rmsnorm_backward"].impls["triton"]
            temps = [poison(*s, dtype=d) for s, d in impl.temps(*args, **how)]
            impl.fn(*args, **how, scratch=lambda _, temps=temps: temps)
        else:
            run("rmsnorm_backward", *args, **how)
            same(again, whole)
        found.append((dx, dw))
    assert all(torch.equal(a, b) for grads in found[1:] for a, b in zip(grads, found[0], strict=True))


@pytest.mark.parametrize(("n", "C"), [(16, 96), (144, 80)])
def test_norm_of_a_mixed_stream_in_forward_and_backward(n, C):
    """The copy that matmuls of backward read has the same bytes, whoever makes it: forward, or backward of ln1."""
    x, y, old, d, dout = (draw(n, C, dtype=BF16, seed=i) for i in range(5))
    a, b, kind = draw(1, dtype=F32, seed=5), draw(1, dtype=F32, seed=6), {"scale": 2.0**-4}
    plain = all_ops("cuda")["mix_norm_forward"].impls["triton"].fn
    for stored in (None, old):
        outs, found = [operand(E4M3, n, C, parts=parts, **kind) for parts in ("value", "both")], []
        for out in (*outs, poison(n, C, dtype=BF16)):
            rstd, res = poison(n, dtype=F32), None if stored is None else stored.clone()
            args = (res, out, rstd, x, y, a, b)
            run("mix_norm_forward", *args, eps=1e-6) if out in outs else plain(*args, eps=1e-6)
            found.append((rstd, rstd if res is None else res))
        assert all(torch.equal(p, q) for other in found[1:] for p, q in zip(other, found[0], strict=True))
        m = f64(a) * f64(x) + f64(b) * f64(y) if res is None else f64(res)
        within_half_a_step(outs[0], m / (m.square().mean(1, keepdim=True) + 1e-6).sqrt(), 2.0**-14)
        same(*outs)
        if stored is None:
            whole, kept = outs[1], rstd
    grads = []
    for again in (operand(E4M3, n, C, parts="transposed", **kind), None):
        outs = [poison(n, C, dtype=BF16), poison(n, C, dtype=BF16), poison(1, dtype=BF16), poison(1, dtype=BF16)]
        args, how = (*outs, again, d, dout, x, y, kept, a, b), {"accumulate_dy": False, "accumulate": False}
        if again is None:
            impl = all_ops("cuda")["mix_norm_backward"].impls["triton"]
            temps = [poison(*s, dtype=t) for s, t in impl.temps(*args, **how)]
            impl.fn(*args, **how, scratch=lambda _, temps=temps: temps)
        else:
            run("mix_norm_backward", *args, **how)
            same(again, whole)
        grads.append(outs)
    assert all(torch.equal(p, q) for p, q in zip(*grads, strict=True))


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(("n", "F"), [(16, 48), (144, 80)])
def test_the_gate_in_forward_and_backward(n, F, gelu):
    """Its magnitude too; and the copy that backward makes has forward's bytes, whatever parts were asked for."""
    gateup, d_out = draw(n, 2 * F, dtype=BF16, scale=2.0), draw(n, F, dtype=BF16, seed=1)
    gate, up = f64(gateup).chunk(2, 1)
    act = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    outs = {parts: operand(E4M3, n, F, scale=2.0**-3, parts=parts) for parts in ("value", "both", "transposed")}
    for parts, out in outs.items():
        if parts != "transposed":
            run("swiglu_forward", out, gateup, gelu=gelu)
            continue
        mine, theirs = gateup.clone(), gateup.clone()
        run("swiglu_backward", mine, out, d_out, mine, gelu=gelu)
        all_ops("cuda")["swiglu_backward"].impls["triton"].fn(theirs, None, d_out, theirs, gelu=gelu)
        assert torch.equal(mine, theirs)
    for out in outs.values():
        within_half_a_step(out, act * up, 2.0**-13)
        assert out.amax is not None
        assert out.amax.item() == pytest.approx((act * up).abs().max().item(), rel=1e-5)
    same(outs["both"], outs["value"])
    same(outs["both"], outs["transposed"])
    own = operand(E4M3, n, F, current=True)
    run("swiglu_forward", own, gateup, gelu=gelu)
    assert own.scale == 2.0 ** math.ceil(math.log2((act * up).abs().max().item() / 448))


def test_relu2_in_forward_and_backward():
    x, d = draw(80, 96, dtype=BF16), draw(80, 96, dtype=BF16, seed=1)
    whole, again = operand(E4M3, 80, 96, scale=2.0**-3), operand(E4M3, 80, 96, scale=2.0**-3, parts="transposed")
    run("relu2_forward", whole, x)
    within_half_a_step(whole, f64(x).relu().square(), 2.0**-13)
    mine, theirs = d.clone(), d.clone()
    run("relu2_backward", mine, again, x)
    all_ops("cuda")["relu2_backward"].impls["triton"].fn(theirs, None, x)
    assert torch.equal(mine, theirs)
    same(again, whole)
