"""QLoRA on a CUDA device: NF4 unpacked with the bits of a CPU, the losses of the same engine in fp64 on the CPU, equal
bits twice and through graphs, and memory as it was planned. Skipped where there is no device."""

from __future__ import annotations

import pytest
import torch
from test_gpu_finetune import GPT2, LLAMA, batch, build, train
from test_kernel_nf4 import made, packed

from daybreak.config_keys import LoraConfig
from daybreak.engine import Engine
from daybreak.kernels.nf4 import dense
from daybreak.models.adapters import is_adapter
from daybreak.shapes import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
QLORA = LoraConfig(16, base="nf4")
SHAPES = pytest.mark.parametrize("shape", [LLAMA, GPT2], ids=["llama", "gpt2"])


def on_device(shape: Shape, **how: object) -> Engine:
    """An engine whose base has the bytes that the CPU's has: both quantise the same values."""
    return build(shape, QLORA, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_gpu_packs_and_unpacks_with_the_bits_of_a_cpu(dtype: torch.dtype) -> None:
    rows, shape = (4096, 1024, 1024), (6144, 1024)
    x = made(*shape)
    one, other = packed(x, rows, "cpu"), packed(x.cuda(), rows, "cuda")
    for here, there in zip(one.tensors, other.tensors, strict=True):
        assert torch.equal(here, there.cpu())
    want = dense(one, torch.empty(shape, dtype=dtype))
    assert torch.equal(want, dense(other, torch.empty(shape, dtype=dtype, device="cuda")).cpu())


@SHAPES
def test_the_training_kernel_has_the_bits_of_the_reference(shape: Shape) -> None:
    """The engine's logits, which come through Triton's kernel, change not one bit if torch's unpacks."""
    plain = on_device(shape, compute="bf16", kernels={"nf4": "torch"})
    engine = on_device(shape, compute="bf16")
    assert engine.arena.choices["nf4_unpack"] == "triton"
    assert plain.arena.choices["nf4_unpack"] == "torch"
    tokens = batch(0)[0][0]
    assert torch.equal(engine.logits(tokens), plain.logits(tokens))


@pytest.mark.parametrize("recompute", [0, 2, 3])
@SHAPES
def test_in_fp32_equals_fp64(shape: Shape, recompute: int) -> None:
    torch.set_float32_matmul_precision("highest")
    wide = build(shape, QLORA, "cpu", compute="fp64")
    want, engine = train(wide), on_device(shape, compute="fp32", recompute=recompute)
    for (loss, norm), (their_loss, their_norm) in zip(train(engine), want, strict=True):
        assert loss == pytest.approx(their_loss, rel=1e-5)
        assert norm == pytest.approx(their_norm, rel=1e-4)
    for name in engine.table.offsets:
        error = engine.grad(name).cpu().double() - wide.grad(name)
        assert error.norm() <= 2e-3 * wide.grad(name).norm(), name


@pytest.mark.parametrize("recompute", [0, 1, 3])
@SHAPES
def test_in_bf16(shape: Shape, recompute: int) -> None:
    """Near fp64; the same bits twice, and without graphs; the base unchanged; memory as planned; no allocations."""
    want = train(build(shape, QLORA, "cpu", compute="fp64"))
    engine = on_device(shape, compute="bf16", recompute=recompute)
    start = {name: engine.param(name).clone() for name in engine.names()}
    got = train(engine)
    for (loss, norm), (their_loss, their_norm) in zip(got, want, strict=True):
        assert loss == pytest.approx(their_loss, rel=2e-3)
        assert norm == pytest.approx(their_norm, rel=3e-2)
    assert got == train(on_device(shape, compute="bf16", recompute=recompute))
    other = on_device(shape, compute="bf16", recompute=recompute)
    other.graphs.clear()
    assert got == train(other)
    for name, value in start.items():
        assert torch.equal(engine.param(name), value) != is_adapter(name), name
    held = {name: buffer.untyped_storage().nbytes() for name, buffer in engine.frame.buffers.items()}
    assert held == engine.arena.sizes()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    train(engine)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    logits = engine.prefill(0, [[1, 2, 3]]).clone()
    assert torch.allclose(logits[0], engine.logits(torch.tensor([[1, 2, 3]]))[0, -1].float(), atol=0.05, rtol=0.05)
    assert engine.decode([4], [3]).isfinite().all()
