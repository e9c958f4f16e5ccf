"""Training the decoder family with its blocks' matmuls in fp8, on the CPU: what test_fp8.py asks of GPT-2.

test_ranks_and_stages_agree there is of both families.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from llama_oracle import Decoder, random_values
from snapshots import facts
from test_fp8 import LLAMA, B, T, bits, chain, engine_of, slot
from test_llama import CASES, OWN, apart, oracle_of, shape, tokens_of

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.scales import HISTORY, SATURATED, SCALE
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, snapshot

LAYERS = ("qkv", "attproj", "gateup", "fcproj")


def errors(s: Decoder, compute: str) -> tuple[Engine, float, dict[str, float]]:
    """One step of two micro-steps beside the oracle in fp64: the engine, its loss less the oracle's, and how far each
    gradient is from the oracle's. Weights are half as large as random_values has them, so that softmax is not steep."""
    values = {name: x if x.dim() == 1 else x / 2 for name, x in random_values(s).items()}
    engine = Engine(EngineSpec(shape(s), B=2, T=16, compute=compute, recompute=2), init=False)
    engine.load_params(values)
    engine.frame.buffers["activations"].fill_(0xFF)
    tokens, targets = tokens_of(s, 2, 2, 2, 16)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -1
    loss, grads = oracle_of(s, values).gradients(tokens, targets)
    engine.train_step(tokens, targets, lr=0.0, step=0)
    return engine, engine.stats()["loss"] - loss, {name: apart(engine.grad(name), x) for name, x in grads.items()}


@pytest.mark.parametrize("case", ["qwen2", "llama untied with biases", "qwen3", "gemma3"])
def test_gradients(case: str) -> None:
    """The step between numbers of bf16 is 1/128 of them at the most, that of e4m3 1/8, and that of e5m2 1/4. So no
    error of rounding is above 32 times that of bf16, and no gradient is further off than 32 times as far as in bf16.

    Without other norms than RMSNorm's two, a layer's chain has five products, as the gate multiplies two. Their errors
    are independent, as in test_fp8.py: together sqrt(5 L (5.7^2 + 3.7^2)) percent."""
    s = CASES[case][2]
    engine, loss, found = errors(s, "fp8")
    _, _, bf16 = errors(s, "bf16")
    assert abs(loss) < 0.02
    assert not engine.state[SATURATED].any()
    bound = 0.01 * math.sqrt(5 * s.L * (5.7**2 + 3.7**2))
    for name, error in found.items():
        assert error < 32 * bf16[name], name
        assert error < bound or s.qk_norm, name
    matrices = {f"h.{l}.{layer}w" for l in range(s.L) for layer in LAYERS}
    assert all(found[name] > 0.02 for name in matrices), "some layer is not in fp8"
    assert set(engine.training.weight_operands) == matrices
    norms = {f"h.{l}.{norm}" for l in range(s.L) for norm in ("ln1", "ln2")}
    assert set(engine.training.slots.norms) == norms
    for name in norms:  # static: sqrt(C) times the largest weight
        weight = engine.param(name + "w").float() + s.norm_plus_one
        bound = math.sqrt(s.C) * weight.abs().max().item() / 448
        assert bound <= engine.state[SCALE][slot(engine, name), 0].item() < 2.001 * bound


def test_recomputation_changes_no_bit() -> None:
    """Post-norms, all biases, windows and a layer without positions."""
    found = []
    for recompute in range(4):
        engine = engine_of(shape(OWN["post-norms and all biases"]), recompute=recompute)
        engine.frame.buffers["activations"].fill_(0xFF)
        for step in range(2):
            engine.train_step(*chain(step), lr=1e-2, step=step)
        found.append(bits(engine))
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


def test_overfits_one_batch() -> None:
    engine = engine_of(LLAMA, optim=OptimConfig(weight_decay=0.0))
    for step in range(60):
        engine.train_step(*chain(0, 1), lr=1e-2, step=step)
    assert engine.stats()["loss"] < 0.72  # the chain's own is log 2 = 0.69, for tokens that occur twice


def test_evaluation_is_in_bf16() -> None:
    """The same weights give the same bits as in an engine of bf16, before and after steps in the same memory."""
    fp8, bf16 = engine_of(LLAMA), engine_of(LLAMA, compute="bf16")
    for step in range(2):
        fp8.train_step(*chain(step), lr=1e-2, step=step)
        bf16.load_params({name: fp8.param(name) for name in fp8.names()})
        tokens, targets = (x[0] for x in chain(9))
        for call in (
            lambda e, x=tokens, y=targets: e.eval_losses(x, y),
            lambda e, x=tokens: e.logits(x[:2, :7]),
            lambda e: e.prefill(0, [[1, 2, 3]]),
            lambda e: e.decode([4], [3]),
        ):
            assert torch.equal(call(fp8).clone(), call(bf16).clone())


def test_a_run_resumes_with_equal_bits_in_fp8_and_after_it(tmp_path: Path) -> None:
    """Five steps, the last two in bf16. Checkpoints of step 2, in fp8, and of step 4, behind the switch, give the same
    end. Then the switch is at the same step: after it no step enters the history of fp8's scales."""
    engine, paths = engine_of(LLAMA, fp8_steps=3), {}
    for step in range(5):
        if step in (2, 4):
            paths[step] = save_checkpoint(tmp_path / "run" / "checkpoints", snapshot(engine, step, facts(engine)))
        engine.train_step(*chain(step), lr=1e-2, step=step)
        assert engine.state[HISTORY].any(1).sum() == min(step + 1, 3)
    whole = engine_of(LLAMA)
    for first, path in paths.items():
        other = Engine(EngineSpec(LLAMA, B=B, T=T, compute="fp8", fp8_steps=3), init=False)
        restore(other, load_checkpoint(path))
        for step in range(first, 5):
            other.train_step(*chain(step), lr=1e-2, step=step)
        assert all(torch.equal(x, bits(other)[name]) for name, x in bits(engine).items()), first
    restore(whole, load_checkpoint(paths[2]))
    for step in range(2, 5):
        whole.train_step(*chain(step), lr=1e-2, step=step)
    assert not torch.equal(whole.state["weights"], engine.state["weights"])


def test_the_plan_counts_what_training_uses() -> None:
    """Two bytes for each weight of a block; matrices that only matmuls read have one byte, in the layouts that somebody
    reads; evaluation's tensors in bf16, and those of the last steps, are in it too."""
    spec = EngineSpec(LLAMA, B=B, T=T, compute="fp8")
    fp8, part, evaluated = (
        {e.name: e for e in plan_engine(EngineSpec(LLAMA, **{"B": B, "T": T, **how}))[2].entries}
        for how in ({"compute": "fp8"}, {"compute": "fp8", "fp8_steps": 1}, {"compute": "bf16", "train": False})
    )
    n, c = B * T, LLAMA
    W = (c.NH + 2 * c.NKV) * c.HS
    block = W * c.C + c.C * c.NH * c.HS + 3 * c.C * c.F
    assert sum(e.nbytes for e in fp8.values() if e.buffer == "operands") == 2 * c.L * block
    assert {name for name, e in evaluated.items() if e.buffer == "activations"} <= fp8.keys()
    sizes = {"ln1": c.C, "d_qkv": W, "att": c.NH * c.HS, "d_residual2": c.C}
    sizes |= {"ln2": c.C, "d_gateup": 2 * c.F, "swiglu": c.F, "d_residual3": c.C}
    for l in range(c.L):
        for name, width in sizes.items():
            value, other = (fp8[f"h.{l}.{name}.{part}"] for part in ("value", "transposed"))
            assert (value.shape, other.shape) == ((n, width), (width, n))
            assert value.nbytes == other.nbytes == n * width
    bf16 = {"h.0.ln1", "h.0.swiglu"}  # what training in bf16 keeps, and evaluation does not
    assert bf16 <= part.keys() & evaluated.keys()
    assert all(part[name].last > fp8[name].last for name in bf16), "the last steps keep these for backward"
    assert plan_engine(spec)[0].matmuls.keys() == {layer + "w" for layer in LAYERS}
