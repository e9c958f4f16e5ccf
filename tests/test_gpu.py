"""The plain-torch path on a CUDA device. Skipped where there is none; the fused kernels have their own tests."""

from __future__ import annotations

import pytest
import torch

from daybreak.engine import Engine
from daybreak.shapes import GPT2Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = GPT2Config(L=3, C=96, NH=3, max_T=64, V=300)


def batch(steps: int, B: int = 4, T: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPE.V, (steps, 2, B, T + 1), generator=generator)


def run(device: str, compute: str, steps: int = 10) -> tuple[Engine, list[float]]:
    torch.set_float32_matmul_precision("highest")
    engine = Engine(SHAPE, B=4, T=48, compute=compute, recompute=1, device=device)
    losses = []
    for step, x in enumerate(batch(steps)):
        engine.train_step(x[..., :-1], x[..., 1:], lr=1e-3, step=step)
        losses.append(engine.stats()["loss"])
    return engine, losses


@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 2e-6), ("fp64", 1e-12), ("bf16", 5e-3)])
def test_losses_and_gradients_equal_the_cpus(compute: str, tolerance: float) -> None:
    gpu, gpu_losses = run("cuda", compute)
    cpu, cpu_losses = run("cpu", compute)
    assert gpu_losses == pytest.approx(cpu_losses, rel=tolerance)
    if compute != "bf16":
        for name in cpu.names():
            # the key bias has a true gradient of zero: its noise is measured against the whole bias
            difference = (gpu.grad(name).cpu() - cpu.grad(name)).norm() / cpu.grad(name).norm()
            assert difference < 100 * tolerance, name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_two_runs_are_bit_identical(compute: str) -> None:
    (a, losses_a), (b, losses_b) = run("cuda", compute), run("cuda", compute)
    assert losses_a == losses_b
    assert torch.equal(a.masters, b.masters)
    assert torch.equal(a.state["v"], b.state["v"])


def test_memory_is_constant_after_the_first_step() -> None:
    engine, _ = run("cuda", "bf16", steps=1)
    x = batch(1)[0]
    engine.train_step(x[..., :-1], x[..., 1:], lr=1e-3, step=1)
    reserved = torch.cuda.memory_reserved()
    for step in range(2, 6):
        engine.train_step(x[..., :-1], x[..., 1:], lr=1e-3, step=step)
        engine.eval_losses(x[0, :, :-1], x[0, :, 1:])
        engine.next_logits(x[0, 0, :-1])
    assert torch.cuda.memory_reserved() == reserved
