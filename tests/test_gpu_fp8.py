"""Training in fp8 on a CUDA device: every matmul, and the engine beside the oracle, the CPU and itself.

Skipped where there is no such device. test_kernel_fp8.py has the kernel that rounds; it runs on a GPU too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import GPT2, Shape, random_values
from snapshots import facts
from torch import Tensor

from daybreak.config_keys import LoraConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.scales import AMAX, HISTORY, SATURATED, SCALE
from daybreak.kernels import Kernels, all_ops, temps_bytes
from daybreak.kernels.fp8 import E4M3, E5M2, quantise
from daybreak.kernels.operand import Format, Operand
from daybreak.shapes import GPT2Config, LlamaConfig
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, snapshot

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with fp8"
    ),
]
NAME, BF16 = "fp8 cuda", torch.bfloat16
SMALL = Shape(L=3, C=128, NH=2, max_T=128, V=1000)
B, T = 4, 128
CFG = GPT2Config(**SMALL._asdict())
LLAMA = LlamaConfig(L=2, C=256, NH=4, NKV=2, HS=64, F=384, max_T=T, V=1000, qk_norm=True)


def draw(*shape: int, seed: int = 0, positive: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return x.abs() if positive else x


def made(x: Tensor, format: Format, power: float = 1.0) -> Operand:
    """x in fp8 on the GPU, rounded by the reference. Values are multiplied by `power`, scales divided by it."""
    n, C = x.shape
    out = Operand(
        format, torch.empty(n, C, dtype=format.dtype), torch.ones(()), torch.empty(C, n, dtype=format.dtype),
        torch.zeros(()), current=True,
    )  # fmt: skip
    quantise(out, x, scratch=lambda temps: [torch.empty(s, dtype=d) for s, d in temps])
    assert out.value is not None
    assert out.transposed is not None
    slots = torch.stack([out.scale * power, torch.zeros(())]).cuda()
    cuda = Format(NAME, format.dtype, slots=True)
    return Operand(cuda, out.value.cuda(), slots[0], out.transposed.cuda(), slots[1])


def exact(x: Operand) -> Tensor:
    assert x.value is not None
    return x.value.double() * x.scale.double()


def run(name: str, *args: Any, **kwargs: Any) -> None:
    impl = all_ops("cuda")[name].impls[NAME]
    size = temps_bytes(impl.temps(*args, **kwargs)) if impl.temps else 0
    kernels = Kernels(torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")).in_formats({NAME})
    getattr(kernels, name)(*args, **kwargs)


def near(found: Tensor, want: Tensor, sums: Tensor, K: int, *, slow: bool, positive: bool = False) -> None:
    """Of bf16's rounding, and of an accumulator with 13 bits, which is cut and never rounded.

    Each term loses up to 2^-13 of the sum so far: half of the whole sum, on average, if all terms are positive. Slow
    accumulation begins anew every 128 terms. Losses of terms with random signs cancel, so far fewer bits are lost."""
    few = 2.0**-12 if slow else (K / 32) * 2.0**-13
    adding = sums * ((min(K, 128) if slow else K) / 2 * 2.0**-13 if positive else few)
    error = (found.double() - want).abs()
    assert (error <= 2.0**-8 * want.abs() + adding + 1e-30).all(), (error / (2.0**-8 * want.abs() + adding)).max()


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "all positive"])
@pytest.mark.parametrize(
    ("n", "I", "O", "power"), [(64, 128, 384, 1.0), (1024, 1600, 4800, 2.0**-7), (512, 768, 96, 8.0)]
)
def test_forward(n, I, O, power, positive):
    x, w = made(draw(n, I, positive=positive), E4M3, power), made(0.02 * draw(O, I, seed=1, positive=positive), E4M3)
    b, add = (draw(*s, seed=2).cuda().to(BF16) for s in ((O,), (n, O)))
    product, sums = exact(x) @ exact(w).t(), exact(x).abs() @ exact(w).abs().t()
    for bias, more in ((None, None), (b, None), (b, add)):
        out = torch.full((n, O), torch.nan, dtype=BF16, device="cuda")
        run("matmul_forward", out, x, w, bias, more)
        want = product + (0 if bias is None else bias.double()) + (0 if more is None else more.double())
        near(out, want, sums, I, slow=False, positive=positive)


@pytest.mark.parametrize("positive", [False, True], ids=["normal", "all positive"])
@pytest.mark.parametrize("format", [E5M2, E4M3], ids=["e5m2", "e4m3"])
@pytest.mark.parametrize(("n", "I", "O"), [(64, 128, 384), (2048, 1600, 6400)])
def test_backward(n, I, O, format, positive):
    dout = made(1e-4 * draw(n, O, positive=positive), format, 4.0)
    x, w = made(draw(n, I, seed=1, positive=positive), E4M3), made(0.02 * draw(O, I, seed=2), E4M3, 0.5)
    dx = torch.full((n, I), torch.nan, dtype=BF16, device="cuda")
    run("matmul_backward_input", dx, dout, w)
    near(dx, exact(dout) @ exact(w), exact(dout).abs() @ exact(w).abs(), O, slow=False, positive=positive)
    dw = torch.full((O, I), torch.nan, dtype=BF16, device="cuda")
    product, sums = exact(dout).t() @ exact(x), exact(dout).abs().t() @ exact(x).abs()
    run("matmul_backward_weight", dw, dout, x, accumulate=False)
    near(dw, product, sums, n, slow=True, positive=positive)
    before = dw.clone()
    run("matmul_backward_weight", dw, dout, x, accumulate=True)  # in place, rounded once
    near(dw, product + before.double(), sums, n, slow=True, positive=positive)


def test_scales_are_read_when_a_graph_is_replayed():
    x, w = made(draw(64, 128), E4M3), made(draw(256, 128, seed=1), E4M3)
    out = torch.zeros(64, 256, dtype=BF16, device="cuda")
    run("matmul_forward", out, x, w)
    graph = torch.cuda.CUDAGraph()
    impl = all_ops("cuda")["matmul_forward"].impls[NAME]
    kernels = Kernels(torch.zeros(temps_bytes(impl.temps(out, x, w)), dtype=torch.uint8, device="cuda")).in_formats(
        {NAME}
    )
    with torch.cuda.graph(graph):
        kernels.matmul_forward(out, x, w)
    graph.replay()
    first = out.clone()
    x.scale.mul_(4.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, 4 * first)


# --- the engine


def batch(step: int, A: int = 2, V: int = CFG.V) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(V, (A, B, T), generator=g)
    return tokens, (3 * tokens + torch.randint(2, (A, B, T), generator=g)) % V


def engine_of(cfg: Any = CFG, device: str = "cuda", **options: Any) -> Engine:
    return Engine(EngineSpec(cfg, **{"B": B, "T": T, "compute": "fp8", **options}), device=device)


def bits(engine: Engine) -> dict[str, Tensor]:
    kept = {e.name for e in engine.arena.entries if e.saved} | {"weights", "masters"}
    return {name: x.clone() for name, x in engine.state.items() if name in kept}


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
def test_gradients(recompute):
    """As on the CPU: within sqrt(8 (5.7^2 + 3.7^2)) = 19 % of the oracle's."""
    values, oracle = random_values(SMALL, 0), GPT2(SMALL, torch.float64).load(random_values(SMALL, 0))
    engine = engine_of(recompute=recompute)
    engine.load_params(values)
    tokens, targets = batch(0)
    loss, grads = oracle.gradients(tokens, targets)
    engine.train_step(tokens, targets, lr=0.0, step=0)
    assert engine.stats()["loss"] == pytest.approx(float(loss), abs=0.02)
    for name in engine.names():
        want, got = grads[name].double().flatten(), engine.grad(name).double().flatten().cpu()
        if name.endswith("qkvb"):
            want, got = (torch.cat([x[: SMALL.C], x[2 * SMALL.C :]]) for x in (want, got))
        assert (got - want).norm() < 0.19 * want.norm(), (name, (got - want).norm() / want.norm())
    assert not engine.state[SATURATED].any()


def test_recomputation_two_engines_and_a_resumed_one_have_equal_bits(tmp_path: Path):
    found = []
    for recompute in (2, 2, 0, 1, 3):
        engine = engine_of(recompute=recompute)
        for step in range(4):
            if step == 2 and not found:
                path = save_checkpoint(tmp_path / "run" / "checkpoints", snapshot(engine, 2, facts(engine)))
            engine.train_step(*batch(step), lr=1e-3, step=step)
        found.append(bits(engine))
    resumed = Engine(EngineSpec(CFG, B=B, T=T, compute="fp8", recompute=2), device="cuda", init=False)
    restore(resumed, load_checkpoint(path))
    for step in (2, 3):
        resumed.train_step(*batch(step), lr=1e-3, step=step)
    found.append(bits(resumed))
    names = ("two engines", "recompute 0", "recompute 1", "recompute 3", "resumed")
    differs = {
        other: [n for n, x in found[0].items() if not torch.equal(x, after[n])]
        for other, after in zip(names, found[1:], strict=True)
    }
    assert differs["two engines"] == differs["resumed"] == [], differs
    print(differs)  # between levels a kernel of bf16 may differ in a last digit, as it may without fp8


def test_beside_the_cpu_and_bf16():
    """The same schedule: scales are equal or one power apart, losses near."""
    engines = [engine_of(), engine_of(device="cpu"), engine_of(compute="bf16")]
    for step in range(6):
        for engine in engines:
            engine.train_step(*batch(step), lr=1e-3, step=step)
        losses = [engine.stats()["loss"] for engine in engines]
        assert losses == pytest.approx([losses[2]] * 3, abs=0.02), step
    gpu, cpu = (e.state[SCALE][:, 0].cpu().log2() for e in engines[:2])
    assert ((gpu - cpu).abs() <= 1).all()
    assert torch.allclose(engines[0].state[HISTORY][1].cpu(), engines[1].state[HISTORY][1], rtol=0.1, atol=1e-6)


def test_evaluation_is_in_bf16():
    fp8, bf16 = engine_of(), engine_of(compute="bf16")
    fp8.train_step(*batch(0), lr=1e-3, step=0)
    bf16.load_params({name: fp8.param(name) for name in fp8.names()})
    tokens, targets = (x[0] for x in batch(9))
    assert torch.equal(fp8.eval_losses(tokens, targets).clone(), bf16.eval_losses(tokens, targets).clone())
    for _ in range(2):
        assert torch.equal(fp8.prefill(0, [[1, 2, 3]]).clone(), bf16.prefill(0, [[1, 2, 3]]).clone())
        assert torch.equal(fp8.decode([4], [3]).clone(), bf16.decode([4], [3]).clone())
        fp8.train_step(*batch(1), lr=0.0, step=1)


def test_no_allocation_after_the_first_step():
    engine = engine_of(recompute=2)
    engine.train_step(*batch(0), lr=1e-3, step=0)
    engine.stats()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for step in range(1, 4):
        engine.train_step(*batch(step), lr=1e-3, step=step)
        engine.stats()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_a_magnitude_that_is_not_finite_is_refused():
    engine = engine_of()
    engine.train_step(*batch(0), lr=1e-3, step=0)
    before = bits(engine)
    engine.forward_backward(*batch(1), lr=1e-3, step=1)
    engine.state[AMAX][-1] = torch.inf
    engine.update()
    assert engine.stats()["skip"] == 1
    after = bits(engine)
    assert torch.equal(after["weights"], before["weights"])
    assert torch.isfinite(after[HISTORY]).all()


@pytest.mark.parametrize("cfg", [CFG, LLAMA], ids=["gpt2", "llama"])
def test_adapters_on_a_base_in_fp8(cfg: Any):
    """The same bytes of the base as on a CPU, and near losses. In the decoder family equal bits at all levels of
    recompute; in GPT-2 a kernel of bf16 may differ in a last digit."""
    lora, found = LoraConfig(4, base="fp8"), []
    cpu = engine_of(cfg, device="cpu", compute="bf16", lora=lora)
    for recompute in (0, 2, 3):
        engine = engine_of(cfg, compute="bf16", lora=lora, recompute=recompute)
        for step in range(3):
            engine.train_step(*batch(step, V=min(cfg.V, 1000)), lr=1e-2, step=step)
        found.append((engine.stats()["loss"], bits(engine)))
    for step in range(3):
        cpu.train_step(*batch(step, V=min(cfg.V, 1000)), lr=1e-2, step=step)
    assert found[0][0] == pytest.approx(cpu.stats()["loss"], abs=0.02)
    for name, x in cpu.state.items():
        if name.endswith((".e4m3", ".turned")):
            assert torch.equal(engine.state[name].cpu(), x), name
    for loss, other in found[1:] if cfg is LLAMA else ():
        assert loss == found[0][0]
        assert all(torch.equal(x, other[name]) for name, x in found[0][1].items())


def test_the_decoder_family():
    engines = [engine_of(LLAMA, compute=compute, recompute=2) for compute in ("fp8", "bf16")]
    for step in range(4):
        for engine in engines:
            engine.train_step(*batch(step, V=1000), lr=1e-3, step=step)
        losses = [engine.stats()["loss"] for engine in engines]
        assert losses[0] == pytest.approx(losses[1], abs=0.02), step
    assert not engines[0].state[SATURATED].any()
