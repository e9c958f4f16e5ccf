"""nanochat's family: every gradient is autograd's in fp64, and decoding computes the logits of the whole text.

The oracle was compared with nanochat's own model at commit 92d63d4 in fp32, at depths 4 and 5: the loss and each of its
gradients agree to a relative 3e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import interpreter  # noqa: F401  # before the first launch: it mends the rounding of bf16 stores
import pytest
import torch
from nanochat_oracle import Model, Nano, angles, random_values
from test_training import markov
from torch import Tensor

from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.passes import plan_engine
from daybreak.errors import ConfigError
from daybreak.kernels import Kernels, all_ops
from daybreak.models.registry import build_model
from daybreak.shapes import NanochatConfig, model_config, parse_shape

torch.set_num_threads(1)
T = 24
SHAPES = {
    "three layers": Nano(),
    "one layer": Nano(L=1),
    "all kinds of layers": Nano(L=6, C=48, NH=3, layers="wwf", window=4, softcap=9.0, theta=1e3),
    "many heads": Nano(L=2, C=64, NH=8, layers="f", eps=1e-3),
}
each_shape = pytest.mark.parametrize("name", SHAPES)


def shape(of: Nano) -> NanochatConfig:
    return NanochatConfig(**of._asdict())


def engine_of(s: Nano, values: Mapping[str, Tensor], B: int = 2, **options: Any) -> Engine:
    """An engine with these weights, whose other memory is full of NaN."""
    engine = Engine(EngineSpec(shape(s), B=B, T=T, **options), init=False)
    engine.load_params(dict(values))
    for name in ("activations", "scratch", "kv"):
        engine.frame.buffers[name].fill_(0xFF)
    if options.get("train", True):
        for name in engine.names():
            engine.grad(name).fill_(math.nan)
    return engine


def tokens_of(s: Nano, *size: int, seed: int = 0) -> Tensor:
    return torch.randint(s.V, size, generator=torch.Generator().manual_seed(seed))


def batch(s: Nano) -> tuple[Tensor, Tensor]:
    """Two micro-steps of tokens and targets (2, 2, T), some masked, unevenly."""
    tokens, targets = tokens_of(s, 2, 2, 2, T)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) < 0.3] = -1
    targets[0, 1] = -1
    return tokens, targets


def apart(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def together(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, with all scalars in one vector: each of their sums cancels, so that alone they say little."""
    found = {name: grad for name, grad in grads.items() if grad.numel() > 1}
    return found | {"scalars": torch.cat([grad for name, grad in sorted(grads.items()) if grad.numel() == 1])}


def oracle_of(s: Nano, values: dict[str, Tensor]) -> Model:
    """With the engine's angles, whose exponents are rounded to fp32."""
    oracle, freq = Model(s, values), build_model(shape(s)).constants()["freq"]
    assert ((angles(s) - freq).abs() <= 1.5e-6 * freq).all()
    oracle.freq = freq
    return oracle


@each_shape
def test_every_gradient_is_the_oracles(name: str) -> None:
    """At each level of recompute, which changes memory and not one bit."""
    s = SHAPES[name]
    values, (tokens, targets) = random_values(s), batch(s)
    loss, grads = oracle_of(s, values).gradients(tokens, targets)
    found, sizes = [], []
    for level in range(4):
        engine = engine_of(s, values, compute="fp64", recompute=level)
        engine.forward_backward(tokens, targets)
        found.append({name: engine.grad(name).clone() for name in engine.names()})
        sizes.append(engine.arena.sizes()["activations"])
        assert engine.state["loss"].item() == pytest.approx(loss, rel=1e-12)
        assert all(torch.equal(found[0][name], grad) for name, grad in found[-1].items())
    assert found[0].keys() == grads.keys()
    largest = max(grad.norm() for grad in grads.values())
    for name, grad in grads.items():
        if s.L == 1 and name == "backout":  # the last norm takes it away: 0 but for rounding
            assert found[0][name].abs().item() <= 1e-6 * largest
            continue
        assert apart(found[0][name], grad) <= 1e-9, name
    assert sizes[0] > sizes[1] > sizes[2]
    assert s.L == 1 or sizes[2] > sizes[3]


@each_shape
def test_fp32_and_evaluation(name: str) -> None:
    s = SHAPES[name]
    values, (tokens, targets) = random_values(s), batch(s)
    oracle = oracle_of(s, values)
    engine = engine_of(s, values, train=False)
    losses = oracle.losses(tokens[0], targets[0]).detach()
    assert apart(engine.eval_losses(tokens[0], targets[0]), losses) <= 1e-5
    few = engine.eval_losses(tokens[0, :1, :7], targets[0, :1, :7])  # fewer rows and columns than planned
    assert apart(few, losses[:1, :7]) <= 1e-5
    assert apart(engine.logits(tokens[0]), oracle.logits(tokens[0]).detach()) <= 1e-5


@pytest.mark.parametrize("V", [61, 300, 5000])
def test_logits_of_one_long_row_in_bf16(V: int) -> None:
    """The soft-cap of a whole chunk of logits has its scratch in the plan, also where no other call needs as much."""
    s = Nano(L=1, C=32, NH=2, max_T=64, V=V)
    values, tokens = random_values(s), torch.randint(V, (1, 512), generator=torch.Generator().manual_seed(2))
    for T in (64, 512):
        spec = EngineSpec(NanochatConfig(**s._asdict()), B=1, T=T, compute="bf16", train=False)
        engine = Engine(spec, init=False)
        engine.load_params(dict(values))
        got = engine.logits(tokens[:, :T])
        assert apart(got, oracle_of(s, values).logits(tokens[:, :T]).detach()) <= 3e-2


def test_bf16_errs_no_more_than_autograd_in_bf16() -> None:
    """Both against fp64, with weights that bf16 holds exactly."""
    s = SHAPES["all kinds of layers"]
    values, (tokens, targets) = random_values(s), batch(s)
    values["headw"] /= 8
    loss, grads = oracle_of(s, values).gradients(tokens, targets)
    rounded = Model(s, values, torch.bfloat16).gradients(tokens, targets)[1]
    engine = engine_of(s, values, compute="bf16")
    engine.forward_backward(tokens, targets)
    assert engine.state["loss"].item() == pytest.approx(loss, rel=5e-3)
    got, theirs, want = (together(x) for x in ({name: engine.grad(name) for name in grads}, rounded, grads))
    errors: dict[str, list[float]] = {}  # of each kind of parameter, the largest
    for name, grad in want.items():
        kind = errors.setdefault(name.rpartition(".")[2], [0.0, 0.0])
        kind[:] = (max(kind[i], apart(x[name], grad)) for i, x in enumerate((got, theirs)))
    assert {kind: e for kind, e in errors.items() if e[0] > 1.2 * e[1]} == {}


@each_shape
@pytest.mark.parametrize("compute", ["fp32", "fp64"])
def test_decoding_computes_the_logits_of_the_whole_text(name: str, compute: str) -> None:
    """Rows of unequal length, prefilled together and alone, token by token up to the last place."""
    s, limit = SHAPES[name], {"fp32": 1e-5, "fp64": 2e-7}[compute]  # logits come in fp32
    values = random_values(s)
    oracle, engine = oracle_of(s, values), engine_of(s, values, compute=compute, rows=4, train=False)
    lengths = (1, 11, 11, 18)  # before and beyond the window
    texts = [tokens_of(s, T, seed=i).tolist() for i in range(4)]
    want = [oracle.logits(torch.tensor([text]))[0].detach() for text in texts]

    def check(got: Tensor, rows: list[int], places: list[int]) -> None:
        for x, row, place in zip(got, rows, places, strict=True):
            assert apart(x, want[row][place]) <= limit, (row, place)

    check(engine.prefill(1, [texts[i][: lengths[i]] for i in (1, 2)]), [1, 2], [10, 10])
    check(engine.prefill(0, [texts[0][:1]]), [0], [0])
    check(engine.prefill(3, [texts[3][:18]]), [3], [17])
    for step in range(T - max(lengths)):
        places = [n + step for n in lengths]
        check(engine.decode([text[p] for text, p in zip(texts, places, strict=True)], places), [0, 1, 2, 3], places)
    check(engine.decode([texts[0][T - 18 + 1]], [T - 18 + 1]), [0], [T - 18 + 1])  # one row alone


def test_packed_rows_are_their_documents_alone() -> None:
    """Losses of two documents in a row, which smear and attention keep apart."""
    s = SHAPES["all kinds of layers"]
    values, tokens = random_values(s), tokens_of(s, 1, T)
    oracle = oracle_of(s, values)
    engine = engine_of(s, values, B=1, compute="fp64", documents=True)
    places = torch.cat([torch.arange(10), torch.arange(T - 10)])[None]
    targets = tokens.roll(-1, 1)
    got = engine.eval_losses(tokens, targets, places)
    parts = [oracle.losses(tokens[:, a:b], targets[:, a:b]).detach() for a, b in ((0, 10), (10, T))]
    assert apart(got, torch.cat(parts, 1)) <= 1e-12
    engine.forward_backward(tokens[None], targets[None], places[None])
    loss = torch.cat([oracle.losses(tokens[:, a:b], targets[:, a:b]) for a, b in ((0, 10), (10, T))], 1).mean()
    want = torch.autograd.grad(loss, list(oracle.p.values()))
    for parameter, grad in zip(oracle.p, want, strict=True):
        assert apart(engine.grad(parameter), grad) <= 1e-9, parameter


KEPT = {"residual2": 1, "qkv": 3, "att": 1, "fc": 4}  # of each layer, in C columns
AGAIN = {"relu2": 4, "ln1": 1, "ln2": 1}  # those that backward may write again
UNTIL = {0: ("relu2", "ln1", "ln2"), 1: ("ln1", "ln2"), 2: ()}  # by level of recompute: which of them are kept


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_memory_between_forward_and_backward_is_counted_by_hand(recompute: int) -> None:
    """In bf16, to the byte: no mixed stream, no output of QK-norm, and no last residual3."""
    s, B = Nano(L=4, C=64, NH=2), 2
    n = B * T
    arena = plan_engine(EngineSpec(shape(s), B=B, T=T, compute="bf16", recompute=recompute))[2]
    turn = next(i for i, call in enumerate(arena.calls) if call.name == "mix_backward")
    kept = {
        e.name: e.nbytes for e in arena.entries if e.buffer == "activations" and e.first < turn <= e.last
    }  # fmt: skip
    want = dict.fromkeys(("embedded", "normed", "smeared", "backed", "d_lnf"), n * 64 * 2)
    want |= dict.fromkeys(("normed.rstd", "lnf.rstd"), n * 4)
    for l in range(4):
        columns = KEPT | {name: AGAIN[name] for name in UNTIL[recompute]} | ({"residual3": 1} if l < 3 else {})
        want |= {f"h.{l}.{name}": n * 64 * c * 2 for name, c in columns.items()}
        want |= {f"h.{l}.ln1.rstd": n * 4, f"h.{l}.ln2.rstd": n * 4, f"h.{l}.lse": n * 2 * 4}
    assert kept == want
    assert next(e.dtype for e in arena.entries if e.name == "d_middle") == torch.float32  # not rounded
    made = [e for e in arena.entries if e.name.endswith(".qk.again")]
    assert len({(e.first, e.last) for e in made}) == 4  # each for a few calls of its layer's backward
    assert all(e.first > turn for e in made)


def small_gradients(seed: int, device: str = "cpu", compute: str = "bf16") -> dict[str, float]:
    """The gradients of x0, summed over layers, and of backout after three steps of training from zero projections, each
    as a part of those in fp32. The blocks' outputs are then thousandths of the stream."""
    s = Nano(L=4, C=128, NH=4, max_T=128, V=257, window=32)
    text = torch.from_numpy(markov(4 * 8 * 129, seed).astype("int64")).view(4, 1, 8, 129)
    optim = OptimConfig(name="muon", lr=0.008, muon_lr=0.02, muon_warmup=400, clip=0, horizon=100)
    trained = Engine(EngineSpec(shape(s), B=8, T=128, optim=optim), seed=seed)
    for step in range(3):
        trained.train_step(text[step, ..., :-1], text[step, ..., 1:], lr=2e-4, step=step)
    values = {name: trained.param(name).to(torch.bfloat16).float() for name in trained.names()}
    found = []
    for kind, where in (("fp32", "cpu"), (compute, device)):
        engine = Engine(EngineSpec(shape(s), B=8, T=128, compute=kind), device=where)
        engine.load_params(values)
        engine.forward_backward(text[3, ..., :-1], text[3, ..., 1:])
        grads = {"x0": sum(engine.grad(f"h.{l}.x0").item() for l in range(4)), "backout": engine.grad("backout").item()}
        found.append(grads)
    return {name: found[1][name] / found[0][name] for name in found[0]}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_gradients_of_scalars_keep_their_size_in_bf16(seed: int) -> None:
    """nanochat under torch.compile keeps a half and all of them. With a mixed stream that is rounded it is a fifth."""
    kept = small_gradients(seed)
    assert 0.5 < kept["x0"] < 1.1
    assert 0.85 < kept["backout"] < 1.15


@pytest.mark.parametrize("recompute", [0, 1, 2, 3])
def test_no_two_tensors_share_bytes_while_both_are_needed(recompute: int) -> None:
    arena = plan_engine(EngineSpec(shape(SHAPES["all kinds of layers"]), B=2, T=T, recompute=recompute))[2]
    needed = [e for e in arena.entries if e.buffer == "activations" and e.last > e.first]
    assert len(needed) > 40
    for i, a in enumerate(needed):
        for b in needed[:i]:
            together = a.first <= b.last and b.first <= a.last
            assert not together or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset, (a.name, b.name)


def test_initial_weights_are_nanochats() -> None:
    s = NanochatConfig(L=4, C=64, NH=2, V=200, max_T=64)
    engine, uniform = Engine(EngineSpec(s, B=1, T=8), seed=3), math.sqrt(3) / 8
    for name in engine.names():
        leaf, x = name.rpartition(".")[2], engine.param(name)
        if leaf in ("attprojw", "fcprojw", "smear"):
            assert not x.any()
        elif leaf in ("wte", "headw"):
            assert x[:200].std().item() == pytest.approx({"wte": 0.8, "headw": 0.001}[leaf], rel=0.03)
            assert not x[200:].any()
        elif leaf in ("qkvw", "fcw", "ve"):
            bound, drawn = uniform * (0.4 if leaf == "fcw" else 1.0), x[:200] if leaf == "ve" else x
            assert 0.99 * bound < drawn.max().item() <= bound
            assert -bound <= drawn.min().item() < -0.99 * bound
            assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
        elif leaf in ("gatew", "smearw"):
            assert 0 <= x.min().item() < 0.003
            assert 0.017 < x.max().item() <= 0.02
    scalars = [(engine.param(f"h.{l}.resid").item(), engine.param(f"h.{l}.x0").item()) for l in range(4)]
    assert scalars == [pytest.approx((1.15 - 0.1 * l / 3, 0.2 - 0.05 * l), rel=1e-6) for l in range(4)]
    assert engine.param("backout").item() == pytest.approx(0.2)


# By hand: V C for wte and head each, and for every second layer; 12 C^2 a layer; gates and scalars.
@pytest.mark.parametrize(("name", "L"), [("nanochat:d12", 12), ("nanochat:d24", 24)])
def test_shapes_have_nanochats_sizes(name: str, L: int) -> None:
    cfg, C, V = parse_shape(name), 64 * L, 32768
    assert (cfg.L, cfg.C, cfg.NH, cfg.HS, cfg.V, cfg.max_T) == (L, C, L // 2, 128, V, 2048)
    numel = sum(row.numel for row in build_model(cfg).rows())
    assert numel == V * C * (2 + L // 2) + 12 * C * C * L + L // 2 * 12 * (L // 2) + 2 * L + 26
    matmuls = numel - V * C * (1 + L // 2)
    full, local = 1024, 513 - 513**2 / 4096
    pairs = L // 4 * (3 * local + full)
    assert build_model(cfg).flops_per_token(2048, numel) == pytest.approx(6 * matmuls + 12 * C * pairs, abs=1)


def test_wrong_shapes_are_refused() -> None:
    for values, said in (
        ({"C": 16, "NH": 2}, "model.C = 16 must be 24 at least"),
        ({"layers": "wn"}, "letters f and w"),
        ({"softcap": 0.0}, "model.softcap = 0.0 must be"),
        ({"C": 66, "NH": 2}, "must be a multiple of 8"),
    ):
        with pytest.raises(ConfigError, match=said):
            model_config({"arch": "nanochat", **values}).check()


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_nanochat.py runs it there")
@pytest.mark.parametrize("recompute", [0, 2])
def test_triton_kernels_make_the_same_model(recompute: int) -> None:
    """Loss, gradients in the second of two micro-steps, prefill, and decoding of three rows and of one."""
    s, spec = Nano(L=2, C=24, NH=3, layers="wf"), {"B": 2, "T": 12, "recompute": recompute, "rows": 3}
    engines = [Engine(EngineSpec(shape(s), **spec), init=False) for _ in range(2)]
    scratch, ops = torch.full((1 << 20,), 0xFF, dtype=torch.uint8), all_ops("cuda")
    engines[1].frame.k = Kernels(
        scratch, {n: "triton" if "triton" in ops[n].impls else "torch" for n in engines[0].arena.choices}
    )
    tokens = tokens_of(s, 3, 2, 2, 12)
    results: list[dict[str, Tensor]] = []
    for engine in engines:
        engine.load_params(random_values(s))
        engine.forward_backward(tokens[0], tokens[1])
        found = together({name: engine.grad(name).clone() for name in engine.names()})
        found["loss"] = engine.state["loss"].clone()
        found["prefill"] = engine.prefill(0, tokens[2].flatten(0, 1)[:3, :8].tolist()).clone()
        found["decode"] = engine.decode([1, 2, 3], [8, 8, 8]).clone()
        found["decode one"] = engine.decode([4], [9]).clone()
        results.append(found)
    plain, fused = results
    for key, want in plain.items():
        assert ((fused[key] - want).norm() / want.norm()).item() <= 5e-6, key
