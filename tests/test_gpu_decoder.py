"""The decoder family's kernels on a CUDA device: the gate inside its matmuls, and what that changes in a model.

Skipped where there is no such device. The whole models, backend by backend, are in test_gpu.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_harness import DEVICE, draw, f64, poison, run
from llama_oracle import Decoder, random_values
from torch import Tensor

from daybreak.engine import Engine, EngineSpec
from daybreak.engine.device import missing_on
from daybreak.kernels.cuda import quack
from daybreak.shapes import LlamaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, HALF_ULP, SUM, TANH = torch.bfloat16, 2.0**-8, 1e-5, 2.0**-10.98
each_act = pytest.mark.parametrize("how", [{}, {"gelu": True}], ids=["silu", "gelu"])
each_backend = pytest.mark.parametrize("backend", ["quack", "cublaslt"])
# n, C, F: enough tiles for the epilogue, whose last ones end within a tile; too few of them; rows of odd strides.
LARGE = (4000, 1096, 3192)
SHAPES = [LARGE, (2048, 1536, 8960), (300, 264, 200), (77, 63, 101)]
each_shape = pytest.mark.parametrize(("n", "C", "F"), SHAPES)


@pytest.fixture(autouse=True)
def served() -> None:
    if missing := {"quack", "cublaslt"} & missing_on(torch.device("cuda", 0)).keys():
        pytest.skip(f"no {', '.join(missing)} here")


def act(x: Tensor, gelu: bool) -> Tensor:
    """silu or gelu, in fp64."""
    u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x / 2 * (1 + torch.tanh(u)) if gelu else x / (1 + torch.exp(-x))


def slope_of_u(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def within(got: Tensor, want: Tensor, limit: Tensor) -> None:
    assert torch.isfinite(got).all()
    excess = ((f64(got) - want).abs() / (limit + 1e-30)).amax().item()
    assert excess <= 1, f"{excess:.2f} times the tolerance"


def tiles(n: int, C: int, F: int) -> tuple[object, object]:
    """The tiles that quack's rule gives forward and backward; None where cuBLASLt serves."""
    return quack._tiling(n, 2 * F, 0, (1, 2), quack.GATED), quack._tiling(n, F, 0, (2, 1))


def test_the_large_shape_runs_in_the_epilogue() -> None:
    assert all(tiles(*LARGE))
    assert not any(tiles(*SHAPES[2]))


@each_backend
@each_shape
@each_act
def test_the_gate_in_the_forward_matmul(backend: str, n: int, C: int, F: int, how: dict[str, bool]) -> None:
    """gateup as the plain matmul has it; the output from gateup as it is stored."""
    x, w = draw(n, C, dtype=BF16), draw(2 * F, C, dtype=BF16, scale=C**-0.5)
    out, gateup = poison(n, F, dtype=BF16), poison(n, 2 * F, dtype=BF16)
    run("matmul_swiglu_forward", out, gateup, x, w, backend=backend, **how)
    product, gelu = f64(x) @ f64(w).T, bool(how)
    slack = SUM * product.abs().amax()
    within(gateup, product, HALF_ULP * product.abs() + slack)
    gate, up = f64(gateup).chunk(2, -1)
    want = act(gate, gelu) * up
    within(out, want, HALF_ULP * want.abs() + (TANH if gelu else SUM) * (gate * up).abs())
    second, pre = torch.zeros_like(out), torch.zeros_like(gateup)
    run("matmul_swiglu_forward", second, pre, x, w, backend=backend, **how)
    assert torch.equal(second, out)
    assert torch.equal(pre, gateup)


@each_backend
@each_shape
@each_act
@pytest.mark.parametrize("again", [False, True], ids=["alone", "again"])
def test_the_gate_in_the_backward_matmul(
    backend: str, n: int, C: int, F: int, how: dict[str, bool], again: bool
) -> None:
    """Written over its own input, as a step has it. The output once more has what the pass of its own gives."""
    dout, w, gateup = draw(n, C, dtype=BF16), draw(C, F, dtype=BF16, scale=C**-0.5), draw(n, 2 * F, dtype=BF16, seed=1)
    gateup *= 3
    gateup[0, :5] = gateup[1, F : F + 5] = torch.tensor([0.0, -60.0, 60.0, -1e-3, 5.0])
    kept, gelu = gateup.clone(), bool(how)
    outputs = [poison(n, F, dtype=BF16) for _ in range(2)]
    rewrite = outputs[0] if again else None
    run("matmul_swiglu_backward", gateup, rewrite, outputs[1], dout, w, gateup, backend=backend, **how)
    product = f64(dout) @ f64(w)
    gate, up = (y.requires_grad_() for y in f64(kept).chunk(2, -1))
    whole = act(gate, gelu) * up
    d_gate, d_up = torch.autograd.grad(whole.sum(), (gate, up))
    gate, up, whole = gate.detach(), up.detach(), whole.detach()
    fused = backend == "quack" and tiles(n, C, F)[1] and C % 8 == F % 8 == 0
    rounded = HALF_ULP if fused else 2 * HALF_ULP
    slack, tanh = SUM * product.abs().amax(), TANH if gelu else 1e-6
    for got, factor, bent in zip(
        gateup.chunk(2, -1),
        (d_gate, d_up),
        (up.abs() * (0.5 + gate.abs() * slope_of_u(gate)), gate.abs() / 2),
        strict=True,
    ):
        want = product * factor
        within(got, want, rounded * want.abs() + slack * factor.abs() + tanh * product.abs() * bent)
    if rewrite is not None:
        within(rewrite, whole, HALF_ULP * whole.abs() + tanh * (gate * up).abs())
    second, room = kept.clone(), torch.zeros_like(outputs[1])
    run("matmul_swiglu_backward", second, rewrite, room, dout, w, second, backend=backend, **how)
    assert torch.equal(second, gateup)


def test_bits_are_the_same_under_load() -> None:
    """Qwen2.5-1.5B's MLP, beside other work on another stream."""
    n, C, F = 8192, 1536, 8960
    x, w, v = draw(n, C, dtype=BF16), draw(2 * F, C, dtype=BF16, scale=C**-0.5), draw(C, F, dtype=BF16, scale=C**-0.5)
    noise, busy = torch.cuda.Stream(), torch.randn(4096, 4096, device=DEVICE)
    first: list[Tensor] = []
    for _repeat in range(4):
        out, gateup, d_act = (poison(n, m * F, dtype=BF16) for m in (1, 2, 1))
        with torch.cuda.stream(noise):
            for _ in range(8):
                busy @ busy
        run("matmul_swiglu_forward", out, gateup, x, w, backend="quack")
        made = gateup.clone()
        run("matmul_swiglu_backward", gateup, None, d_act, x, v, gateup, backend="quack")
        assert torch.isnan(d_act).all()  # the epilogue served
        first = first or [out, made, gateup]
        assert all(torch.equal(a, b) for a, b in zip(first, (out, made, gateup), strict=True))


WIDE = Decoder(L=2, C=1024, NH=8, NKV=2, HS=128, F=3072, max_T=1024, V=1000, qkv_bias=True)
B, T = 4, 1024


def engine_of(s: Decoder, **options: Any) -> Engine:
    """With the oracle's weights; matrices a quarter as large, as in test_gpu.py."""
    made = Engine(EngineSpec(LlamaConfig(**s._asdict()), B=B, T=T, compute="bf16", **options), device="cuda")
    made.load_params({name: x / 4 if x.dim() == 2 else x for name, x in random_values(s).items()})
    return made


def batch(seed: int) -> tuple[Tensor, Tensor]:
    return torch.randint(WIDE.V, (2, 1, B, T), generator=torch.Generator().manual_seed(seed)).unbind(0)


@pytest.mark.parametrize("how", [{}, {"act": "gelu"}, {"mlp_bias": True}], ids=["silu", "gelu", "bias"])
@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_a_wide_model_s_gradients(recompute: int, how: dict[str, Any]) -> None:
    """With the gate in the matmuls they differ from those of cuBLASLt and passes by what bf16 rounds, at most: a kind
    of parameter errs at most 1.2 times as much, measured against fp32."""
    s = WIDE._replace(**how)
    tokens, targets = batch(0)
    grads: dict[str, dict[str, Tensor]] = {}
    for name, options in (
        ("fused", {"recompute": recompute}),
        ("passes", {"recompute": recompute, "kernels": {"matmul": "cublaslt"}}),
    ):
        engine = engine_of(s, **options)
        engine.forward_backward(tokens, targets)
        grads[name] = {p: engine.grad(p).float().clone() for p in engine.names()}
        del engine
    exact = Engine(EngineSpec(LlamaConfig(**s._asdict()), B=B, T=T, compute="fp32"), device="cuda")
    exact.load_params({name: x / 4 if x.dim() == 2 else x for name, x in random_values(s).items()})
    exact.forward_backward(tokens, targets)
    errors: dict[str, dict[str, float]] = {name: {} for name in grads}
    for name, found in grads.items():
        for p, got in found.items():
            want, kind = exact.grad(p).float(), p.rsplit(".", 1)[-1]
            error = ((got - want).norm() / want.norm()).item()
            errors[name][kind] = max(errors[name].get(kind, 0.0), error)
    assert {k: (e, errors["passes"][k]) for k, e in errors["fused"].items() if e > 1.2 * errors["passes"][k]} == {}


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
@pytest.mark.parametrize("how", [{}, {"act": "gelu"}], ids=["silu", "gelu"])
def test_a_wide_model_trains_with_the_same_bits_twice(recompute: int, how: dict[str, Any]) -> None:
    """Whatever backward computes again: the gate comes from what its matmul stored, in forward and in backward."""
    engines = [engine_of(WIDE._replace(**how), recompute=r) for r in (0, recompute)]
    for step in range(3):
        tokens, targets = batch(step)
        for engine in engines:
            engine.train_step(tokens, targets, lr=1e-3, step=step)
    assert engines[0].frame.k.choices["matmul_swiglu_forward"] == "quack"
    assert engines[0].stats()["loss"] == engines[1].stats()["loss"] < 10
    for name in engines[0].names():
        assert torch.equal(engines[0].param(name), engines[1].param(name)), name
