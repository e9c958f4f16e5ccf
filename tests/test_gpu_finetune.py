"""Finetuning on a CUDA device: adapters against the same engine in fp64 on the CPU, which equals PEFT's
(test_finetune_peft.py); captured graphs, equal bits, and memory as it was planned. Skipped where there is no device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.models.adapters import is_adapter
from daybreak.shapes import Shape, model_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, T, V = 4, 128, 1000
LLAMA = model_config({"arch": "llama", "L": 3, "C": 256, "NH": 8, "NKV": 2, "HS": 64, "F": 384, "max_T": T, "V": V})
GPT2 = model_config({"arch": "gpt2", "L": 3, "C": 128, "NH": 2, "max_T": T, "V": V})
LORA = {"all": LoraConfig(16), "some": LoraConfig(8, targets="q,v,h.1.*,fc", rslora=True), "odd": LoraConfig(3)}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets (2, B, T): two micro-steps, with targets that are not learned."""
    g = torch.Generator().manual_seed(step)
    rows = torch.randint(V, (2, B, T + 1), generator=g)
    targets = rows[..., 1:].clone()
    targets[torch.rand(targets.shape, generator=g) < 0.4] = -1
    return rows[..., :-1], targets


def build(shape: Shape, lora: LoraConfig, device: str = "cuda", **how: Any) -> Engine:
    """An engine whose B is not 0, so that all gradients matter. Weights are those that bf16 holds exactly."""
    optim = OptimConfig(beta2=0.999, weight_decay=0.0)
    engine = Engine(EngineSpec(shape, B=B, T=T, optim=optim, lora=lora, **how), device=device)
    for i, name in enumerate(engine.names()):
        value, g = engine.param(name).float().cpu(), torch.Generator().manual_seed(i)
        if name.endswith("_B"):
            value = 0.05 * torch.randn(value.shape, generator=g)
        engine.set_exact(name, value.bfloat16().float())
    return engine


def train(engine: Engine, steps: int = 4) -> list[tuple[float, float]]:
    found = []
    for step in range(steps):
        engine.train_step(*batch(step), lr=1e-3, step=step)
        stats = engine.stats()
        found.append((stats["loss"], stats["norm"]))
    return found


@pytest.mark.parametrize("recompute", [0, 2, 3])
@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_adapters_in_fp32_equal_fp64(shape: Shape, lora: str, recompute: int) -> None:
    torch.set_float32_matmul_precision("highest")
    wide = build(shape, LORA[lora], "cpu", compute="fp64")
    want = train(wide)
    engine = build(shape, LORA[lora], compute="fp32", recompute=recompute)
    for (loss, norm), (their_loss, their_norm) in zip(train(engine), want, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-4)
    for name in engine.table.offsets:
        error = engine.grad(name).cpu().double() - wide.grad(name)
        assert error.norm() <= 2e-3 * wide.grad(name).norm(), name


@pytest.mark.parametrize("recompute", [0, 1, 3])
@pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_adapters_in_bf16(shape: Shape, recompute: int) -> None:
    """Near fp64; the same bits twice, and in every level of recompute; the base unchanged; memory as planned."""
    want = train(build(shape, LORA["all"], "cpu", compute="fp64"))
    torch.cuda.synchronize()
    engine = build(shape, LORA["all"], compute="bf16", recompute=recompute)
    start = {name: engine.param(name).clone() for name in engine.names()}
    got = train(engine)
    for (loss, norm), (their_loss, their_norm) in zip(got, want, strict=True):
        assert loss == pytest.approx(their_loss, rel=2e-3)
        assert norm == pytest.approx(their_norm, rel=3e-2)
    assert got == train(build(shape, LORA["all"], compute="bf16", recompute=recompute))
    for name, value in start.items():
        assert torch.equal(engine.param(name), value) != is_adapter(name), name
    allocated = {name: buffer.untyped_storage().nbytes() for name, buffer in engine.frame.buffers.items()}
    assert allocated == engine.arena.sizes()
    logits = engine.prefill(0, [[1, 2, 3]]).clone()
    assert torch.allclose(logits[0], engine.logits(torch.tensor([[1, 2, 3]]))[0, -1].float(), atol=0.05, rtol=0.05)
    assert engine.decode([4], [3]).isfinite().all()
