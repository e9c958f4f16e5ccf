"""nanochat's family on a CUDA device: its kernels, and a model by every backend beside the CPU's reference.

Skipped where there is no such device. The kernels alone are in test_kernel_nanochat.py, which runs there too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from nanochat_oracle import Model, Nano, random_values
from test_nanochat import apart, shape, small_gradients, together, tokens_of
from torch import Tensor

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.shapes import NanochatConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDE = Nano(L=4, C=512, NH=4, max_T=512, V=1000, window=129)
B, T = 4, 512
OPTIM = OptimConfig(name="muon", lr=0.004, muon_warmup=2, clip=0)
OURS = ("mix_norm_forward", "mix_norm_backward", "mix_backward", "mix_add", "rope_norm_forward", "rope_norm_backward",
        "relu2_backward", "smear_backward", "smear_decode", "value_backward", "cap_logits", "classifier")  # fmt: skip


def values_of(s: Nano) -> dict[str, Tensor]:
    """The oracle's, but so small that logits and gates are those of a model that trains."""
    return {
        name: x / 8 if name.endswith(("w", "headw")) and x.dim() == 2 else x for name, x in random_values(s).items()
    }


def engine_of(s: Nano, device: str = "cuda", **options: Any) -> Engine:
    how = {"compute": "bf16", "optim": OPTIM, **options}
    made = Engine(EngineSpec(shape(s), B=B, T=T, **how), device=device)
    made.load_params(values_of(s))
    return made


def batch(s: Nano, seed: int) -> tuple[Tensor, Tensor]:
    tokens = tokens_of(s, 1, B, T + 1, seed=seed)
    return tokens[..., :-1], tokens[..., 1:]


@pytest.mark.parametrize("attention", ["auto", "triton"])
def test_losses_and_gradients_are_those_of_the_formulas(attention: str) -> None:
    """In bf16 no kind of parameter errs more than 1.2 times as much as autograd in bf16 does on this device."""
    tokens, targets = batch(WIDE, 0)
    oracle = Model(WIDE, values_of(WIDE), torch.float32)
    loss, grads = oracle.gradients(tokens[0], targets[0])
    rounded = Model(WIDE, values_of(WIDE), torch.bfloat16).gradients(tokens[0], targets[0])[1]
    engine = engine_of(WIDE, kernels={"attention": attention})
    assert {engine.frame.k.choices[name] for name in OURS} == {"triton"}
    engine.forward_backward(tokens, targets)
    assert engine.state["loss"].item() == pytest.approx(loss, rel=2e-3)
    got, theirs, want = (together(x) for x in ({n: engine.grad(n).cpu() for n in grads}, rounded, grads))
    errors: dict[str, list[float]] = {}
    for name, grad in want.items():
        kind = errors.setdefault(name.rpartition(".")[2], [0.0, 0.0])
        kind[:] = (max(kind[i], apart(x[name], grad)) for i, x in enumerate((got, theirs)))
    assert {kind: e for kind, e in errors.items() if e[0] > 1.2 * e[1]} == {}


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
def test_training_follows_the_cpu(recompute: int) -> None:
    """Four updates by Muon and the groups' AdamW, captured as graphs, beside the CPU's reference in fp32."""
    engines = [engine_of(WIDE, recompute=recompute), engine_of(WIDE, "cpu", compute="fp32")]
    losses: list[list[float]] = [[], []]
    for step in range(4):
        tokens, targets = batch(WIDE, step)
        for engine, found in zip(engines, losses, strict=True):
            engine.train_step(tokens, targets, lr=0.004, step=step)
            found.append(engine.stats()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
def test_the_same_bits_twice_and_at_every_level_of_recompute(compute: str) -> None:
    if compute == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 here")
    runs = []
    for recompute in (0, 0, 1, 2, 3):
        engine = engine_of(WIDE, recompute=recompute, compute=compute)
        for step in range(3):
            engine.train_step(*batch(WIDE, step), lr=0.004, step=step)
        runs.append((engine.stats()["loss"], {name: engine.param(name).clone() for name in engine.names()}))
        del engine
    for loss, params in runs[1:4] if compute == "fp8" else runs[1:]:
        assert loss == runs[0][0]
        assert [name for name, x in params.items() if not torch.equal(x, runs[0][1][name])] == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_gradients_of_scalars_keep_their_size(seed: int) -> None:
    """As on a CPU: see test_nanochat.py."""
    kept = small_gradients(seed, "cuda")
    assert 0.5 < kept["x0"] < 1.1
    assert 0.85 < kept["backout"] < 1.15


def test_decoding_is_near_the_whole_text() -> None:
    """Three rows and one, from prefill to the last place, as bf16 allows."""
    s = replace_length(WIDE, 64)
    engine = Engine(EngineSpec(s, B=3, T=64, compute="bf16", rows=3, train=False), device="cuda")
    engine.load_params(values_of(WIDE))
    texts = [tokens_of(WIDE, 64, seed=i).tolist() for i in range(3)]
    want = engine.logits(torch.tensor(texts)).float().clone()
    engine.prefill(0, [text[:40] for text in texts])
    for place in range(40, 64):
        got = engine.decode([text[place] for text in texts], [place] * 3)
        assert apart(got.cpu(), want[:, place].cpu()) < 0.02, place
    engine.prefill(0, [texts[0][:40]])
    assert apart(engine.decode([texts[0][40]], [40])[0].cpu(), want[0, 40].cpu()) < 0.02


def replace_length(s: Nano, longest: int) -> NanochatConfig:
    return replace(shape(s), max_T=longest)


@pytest.mark.parametrize("masters", ["split", "fp32"])
def test_scalars_are_read_exactly_after_captured_steps(masters: str) -> None:
    """As weights and master weights have them, in fp32, and at the places that the graphs know."""
    engine = engine_of(WIDE, masters=masters)
    places = {name: x.data_ptr() for name, x in engine.frame.wide.items()}
    for step in range(3):
        engine.train_step(*batch(WIDE, step), lr=0.004, step=step)
        for name in places:
            assert torch.equal(engine.frame.w(name), next(iter(engine.exact_parts(name)))[1]), name
    assert sum(not torch.equal(x, x.bfloat16().float()) for x in engine.frame.wide.values()) > 4
    assert {name: engine.frame.w(name).data_ptr() for name in places} == places
