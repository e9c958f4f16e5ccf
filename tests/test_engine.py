"""Proof that the hand-written schedule computes GPT-2: logits, losses, every gradient and the optimizer, held against
an independent autograd model in fp64, and against finite differences. Recorded runs are in test_replay.py.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from oracle import GPT2, AdamW, Shape, initial_values, learning_rate, random_values
from snapshots import exact_weight
from torch import Tensor

import daybreak.models.head as head
from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.params import draw_parameters
from daybreak.models.registry import build_model
from daybreak.shapes import GPT2Config, parse_shape

torch.set_num_threads(1)
SMALL = Shape(L=2, C=64, NH=4, max_T=32, V=61)
# (shape, A micro-steps, B, T): T below max_T, one row, odd sizes, V just under and just over a multiple of 128.
CASES = [
    (SMALL, 1, 2, 16),
    (Shape(3, 64, 8, 32, 300), 4, 1, 32),
    (Shape(2, 24, 3, 8, 127), 1, 3, 7),
    (Shape(1, 48, 6, 9, 129), 4, 2, 5),
]
each_case = pytest.mark.parametrize(("shape", "A", "B", "T"), CASES, ids=["small", "one-row", "odd", "accumulate"])


def build(shape: Shape, B: int, T: int, **options) -> Engine:
    outside = {key: options.pop(key) for key in ("seed", "init") if key in options}
    return Engine(EngineSpec(GPT2Config(**shape._asdict()), B=B, T=T, **options), **outside)


def calls(engine: Engine) -> list[str]:
    """Names of the kernel calls of one micro-step and update, in order."""
    return [call.name for call in engine.arena.calls]


def pair(shape: Shape, B: int, T: int, dtype: torch.dtype = torch.float64, seed: int = 0, **options):
    """An engine and an oracle (in `dtype`) with the same random weights; the engine's memory is full of NaN."""
    engine, values = build(shape, B, T, **options), random_values(shape, seed)
    engine.load_params(values)
    for name in ("activations", "scratch"):
        engine.frame.buffers[name].fill_(0xFF)
    for name in engine.names():
        engine.grad(name).fill_(math.nan)
    return engine, GPT2(shape, dtype).load(values)


def batch(shape: Shape, A: int, B: int, T: int, seed: int = 0, ignored: bool = False) -> tuple[Tensor, Tensor]:
    """Random tokens and targets (A, B, T)."""
    g = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(shape.V, (2, A, B, T), generator=g)
    if ignored:  # unevenly, so that micro-steps count differently; one whole row
        targets[torch.rand(A, B, T, generator=g) < 0.3] = -1
        targets[0, -1] = -1
    return tokens, targets


def pieces(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, qkvb cut into Q, K and V."""
    out = {}
    for name, x in values.items():
        cut = zip("QKV", x.chunk(3), strict=True) if name.endswith("qkvb") else [("", x)]
        out |= {name + letter: part.to(torch.float64) for letter, part in cut}
    return out


def yardstick(name: str) -> str:
    """The tensor whose size errors of `name` are relative to: itself, but for the key bias. That one shifts all scores
    of a query alike, which softmax ignores, so its true gradient is zero; it is measured against the query bias."""
    return name.replace("qkvbK", "qkvbQ")


def check_close(got: dict[str, Tensor], want: dict[str, Tensor], by_norm: float, by_element: float) -> None:
    """Every tensor: error norm within `by_norm` of its norm, every element within `by_element` of its largest."""
    got, want = pieces(got), pieces(want)
    assert got.keys() == want.keys()
    for name, x in got.items():
        error, scale = x - want[name], want[yardstick(name)]
        assert error.norm() <= by_norm * scale.norm(), f"{name}: {(error.norm() / scale.norm()).item():.2e}"
        assert error.abs().max() <= by_element * scale.abs().max(), name


def gradients(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.grad(name) for name in engine.names()}


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: exact_weight(engine, name) for name in engine.names()}


def everything(engine: Engine) -> bytes:
    """The bits of weights, masters and moments."""
    names = ("weights", "masters", "m", "v")
    return b"".join(engine.state[n].view(torch.uint8).numpy().tobytes() for n in names if n in engine.state)


def step_loss(engine: Engine) -> float:
    return engine.state["loss"].item()


# --- against the oracle


@each_case
@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
@pytest.mark.parametrize(("compute", "by_norm", "by_element"), [("fp32", 1e-5, 1e-4), ("fp64", 1e-12, 1e-11)])
@pytest.mark.parametrize("ignored", [False, True], ids=["all targets", "some ignored"])
def test_loss_and_every_gradient(shape, A, B, T, recompute, compute, by_norm, by_element, ignored):
    engine, oracle = pair(shape, B, T, compute=compute, recompute=recompute)
    tokens, targets = batch(shape, A, B, T, ignored=ignored)
    loss, grads = oracle.gradients(tokens, targets)
    engine.forward_backward(tokens, targets)
    assert step_loss(engine) == pytest.approx(loss, rel=by_norm)
    check_close(gradients(engine), grads, by_norm, by_element)


@each_case
@pytest.mark.parametrize(("compute", "limit"), [("fp32", 1e-5), ("fp64", 1e-12)])
def test_logits_and_token_losses(shape, A, B, T, compute, limit):
    engine, oracle = pair(shape, B, T, compute=compute)
    tokens, targets = (x[0] for x in batch(shape, A, B, T, ignored=True))
    logits, losses = oracle.logits(tokens).detach(), oracle.losses(tokens, targets).detach()
    check_close({"logits": engine.logits(tokens)}, {"logits": logits}, limit, limit)
    got = engine.eval_losses(tokens, targets)
    check_close({"losses": got}, {"losses": losses}, limit, limit)
    assert (got[targets == -1] == 0).all()
    b, t = max(1, B - 1), T - 2  # fewer rows and columns than the engine was built for
    check_close({"logits": engine.logits(tokens[:b, :t])}, {"logits": logits[:b, :t]}, limit, limit)
    check_close({"l": engine.eval_losses(tokens[:b, :t], targets[:b, :t])}, {"l": losses[:b, :t]}, limit, limit)


def test_head_in_chunks(monkeypatch):
    """Logits that do not fit one chunk, the last chunk shorter than the others."""
    monkeypatch.setattr(head, "HEAD_BYTES", {"cpu": 8 * SMALL.Vp * 4})
    engine, oracle = pair(SMALL, 3, 7)
    assert calls(engine).count("classifier") == 3
    tokens, targets = batch(SMALL, 2, 3, 7, ignored=True)
    loss, grads = oracle.gradients(tokens, targets)
    engine.forward_backward(tokens, targets)
    assert step_loss(engine) == pytest.approx(loss, rel=1e-5)
    check_close(gradients(engine), grads, 1e-5, 1e-4)
    logits = oracle.logits(tokens[0]).detach()
    check_close({"logits": engine.logits(tokens[0])}, {"logits": logits}, 1e-5, 1e-5)


def test_bf16_is_as_exact_as_bf16_autograd():
    """Against fp64, the bf16 engine errs at most 1.5 times as much as the bf16 oracle, tensor kind by tensor kind."""
    ours, theirs = Counter(), Counter()
    for seed in range(4):
        engine, oracle = pair(SMALL, 4, 32, seed=seed, compute="bf16")
        rounded = GPT2(SMALL, torch.bfloat16).load(random_values(SMALL, seed))
        tokens, targets = batch(SMALL, 1, 4, 32, seed)
        want = pieces(oracle.gradients(tokens, targets)[1])
        reference = pieces(rounded.gradients(tokens, targets)[1])
        engine.forward_backward(tokens, targets)
        got = pieces(gradients(engine))
        for model, out in ((oracle, want), (rounded, reference)):
            out["logits"] = model.logits(tokens[0]).detach().to(torch.float64)
            out["losses"] = model.losses(tokens[0], targets[0]).detach().to(torch.float64)
        got["logits"] = engine.logits(tokens[0]).to(torch.float64)
        got["losses"] = engine.eval_losses(tokens[0], targets[0]).to(torch.float64)
        for name in want:
            kind, twin = name.rpartition(".")[2], yardstick(name)
            ours[kind] += ((got[name] - want[name]).norm() / want[twin].norm()).item() ** 2
            theirs[kind] += ((reference[twin] - want[twin]).norm() / want[twin].norm()).item() ** 2
    worse = {kind: math.sqrt(ours[kind] / theirs[kind]) for kind in ours}
    assert max(worse.values()) <= 1.5, worse
    assert max(theirs.values()) < 0.01, theirs  # the budget itself is a small one


@pytest.mark.parametrize(("clip", "clipped"), [(0.5, True), (100.0, False)])
@pytest.mark.parametrize(("compute", "limit"), [("fp32", 5e-5), ("fp64", 1e-12)])
def test_ten_optimizer_steps(clip, clipped, compute, limit):
    engine, oracle = pair(SMALL, 2, 16, compute=compute, optim=OptimConfig(clip=clip))
    start = {name: x.clone() for name, x in weights(engine).items()}
    params = {name: p.data for name, p in oracle.named_parameters()}
    optimizer = AdamW(params, clip=clip)
    for step in range(10):
        lr = learning_rate("cosine", step, peak=3e-3, warmup=3, horizon=12, final=0.1)
        tokens, targets = batch(SMALL, 2, 2, 16, seed=step)
        loss, grads = oracle.gradients(tokens, targets)
        norm = optimizer.step(grads, lr, step)
        engine.train_step(tokens, targets, lr=lr, step=step)
        stats = engine.stats()
        assert (norm > clip) is clipped
        assert stats["skip"] == 0
        assert stats["loss"] == pytest.approx(loss, rel=limit / 50)
        assert stats["norm"] == pytest.approx(norm, rel=limit / 10)
    change = pieces({name: x - start[name] for name, x in weights(engine).items()})
    wanted = pieces({name: x - start[name] for name, x in params.items()})
    for name, x in change.items():
        if not name.endswith("qkvbK"):  # its true gradient is zero, and Adam makes steps of the rounding noise
            assert (x - wanted[name]).norm() <= limit * wanted[name].norm(), name


def test_finite_differences():
    """The gradient is the slope of the engine's own loss: central differences on 20 elements of every tensor kind."""
    shape, B, T = Shape(2, 16, 2, 6, 11), 2, 5
    engine, _ = pair(shape, B, T, compute="fp64")
    tokens, targets = batch(shape, 1, B, T, ignored=True)
    engine.forward_backward(tokens, targets)
    grads = {name: engine.grad(name).clone() for name in engine.names()}
    valid, rng = int((targets >= 0).sum()), np.random.Generator(np.random.PCG64(7))

    def loss() -> float:
        return engine.eval_losses(tokens[0], targets[0]).sum().item() / valid

    by_kind: dict[str, list[str]] = {}
    for name in engine.names():
        by_kind.setdefault(name.rpartition(".")[2], []).append(name)
    assert len(by_kind) == 16
    for names in by_kind.values():
        for _ in range(20):
            name = names[rng.integers(len(names))]
            weight = engine.param(name).view(-1)
            i = int(rng.integers(shape.V * shape.C if name == "wte" else weight.numel()))
            value, h = weight[i].item(), 1e-4
            weight[i] = value + h
            above = loss()
            weight[i] = value - h
            slope = (above - loss()) / (2 * h)
            weight[i] = value
            assert slope == pytest.approx(grads[name].view(-1)[i].item(), rel=1e-5, abs=1e-8), (name, i)


# --- training


def test_overfits_one_batch():
    engine = build(SMALL, 2, 16, optim=OptimConfig(weight_decay=0.0))
    tokens, targets = batch(SMALL, 1, 2, 16)
    for step in range(60):
        engine.train_step(tokens, targets, lr=1e-2, step=step)
    assert step_loss(engine) < 0.05


def test_never_calls_autograd(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(Tensor, "backward", refuse)
    with pytest.raises(AssertionError):
        torch.ones(1, requires_grad=True).sum().backward()
    engine = build(SMALL, 2, 16)
    assert not any(engine.param(name).requires_grad for name in engine.names())
    losses = []
    for step in range(5):
        engine.train_step(*batch(SMALL, 2, 2, 16), lr=1e-3, step=step)
        losses.append(step_loss(engine))
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_vocabulary_padding_stays_zero(compute):
    engine = build(SMALL, 2, 16, compute=compute)
    for step in range(5):
        engine.train_step(*batch(SMALL, 2, 2, 16, step), lr=1e-2, step=step)
    moments = [engine.table.view(engine.state[name], "wte") for name in ("m", "v")]
    for x in (engine.param("wte"), exact_weight(engine, "wte"), engine.grad("wte"), *moments):
        assert x.shape == (128, SMALL.C)
        assert x[: SMALL.V].any(1).all()
        assert not x[SMALL.V :].any()


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_recompute_changes_memory_and_not_one_bit(compute):
    engines = [build(SMALL, 2, 16, compute=compute, recompute=level) for level in (0, 1, 2, 3)]
    for step in range(3):
        for engine in engines:
            engine.train_step(*batch(SMALL, 2, 2, 16, step), lr=1e-2, step=step)
    assert len({everything(engine) for engine in engines}) == 1
    assert len({engine.state["grads"].view(torch.uint8).numpy().tobytes() for engine in engines}) == 1
    counts = [Counter(calls(engine)) for engine in engines]
    assert [c["matmul_gelu_forward"] for c in counts] == [2, 2, 2, 4]
    assert [c["layernorm_forward"] for c in counts] == [5, 5, 5, 9]
    sizes = [engine.arena.sizes()["activations"] for engine in engines]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_same_seed_same_bits(compute):
    def train(seed: int, look: bool = False) -> bytes:
        engine = build(SMALL, 2, 16, compute=compute, seed=seed)
        for step in range(4):
            engine.train_step(*batch(SMALL, 2, 2, 16, step), lr=1e-2, step=step)
            if look:  # evaluation and sampling between steps leave no trace
                tokens, targets = batch(SMALL, 1, 2, 16, 99)
                engine.eval_losses(tokens[0], targets[0])
                engine.logits(tokens[0, :1, :5])
        return everything(engine) + engine.state["stats"].numpy().tobytes()

    assert train(1) == train(1) == train(1, look=True)
    assert train(1) != train(2)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_skipped_update_touches_nothing(compute, poison, where):
    """...bit for bit, and the steps around it are those of an optimizer that saw no such step but counted it."""
    engine, twin = (build(SMALL, 2, 16, compute=compute) for _ in range(2))
    batches = [batch(SMALL, 1, 2, 16, step) for step in range(3)]
    for e in (engine, twin):
        e.train_step(*batches[0], lr=1e-2, step=0)
        assert e.stats()["skip"] == 0

    engine.begin_step(lr=1e-2, step=1, valid=32)
    value = engine.param("lnfb")[3].item()
    if where == "weight":
        engine.param("lnfb")[3] = poison
    engine.forward_backward(*batches[1])
    if where == "gradient":
        engine.grad("h.1.fcb")[5] = poison
    before = everything(engine)
    engine.update()
    assert engine.stats()["skip"] == 1
    assert everything(engine) == before
    engine.param("lnfb")[3] = value

    for e in (engine, twin):
        e.train_step(*batches[2], lr=1e-2, step=2)
        assert e.stats()["skip"] == 0
    assert everything(engine) == everything(twin)


# --- initial weights


def test_parameters_and_initial_weights():
    for shape, *_ in CASES:
        exact = build(shape, 1, 4, seed=42)
        assert {name: tuple(exact.param(name).shape) for name in exact.names()} == shape.parameters()
        rounded = build(shape, 1, 4, seed=42, compute="bf16")
        for name, want in initial_values(shape, 42).items():
            assert torch.equal(exact_weight(exact, name), want), name
            nearest = (want.bfloat16() - want).abs()  # two values of bf16 can be as near
            assert ((rounded.param(name) - want).abs() <= nearest).all(), name
            assert torch.equal(exact_weight(rounded, name), want), (
                name
            )  # llm.c's masters start from the rounded weights


def test_the_first_update_reaches_bf16_weights_on_average():
    """It is lr against the gradient's sign: 1e-5, a twelfth of the last place of a weight of 0.02. Where masters start
    from rounded weights, it reaches none that large."""
    engine = build(SMALL, 2, 16, compute="bf16")
    before = engine.param("h.0.qkvw").double()
    tokens, targets = batch(SMALL, 1, 2, 16)
    engine.train_step(tokens, targets, lr=1e-5, step=0)
    moved = (engine.param("h.0.qkvw").double() - before) * -engine.grad("h.0.qkvw").double().sign()
    large = (before.abs() > 1 / 128) & (before.abs() < 1 / 16)  # 61 % of them
    assert moved[large].mean().item() == pytest.approx(1e-5, rel=0.15)


LLMC_FIRST = {  # llm.c's own first weights of GPT-2 124M, seed 42, before they are rounded to bf16
    "wte": [0.0385382995, 0.0297456831, 0.0180143435, -0.0421104282],
    "wpe": [-0.00916235521, -0.018614769, -0.0294702277, -0.00321658584],
    "h.0.qkvw": [-0.0045566773, 0.00723999506, 0.0163001623, -0.0109933],
    "h.0.attprojw": [0.00113274355, 0.00542639615, 0.00018079413, 0.00136883021],
}
LLMC_LAST = 0.00170378527  # of wte's 50257 rows; the padding below is zero


def test_initial_weights_of_gpt2_are_llmc_s() -> None:
    """To 1e-6 of what they are drawn with: both take logarithms and sines from different libraries."""
    drawn: dict[str, torch.Tensor] = {}
    draw_parameters(build_model(parse_shape("d12")).rows(), 42, drawn.__setitem__)
    for name, want in LLMC_FIRST.items():
        std = 0.02 / math.sqrt(24) if name.endswith("projw") else 0.02
        assert drawn[name].flatten()[:4].tolist() == pytest.approx(want, abs=1e-6 * std), name
    wte = drawn["wte"]
    assert wte[50256, -1].item() == pytest.approx(LLMC_LAST, abs=1e-6 * 0.02)
    assert not wte[50257:].any()


def test_oracle_agrees_with_llmc():
    """llm.c's own first weights of GPT-2 124M and its learning rates: the oracle is held to the original."""
    values = initial_values(Shape(12, 768, 12, 1024, 50257))
    for name, want in LLMC_FIRST.items():
        assert values[name][0, :4].tolist() == pytest.approx(want, abs=2e-8), name
    rates = [
        ("cosine", 0.0, {0: 8.57142879e-07, 349: 3.0e-04, 700: 6.0e-04, 5000: 5.20795758e-04, 18000: 3.35075879e-06}),
        ("linear", 0.1, {5000: 4.72171756e-04, 18864: 6.00297353e-05}),
        ("wsd", 0.0, {15092: 6.0e-04, 18000: 7.32494154e-05, 18864: 7.95364414e-08}),
    ]
    for kind, final, points in rates:
        for step, want in points.items():
            got = learning_rate(kind, step, peak=6e-4, warmup=700, horizon=18865, final=final)
            assert got == pytest.approx(want, rel=3e-4 if step == 18864 else 1e-5), (kind, step)  # llm.c: fp32


def test_evaluation_of_any_smaller_batch_fits_the_plan():
    """The plan for (B, T) is enough for every b <= B, t <= T, without the reserves that training brings."""
    engine = Engine(EngineSpec(GPT2Config(L=1, C=48, NH=12, max_T=200, V=200), B=3, T=200, train=False))
    for b in (1, 2, 3):
        for t in (1, 2, 67, 100, 101, 128, 129, 199, 200):
            tokens = torch.arange(b * t).view(b, t) % 200
            assert torch.isfinite(engine.eval_losses(tokens, tokens)).all()
