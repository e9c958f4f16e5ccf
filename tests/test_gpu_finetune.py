"""Finetuning on a CUDA device: adapters against the same engine in fp64 on the CPU, which equals PEFT's
(test_finetune_peft.py); captured graphs, equal bits, and memory as it was planned. Then packed rows, for which
attention is Triton's. Skipped where there is no device."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import recovery
import torch
from llama_oracle import Decoder
from test_gpu import decoder_values
from test_packing import make_set
from torch import Tensor

import daybreak
from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.passes import PARTS, learned_part
from daybreak.kernels import CUDA_ORDER
from daybreak.models.adapters import is_adapter
from daybreak.shapes import GPT2Config, LlamaConfig, Shape, model_config

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


# ------------------------------------------------------------------------------------------------------ packed rows

ROW = 640  # several blocks of queries and keys
SMALL = oracle.Shape(L=2, C=128, NH=2, max_T=ROW, V=1000)
DECODERS = {
    "llama": Decoder(L=2, C=256, NH=8, NKV=2, HS=64, F=384, max_T=ROW, V=1000),
    "qwen": Decoder(L=2, C=128, NH=4, NKV=4, HS=128, F=200, max_T=ROW, V=1000, qk_norm=True, qkv_bias=True),
    "gemma": Decoder(L=2, C=96, NH=4, NKV=1, HS=256, F=136, max_T=ROW, V=300, layers="wf", window=50, act="gelu",
                     window_theta=100.0, qk_norm=True, post_norms=True, norm_plus_one=True, embed_scale=True),
}  # fmt: skip
MODELS = ["gpt2", *DECODERS]


def packed(V: int, rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and positions (1, rows, ROW): documents of 1 to 300 tokens, half of their targets not learned."""
    rng, made = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (rows, ROW), generator=made)
    targets, positions = tokens.roll(-1, 1), torch.zeros(rows, ROW, dtype=torch.int64)
    for row in range(rows):
        start = 0
        while start < ROW:
            n = min(rng.choice([1, rng.randint(2, 40), rng.randint(60, 300)]), ROW - start)
            positions[row, start : start + n] = torch.arange(n)
            targets[row, start + n - 1] = -1
            targets[row, start : start + rng.randint(0, n)] = -1
            start += n
    return tokens[None], targets[None], positions[None]


def vocabulary(name: str) -> int:
    return SMALL.V if name == "gpt2" else DECODERS[name].V


def packed_engine(name: str, device: str, **how: Any) -> Engine:
    cfg: Any = GPT2Config(**SMALL._asdict()) if name == "gpt2" else LlamaConfig(**DECODERS[name]._asdict())
    made = Engine(EngineSpec(cfg, B=2, T=ROW, documents=True, **how), device=device, init=False)
    values = oracle.random_values(SMALL, 1) if name == "gpt2" else decoder_values(DECODERS[name])
    for key, x in values.items():
        made.set_exact(key, x.bfloat16().double())
    for i, key in enumerate(name for name in made.names() if is_adapter(name)):
        drawn = torch.randn(made.param(key).shape, generator=torch.Generator().manual_seed(i))
        made.set_exact(key, 0.05 * drawn.bfloat16().double())
    return made


def results(made: Engine, given: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Gradients, and per-token losses, in fp64 on the host."""
    made.forward_backward(*given)
    found = {name: made.grad(name).double().cpu() for name in made.names()}
    return found | {"losses": made.eval_losses(*(x[0] for x in given)).double().cpu().clone()}


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_fp64_on_a_cpu(name: str) -> None:
    """fp32 to rounding. In bf16 a kind of parameter errs at most 1.5 times as much as with plain-torch kernels."""
    given = packed(vocabulary(name))
    want = results(packed_engine(name, "cpu", compute="fp64"), given)
    found: dict[str, dict[str, float]] = {}
    plain = dict.fromkeys(CUDA_ORDER, "torch")
    for kind, compute, kernels in (("fp32", "fp32", {}), ("bf16", "bf16", {}), ("plain", "bf16", plain)):
        made = packed_engine(name, "cuda", compute=compute, recompute=2, kernels=kernels)
        assert kind == "plain" or made.arena.choices["attention_backward"] == "triton"
        errors: dict[str, list[float]] = {}
        for key, value in results(made, given).items():
            error = (value - want[key]).norm() / want[key].norm()
            errors.setdefault(key.rsplit(".", 1)[-1], []).append(error.item())
        found[kind] = {key: max(values) for key, values in errors.items()}
    assert max(found["fp32"].values()) < 2e-5
    assert {k: (x, found["plain"][k]) for k, x in found["bf16"].items() if x > 1.5 * found["plain"][k]} == {}


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_train_with_the_same_bits_twice(name: str) -> None:
    """Through graphs, with other documents in every step; and a graph computes what plain calls do."""
    engines = [packed_engine(name, "cuda", compute="bf16") for _ in range(3)]
    engines[2].graphs.clear()
    for step in range(4):
        for made in engines:
            made.train_step(*packed(vocabulary(name), seed=step), lr=1e-3, step=step)
    assert engines[0].stats()["loss"] < 20
    for key in engines[0].names():
        assert torch.equal(engines[0].param(key), engines[1].param(key)), key
        assert torch.equal(engines[0].param(key), engines[2].param(key)), key


def masked(V: int, part: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same with spans of targets that are learned, for which the head computes this many eighths of the rows."""
    tokens, _, positions = packed(V, seed=seed)
    n, targets = tokens.numel(), tokens.roll(-1, 2).view(-1)
    learned = torch.arange(n) % 80 < 10 * part
    learned[n - 5 :] = False
    targets[~learned] = -1
    return tokens, targets.view(tokens.shape), positions


def all_rows(targets: Any, at: Any) -> int:
    """In place of `learned_part`: the head computes all rows, and is given no places."""
    at.fill(1 << 30)
    return PARTS


HEADS = {"gpt2": {}, "llama": {}, "adapters": {"lora": LoraConfig(8)}, "recompute": {"recompute": 3}}


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize(("compute", "limit"), [("fp32", 4e-5), ("bf16", 2e-2)])
def test_a_head_of_learned_rows_equals_that_of_all(how: str, compute: str, limit: float) -> None:
    """For each number of eighths: loss and gradients of two micro-steps, from graphs. What one leaves is NaN."""
    name = how if how in MODELS else "llama"
    made = packed_engine(name, "cuda", compute=compute, **HEADS[how])
    assert {key[2] for key in made.graphs._graphs if key[0] == "head"} == {*range(1, PARTS + 1)}  # type: ignore[index]
    for part in range(1, PARTS + 1):
        batches = [masked(vocabulary(name), part, seed=1), masked(vocabulary(name), PARTS + 1 - part, seed=2)]
        found = []
        for choice in (learned_part, all_rows):
            with patch("daybreak.engine.step.learned_part", side_effect=choice) as chosen:
                made.begin_step(lr=0.0, step=0, valid=sum(int((y >= 0).sum()) for _, y, _ in batches))
                for i, (tokens, targets, positions) in enumerate(batches):
                    made.frame.buffers["activations"].fill_(0xFF)
                    made.micro_step(tokens[0], targets[0], positions[0], first=not i)
            assert chosen.call_count == 2
            grads = {key: made.grad(key).double() for key in made.table.offsets}
            found.append(grads | {"loss": made.state["loss"].clone()})
        for i, (_, targets, _) in enumerate(batches):
            n, k = targets.numel(), int((targets >= 0).sum())
            assert -(-PARTS * k // n) == (part, PARTS + 1 - part)[i]
        assert found[0]["loss"].item() == pytest.approx(found[1]["loss"].item(), rel=1e-5)
        for key, want in found[1].items():
            assert (found[0][key] - want).norm() <= limit * want.norm(), (part, key)


@pytest.mark.parametrize("how", HEADS)
def test_no_number_of_rows_allocates(how: str) -> None:
    """After the first step, and the same bits from plain calls."""
    name = how if how in MODELS else "llama"
    engines = [packed_engine(name, "cuda", compute="bf16", **HEADS[how]) for _ in range(2)]
    engines[1].graphs.clear()
    made = engines[0]
    allocated = {key: buffer.untyped_storage().nbytes() for key, buffer in made.frame.buffers.items()}
    assert allocated == made.arena.sizes()
    made.train_step(*masked(vocabulary(name), 3), lr=1e-3, step=0)
    made.stats()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for i in range(1, 2 * PARTS + 1):
        made.train_step(*masked(vocabulary(name), (3 * i) % PARTS + 1, seed=i), lr=1e-3, step=i)
        made.stats()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    engines[1].train_step(*masked(vocabulary(name), 3), lr=1e-3, step=0)
    for i in range(1, 2 * PARTS + 1):
        engines[1].train_step(*masked(vocabulary(name), (3 * i) % PARTS + 1, seed=i), lr=1e-3, step=i)
    assert all(torch.equal(made.param(key), engines[1].param(key)) for key in made.table.offsets)


def test_a_killed_run_on_packed_rows_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Real processes, one of them killed inside its second save."""
    shards = make_set(tmp_path / "shards")
    values = {"run__device": "cuda", "run__steps": 30, "model__C": 64, "precision__compute": "bf16"}
    values |= {"batch__total_tokens": 64}
    code, err = recovery.train([recovery.recipe(recovery.config(shards, tmp_path, "straight", **values), tmp_path)])
    assert code == 0, err
    killed = recovery.recipe(recovery.config(shards, tmp_path, "killed", **values), tmp_path)
    code, _ = recovery.train([killed], {"do": "kill", "at": "after:daybreak.state.checkpoint:_write_manifest", "n": 2})
    assert code == -9
    code, err = recovery.train([tmp_path / "killed"])
    assert code == 0, err
    recovery.assert_same(daybreak.Run(tmp_path / "straight"), daybreak.Run(tmp_path / "killed"))
