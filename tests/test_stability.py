"""z-loss in whole models: gradients are those of autograd for loss + w logsumexp(logits)^2; reported losses lack it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dist_engine
import interpreter  # noqa: F401  # before the first launch: it mends the rounding of bf16 stores
import llama_oracle
import nanochat_oracle
import oracle
import pytest
import ranks
import test_learned_rows
import torch
from test_engine import SMALL
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.models.registry import build_model
from daybreak.models.rotary import rotary
from daybreak.shapes import GPT2Config, LlamaConfig, NanochatConfig, Shape

torch.set_num_threads(1)
WEIGHT, B, T = 0.03, 2, 16
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]),
]  # fmt: skip
Made = tuple[Shape, dict[str, Tensor], Callable[[Tensor], Tensor], dict[str, Tensor]]


def of_gpt2() -> Made:
    """A shape, values, and the oracle: its logits and its leaves by name."""
    values = oracle.random_values(SMALL, 0)
    made = oracle.GPT2(SMALL).load(values)
    return GPT2Config(**SMALL._asdict()), values, made.logits, dict(made.named_parameters())


def of_llama() -> Made:
    s = llama_oracle.Decoder(tied=False, qk_norm=True)
    made = llama_oracle.Model(s, values := llama_oracle.random_values(s))
    shape = LlamaConfig(**s._asdict())
    made.freq = rotary(shape)[0]  # whose exponents are rounded to fp32
    return shape, values, made.logits, made.p


def of_nanochat() -> Made:
    s = nanochat_oracle.Nano()
    made = nanochat_oracle.Model(s, values := nanochat_oracle.random_values(s))
    shape = NanochatConfig(**s._asdict())
    made.freq = build_model(shape).constants()["freq"]
    return shape, values, made.logits, made.p


FAMILIES = {"gpt2": of_gpt2, "llama": of_llama, "nanochat": of_nanochat}


def batch(V: int) -> tuple[Tensor, Tensor]:
    """Two micro-steps (2, B, T), some targets masked, unevenly."""
    g = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(V, (2, 2, B, T), generator=g)
    targets[torch.rand(targets.shape, generator=g) < 0.3] = -1
    targets[0, 1] = -1
    return tokens, targets


def wanted(logits: Callable[[Tensor], Tensor], leaves: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Any:
    """The mean loss, and the gradients of loss + WEIGHT * logsumexp(logits)^2, both over the learned tokens."""
    z, at = logits(tokens.flatten(0, 1)), targets.flatten(0, 1)
    learned, lse = at >= 0, torch.logsumexp(z, -1)
    loss = (lse - z.gather(-1, at.clamp(min=0)[..., None])[..., 0])[learned].mean()
    more = WEIGHT * (lse[learned] ** 2).mean()
    assert more > 0.01  # so that it matters
    total = loss + more
    return loss.item(), dict(zip(leaves, torch.autograd.grad(total, tuple(leaves.values())), strict=True))


def engine_of(shape: Shape, values: dict[str, Tensor], device: str = "cpu", **options: Any) -> Engine:
    made = Engine(EngineSpec(shape, B=B, T=T, optim=OptimConfig(z_loss=WEIGHT), **options), device=device, init=False)
    made.load_params(dict(values))
    return made


def poison(made: Engine) -> None:
    for name in ("activations", "scratch"):
        made.frame.buffers[name].fill_(0xFF)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_autograd_s(family: str, device: str) -> None:
    """In fp64 on a CPU, at each level of recompute with the same bits; in fp32 on a GPU, beside the oracle in fp64."""
    shape, values, logits, leaves = FAMILIES[family]()
    tokens, targets = batch(shape.V)
    loss, grads = wanted(logits, leaves, tokens, targets)
    compute, limit = ("fp64", 1e-9) if device == "cpu" else ("fp32", 2e-5)
    first: dict[str, Tensor] = {}
    for level in range(4):
        made = engine_of(shape, values, device, compute=compute, recompute=level)
        poison(made)
        made.forward_backward(tokens, targets)
        found = {name: made.grad(name).double().cpu() for name in made.names()}
        assert made.state["loss"].item() == pytest.approx(loss, rel=limit)
        largest = max(grad.norm() for grad in grads.values())
        for name, grad in grads.items():
            small = grad.numel() == 1 or name.endswith("qkvb")  # sums that cancel, and the keys' bias, which has none
            size = largest if small else grad.norm()
            assert (found[name] - grad).norm() <= limit * size, (name, level)
        first = first or found
        assert device == "cuda" or all(torch.equal(first[name], grad) for name, grad in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_validation_and_reported_losses_are_the_cross_entropy(family: str) -> None:
    shape, values, _, _ = FAMILIES[family]()
    tokens, targets = batch(shape.V)
    plain = Engine(EngineSpec(shape, B=B, T=T), init=False)
    plain.load_params(dict(values))
    made = engine_of(shape, values)
    assert torch.equal(made.eval_losses(tokens[0], targets[0]), plain.eval_losses(tokens[0], targets[0]))
    for engine in (made, plain):
        engine.train_step(tokens, targets, lr=1e-3, step=0)
    assert made.stats()["loss"] == plain.stats()["loss"]
    assert made.stats()["norm"] != plain.stats()["norm"]


@pytest.mark.parametrize("device", DEVICES)
def test_it_holds_the_logits(device: str) -> None:
    """Of one batch that is learned by heart, logsumexp ends near 0; without z-loss it does not."""
    shape, (tokens, targets), ends = GPT2Config(**SMALL._asdict()), batch(SMALL.V), []
    for weight in (0.0, 1.0):
        made = Engine(EngineSpec(shape, B=B, T=T, optim=OptimConfig(z_loss=weight, weight_decay=0)), device=device)
        for step in range(100):
            made.train_step(tokens, targets, lr=3e-3, step=step)
        lse = torch.logsumexp(made.logits(tokens[1]).double().cpu(), -1)
        ends.append(lse[targets[1] >= 0].square().mean().item())
    assert ends[0] > 4
    assert ends[1] < 0.1


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(4)], ids=["all", "adapters"])
@pytest.mark.parametrize("name", test_learned_rows.SHAPES)
def test_packed_rows_whose_head_computes_learned_rows_alone(name: str, lora: LoraConfig) -> None:
    made = test_learned_rows.build(name, 2, 48, compute="fp64", optim=OptimConfig(z_loss=WEIGHT), lora=lora)
    plain = test_learned_rows.build(name, 2, 48, compute="fp64", lora=lora)
    for i, learned in enumerate(("every third", "a span", "none")):
        given = [test_learned_rows.rows(2, 48, x, seed=i) for x in (learned, "the last")]
        got, want = test_learned_rows.one_step(made, given), test_learned_rows.whole(made, given)
        without, largest = test_learned_rows.one_step(plain, given), max(x.abs().max() for x in want.values())
        for key, value in want.items():
            size = largest if value.numel() == 1 else value.abs().max()
            assert (got[key] - value).abs().max() <= 1e-12 * size, (key, learned)
        assert got["loss"] == without["loss"]
        assert any(not torch.equal(got[key], without[key]) for key in got)


def test_ranks_equal_one_process(tmp_path: Path) -> None:
    """Two ranks at each ZeRO stage in fp64 have the losses and norms of one."""
    jobs = [f"{zero},fp64,12,3,auto,{WEIGHT}" for zero in range(3)]
    assert ranks.finish(ranks.start(2, [tmp_path, *jobs], tmp_path, run=dist_engine.run)) == [0, 0]
    dist_engine.run(
        [
            str(tmp_path),
            f"0,fp64,12,6,auto,{WEIGHT}",
        ]
    )
    one = torch.load(tmp_path / "1-0-fp64-auto-0.pt")
    for zero in range(3):
        for rank in range(2):
            two = torch.load(tmp_path / f"2-{zero}-fp64-auto-{rank}.pt")
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-9)
            assert two["norms"] == pytest.approx(one["norms"], rel=1e-9)
