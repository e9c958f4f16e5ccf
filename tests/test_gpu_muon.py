"""Muon on a CUDA device: its batched matmuls, and the engine beside the CPU's and itself.

Skipped where there is no such device. test_kernel_muon.py has the element-wise kernels; it runs on a GPU too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshots import exact_weight, facts
from torch import Tensor

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.kernels import Kernels, all_ops, temps_bytes
from daybreak.kernels.cuda import batched
from daybreak.shapes import GPT2Config, LlamaConfig
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, T, LR, STEPS = 4, 128, 3e-3, 6
GPT = GPT2Config(L=3, C=128, NH=2, max_T=T, V=1000)
LLAMA = LlamaConfig(L=2, C=256, NH=4, NKV=2, HS=64, F=384, max_T=T, V=1000, qk_norm=True)
MUON = OptimConfig(
    name="muon", lr=LR, muon_lr=0.02, muon_warmup=4, muon_final_momentum=0.9, muon_decay_schedule="cosine", horizon=8
)


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / shape[-1] ** 0.5
    return x.to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("n", "r", "c"), [(3, 768, 3072), (2, 1536, 1536), (5, 256, 128), (2, 24, 40), (1, 64, 192)])
def test_the_matmuls_of_a_step(dtype: torch.dtype, n: int, r: int, c: int) -> None:
    """Both orientations, by cuBLASLt where rows have 16 bytes or more, rounded once from sums in fp32."""
    size = temps_bytes(batched.workspace())
    kernels = Kernels(torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda"), {"matmul_batched": "cublaslt"})
    x, h = draw(n, r, c, seed=0, dtype=dtype), draw(n, r, r, seed=1, dtype=dtype)
    k = draw(n, c, c, seed=2, dtype=dtype)
    calls = [
        (x, x.mT, None, {}), (x.mT, x, None, {}), (h, h, h, {"alpha": 15.9, "beta": -22.5}), (h, x, x, {"beta": 8.2}),
        (x, k, x, {"beta": 3.9}),
    ]  # fmt: skip
    for a, b, add, options in calls:
        batched._prepared.clear()
        out = torch.full((n, a.shape[1], b.shape[2]), torch.nan, dtype=dtype, device="cuda")
        kernels.matmul_batched(out, a, b, add, **options)
        alpha, beta = options.get("alpha", 1.0), options.get("beta", 1.0)
        want = alpha * a.double() @ b.double() + (0 if add is None else beta * add.double())
        terms = abs(alpha) * a.double().abs() @ b.double().abs() + (
            0 if add is None else abs(beta) * add.double().abs()
        )
        half = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
        assert ((out.double() - want).abs() <= half * want.abs() + 1e-5 * terms).all()
        (prepared,) = batched._prepared.values()
        assert prepared.algo is not None  # cuBLASLt computed it, not torch
        again = torch.empty_like(out)
        kernels.matmul_batched(again, a, b, add, **options)
        assert torch.equal(out, again)


def batch(step: int, A: int = 2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(1000, (A, B, T), generator=g)
    return tokens, (3 * tokens + torch.randint(2, (A, B, T), generator=g)) % 1000


def build(cfg: Any, device: str = "cuda", **options: Any) -> Engine:
    return Engine(EngineSpec(cfg, B=B, T=T, optim=MUON, **options), device=device)


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        engine.train_step(*batch(step), lr=LR, step=step)
        losses.append(engine.stats()["loss"])
    return losses


def bits(engine: Engine) -> dict[str, Tensor]:
    kept = {e.name for e in engine.arena.entries if e.saved} | {"weights", "masters"}
    return {name: x.clone() for name, x in engine.state.items() if name in kept}


def test_no_reference_runs_on_the_gpu() -> None:
    engine = build(GPT, compute="bf16")
    names = ("muon_momentum", "muon_sums", "muon_update", "matmul_batched")
    assert [engine.arena.choices[name] for name in names] == ["triton", "triton", "triton", "cublaslt"]
    assert engine.graphs.enabled
    assert all("torch" in all_ops()[name].impls for name in names)


@pytest.mark.parametrize("cfg", [GPT, LLAMA], ids=["gpt2", "llama"])
def test_fp32_beside_the_cpu_in_fp64(cfg: Any) -> None:
    """The first updates are as near as fp32 is; later ones differ as training in fp32 and fp64 does."""
    gpu, cpu = build(cfg, compute="fp32"), build(cfg, device="cpu", compute="fp64")
    cpu.load_params({name: gpu.param(name).cpu().double() for name in gpu.names()})
    before = {name: gpu.param(name).cpu().double() for name in gpu.names()}
    assert train(gpu, range(1)) == pytest.approx(train(cpu, range(1)), rel=1e-5)
    for name in (n for n in gpu.names() if f"second.{n}" in gpu.state):
        moved, want = gpu.param(name).cpu().double() - before[name], cpu.param(name) - before[name]
        assert (moved - want).norm() < 2e-3 * want.norm(), name
        assert want.norm() > 0
    assert train(gpu, range(1, STEPS)) == pytest.approx(train(cpu, range(1, STEPS)), rel=2e-3)


@pytest.mark.parametrize("masters", ["split", "fp32", "none"])
def test_bf16_beside_the_cpu(masters: str) -> None:
    gpu, cpu = (build(GPT, device=device, compute="bf16", masters=masters) for device in ("cuda", "cpu"))
    found, want = train(gpu, range(STEPS)), train(cpu, range(STEPS))
    assert found == pytest.approx(want, abs=0.03)
    assert found[-1] < found[0]


def test_layouts_of_the_masters_two_engines_and_a_resumed_one_have_equal_bits(tmp_path: Path) -> None:
    engines = [build(LLAMA, compute="bf16", masters=masters) for masters in ("split", "split", "fp32")]
    path = tmp_path / "run" / "checkpoints"
    train(engines[0], range(3))
    saved = save_checkpoint(path, snapshot(engines[0], 3, facts(engines[0])))
    train(engines[0], range(3, STEPS))
    for engine in engines[1:]:
        train(engine, range(STEPS))
    resumed = build(LLAMA, compute="bf16", masters="split")
    restore(resumed, load_checkpoint(saved))
    train(resumed, range(3, STEPS))
    for other in (engines[1], resumed):
        first, second = bits(engines[0]), bits(other)
        assert not [name for name, x in first.items() if not torch.equal(x, second[name])]
    assert all(torch.equal(exact_weight(engines[0], n), exact_weight(engines[2], n)) for n in engines[0].names())
