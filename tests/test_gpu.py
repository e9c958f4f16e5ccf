"""The engine on a CUDA device: against the oracle in fp64, against itself with every backend, option and graph.

Skipped where there is no such device; the kernels one by one are in test_kernel_*.py.
"""

from __future__ import annotations

import itertools
import threading
from functools import cache
from pathlib import Path
from typing import Any

import llama_oracle
import numpy as np
import oracle
import pytest
import torch
from dist_engine import noted
from llama_oracle import Decoder
from oracle import GPT2, Shape, random_values
from recovery import assert_intact, assert_same, config, make_shards, recipe
from recovery import train as run_train
from snapshots import exact_weight
from torch import Tensor

import daybreak
from daybreak.config import Config
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.collectives import Collectives
from daybreak.engine.device import missing_on, set_precision
from daybreak.generate import Sampling, choose
from daybreak.kernels import CUDA_ORDER
from daybreak.kernels.cuda import cublaslt
from daybreak.models.rotary import rotary, window_rotary
from daybreak.parallel import Group
from daybreak.report.bench import step_products
from daybreak.shapes import GPT2Config, LlamaConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = Shape(L=3, C=128, NH=2, max_T=128, V=1000)
ODD = Shape(L=2, C=96, NH=3, max_T=64, V=300)  # heads of 32, rows no multiple of anything
B, T = 4, 128
FALLBACKS = [(g, name) for g, order in CUDA_ORDER.items() if g not in ("glu", "lora", "rope") for name in order]
# Of the decoder family: heads of Llama, Qwen 3 and Gemma 3, and a window that is shorter than a block; odd sizes.
DECODERS = {
    "llama": Decoder(
        L=2, C=256, NH=8, NKV=2, HS=64, F=384, max_T=192, V=1000, rope="llama3", rope_factor=8.0, rope_original=64
    ),
    "qwen": Decoder(L=2, C=128, NH=6, NKV=3, HS=128, F=200, max_T=192, V=1000, qk_norm=True, qkv_bias=True, tied=False),
    "mistral": Decoder(L=3, C=96, NH=4, NKV=1, HS=40, F=136, max_T=192, V=300, layers="wfn", window=50),
    "gemma": Decoder(L=2, C=96, NH=4, NKV=1, HS=256, F=136, max_T=192, V=300, layers="wf", window=50, act="gelu",
                     window_theta=100.0, qk_norm=True, post_norms=True, norm_plus_one=True, embed_scale=True),
}  # fmt: skip
# Pairwise: every two values of two options meet in at least one row.
OPTIONS = [
    {"compute": "bf16", "recompute": 0, "masters": "split", "tf32": False, "T": 128},
    {"compute": "bf16", "recompute": 1, "masters": "fp32", "tf32": False, "T": 65},
    {"compute": "bf16", "recompute": 2, "masters": "none", "tf32": False, "T": 128},
    {"compute": "bf16", "recompute": 3, "masters": "split", "tf32": False, "T": 65},
    {"compute": "bf16", "recompute": 0, "masters": "fp32", "tf32": False, "T": 128},
    {"compute": "bf16", "recompute": 1, "masters": "none", "tf32": False, "T": 65},
    {"compute": "bf16", "recompute": 2, "masters": "split", "tf32": False, "T": 65},
    {"compute": "bf16", "recompute": 3, "masters": "fp32", "tf32": False, "T": 128},
    {"compute": "bf16", "recompute": 0, "masters": "none", "tf32": True, "T": 65},
    {"compute": "bf16", "recompute": 1, "masters": "split", "tf32": True, "T": 128},
    {"compute": "bf16", "recompute": 2, "masters": "fp32", "tf32": True, "T": 65},
    {"compute": "bf16", "recompute": 3, "masters": "none", "tf32": True, "T": 128},
    {"compute": "fp32", "recompute": 0, "masters": "auto", "tf32": False, "T": 128},
    {"compute": "fp32", "recompute": 0, "masters": "auto", "tf32": True, "T": 65},
    {"compute": "fp32", "recompute": 1, "masters": "auto", "tf32": False, "T": 65},
    {"compute": "fp32", "recompute": 1, "masters": "auto", "tf32": True, "T": 128},
    {"compute": "fp32", "recompute": 2, "masters": "auto", "tf32": False, "T": 128},
    {"compute": "fp32", "recompute": 2, "masters": "auto", "tf32": True, "T": 65},
    {"compute": "fp32", "recompute": 3, "masters": "auto", "tf32": False, "T": 65},
    {"compute": "fp32", "recompute": 3, "masters": "auto", "tf32": True, "T": 128},
]


@pytest.fixture(autouse=True)
def _exact_products():
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


def batch(shape: Shape, A: int, t: int = T, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens and targets (A, B, t)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.V, (2, A, B, t), generator=generator).unbind(0)


def build(shape: Shape, t: int = T, **options: Any) -> Engine:
    outside = {key: options.pop(key) for key in ("seed", "init", "group") if key in options}
    device = options.pop("device", "cuda")
    return Engine(EngineSpec(GPT2Config(**shape._asdict()), B=B, T=t, **options), device=device, **outside)


def train(engine: Engine, shape: Shape, steps: int = 10, A: int = 2) -> list[float]:
    losses = []
    for step in range(steps):
        tokens, targets = batch(shape, A, engine.T, step)
        engine.train_step(tokens, targets, lr=1e-3, step=step)
        losses.append(engine.stats()["loss"])
    return losses


def bits(engine: Engine) -> list[Tensor]:
    return [engine.state[k].cpu() for k in ("weights", "masters", "m", "v", "grads", "stats") if k in engine.state]


def same_bits(a: Engine, b: Engine) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(bits(a), bits(b), strict=True)
    )


def errors(engine: Engine, want: dict[str, Tensor]) -> dict[str, float]:
    """Gradient error of each kind of parameter relative to its norm; the key bias against the query bias."""
    total: dict[str, list[float]] = {}
    for name, exact in want.items():
        got, exact = engine.grad(name).double().cpu(), exact.cpu()
        parts = zip(got.chunk(3), exact.chunk(3), (0, 0, 2), strict=True) if "qkvb" in name else [(got, exact, 0)]
        for i, (x, y, _) in enumerate(parts):
            scale = exact.chunk(3)[0] if i == 1 else y
            key = name.rsplit(".", 1)[-1] + (f".{i}" if "qkvb" in name else "")
            total.setdefault(key, []).append(((x - y).norm() / scale.norm()).item())
    return {key: max(values) for key, values in total.items()}


@pytest.mark.parametrize("shape", [SMALL, ODD], ids=["small", "odd"])
def test_fp32_gradients_equal_the_oracles(shape: Shape) -> None:
    t = min(T, shape.max_T) - 1
    engine, values = build(shape, t, compute="fp32", recompute=2), random_values(shape, 0)
    engine.load_params(values)
    tokens, targets = batch(shape, 2, t)
    loss, grads = GPT2(shape).load(values).gradients(tokens, targets)
    engine.forward_backward(tokens, targets)
    assert engine.state["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert max(errors(engine, grads).values()) < 1e-5


def flash_attention(qkv: Tensor, NH: int) -> Tensor:
    """The result of oracle.attention, by torch's flash attention."""
    b, t, c3 = qkv.shape
    q, k, v = (x.view(b, t, NH, -1).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(b, t, c3 // 3)


@pytest.mark.parametrize("shape", [SMALL, ODD], ids=["small", "odd"])
def test_bf16_gradients_are_as_exact_as_bf16_autograds(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64 the engine errs at most 1.5 times as much as the bf16 oracle, kind by kind of parameter.

    The bf16 oracle's attention is torch's flash attention here: like ours it rounds the softmax's gradient block by
    block, which the key bias, whose gradient is a sum that ought to cancel, shows most.
    """
    t = min(T, shape.max_T)
    values = {k: v.bfloat16().double() for k, v in random_values(shape, 0).items()}
    engine = build(shape, t, compute="bf16")
    engine.load_params(values)
    tokens, targets = batch(shape, 1, t)
    _, exact = GPT2(shape).load(values).gradients(tokens, targets)
    monkeypatch.setattr(oracle, "attention", flash_attention)
    rough_model = GPT2(shape, torch.bfloat16).load(values).cuda()
    _, rough = rough_model.gradients(tokens.cuda(), targets.cuda())
    engine.forward_backward(tokens, targets)
    own = errors(engine, exact)
    for name in engine.names():
        engine.grad(name).copy_(rough[name])
    budget = errors(engine, exact)
    assert {k: (own[k], budget[k]) for k in own if own[k] > 1.5 * budget[k]} == {}


@pytest.mark.parametrize(("compute", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_losses_follow_the_cpus(compute: str, tolerance: float) -> None:
    gpu, cpu = (train(build(SMALL, compute=compute, device=device), SMALL) for device in ("cuda", "cpu"))
    assert gpu == pytest.approx(cpu, rel=tolerance)


def accumulated(engine: Engine) -> dict[str, Tensor]:
    """The gradients of two micro-steps, through graphs where the engine has them; random weights, biases included."""
    engine.load_params(random_values(SMALL, 0))
    tokens, targets = batch(SMALL, 2, engine.T)
    engine.forward_backward(tokens, targets)
    return {name: engine.grad(name).double().cpu() for name in engine.names()}


@cache
def plain_gradients(t: int, compute: str) -> dict[str, Tensor]:
    """The results of the plain-torch kernels: held against the oracle on the CPU, and here to bf16's noise."""
    torch.set_float32_matmul_precision("highest")
    return accumulated(build(SMALL, t, compute=compute, kernels=dict.fromkeys(CUDA_ORDER, "torch")))


@pytest.mark.parametrize("rest", ["torch", "auto"])
@pytest.mark.parametrize(("group", "name"), FALLBACKS)
def test_every_backend_serves(group: str, name: str, rest: str) -> None:
    """Each backend forced in turn, beside plain torch and, as a user would, beside the best of the others in graphs."""
    if name in missing_on(torch.device("cuda", 0)):
        pytest.skip(missing_on(torch.device("cuda", 0))[name])
    engine = build(SMALL, compute="bf16", kernels={**dict.fromkeys(CUDA_ORDER, rest), group: name})
    assert name in engine.frame.k.choices.values()
    accumulated(engine)
    assert max(errors(engine, plain_gradients(T, "bf16")).values()) < 0.03
    engine.init(engine.seed)
    losses = train(engine, SMALL, 3)  # the optimizer and the guard too
    assert losses[-1] == pytest.approx(train(build(SMALL, compute="bf16"), SMALL, 3)[-1], rel=5e-3)


def test_the_tuner_lists_what_a_step_asks_of_cublaslt() -> None:
    """`bench --tune` lists products from the schedule; the keys must be those that training looks up, pointer for
    pointer."""
    device = torch.device("cuda", 0)
    if "cublaslt" in missing_on(device):
        pytest.skip(missing_on(device)["cublaslt"])
    blas = cublaslt.blas_of(0)
    assert blas is not None
    blas.matmuls.clear()
    blas.used.clear()
    for shape, t, compute in ((SMALL, T, "bf16"), (ODD, 63, "bf16"), (SMALL, T, "fp8")):
        build(shape, t, compute=compute)
        flags = {f"model.{key}": value for key, value in shape._asdict().items()}
        flags |= {"batch.B": B, "batch.T": t, "precision.compute": compute}
        keys = step_products(Config.from_target("d12").override(flags), device)
        assert {str(key) for key in keys} <= set(cublaslt.choices())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_in_pairs(options: dict[str, Any]) -> None:
    """Every pair of options trains, twice with the same bits, and has the gradients of the plain kernels."""
    set_precision(Config().override({"precision.tf32": options["tf32"]}), torch.device("cuda"))
    own = {k: v for k, v in options.items() if k not in ("tf32", "T")}
    runs = [build(SMALL, options["T"], **own) for _ in range(2)]
    losses = [train(engine, SMALL, 5) for engine in runs]
    assert losses[0] == losses[1]
    assert same_bits(*runs)
    accumulated(runs[0])
    # TF32: 0.0042 where operands are cut to its 10 bits in emulation, 0.0018 where they are rounded.
    limit = 0.03 if options["compute"] == "bf16" else 0.01 if options["tf32"] else 1e-4
    assert max(errors(runs[0], plain_gradients(options["T"], options["compute"])).values()) < limit


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
def test_the_pairs_are_all_there(compute: str) -> None:
    rows = [o for o in OPTIONS if o["compute"] == compute]
    for a, b in itertools.combinations(("recompute", "masters", "tf32", "T"), 2):
        values = itertools.product({o[a] for o in rows}, {o[b] for o in rows})
        assert set(values) == {(o[a], o[b]) for o in rows}


def test_split_and_fp32_masters_train_with_the_same_bits() -> None:
    split, whole = (build(SMALL, compute="bf16", masters=m) for m in ("split", "fp32"))
    assert train(split, SMALL) == train(whole, SMALL)
    for name in split.names():
        assert torch.equal(split.param(name), whole.param(name))
        assert torch.equal(exact_weight(split, name), exact_weight(whole, name))


@pytest.mark.parametrize("kernels", [{}, {"matmul": "cublaslt"}, {"matmul": "triton"}], ids=str)
def test_one_layer_trains_and_the_rest_is_frozen(kernels: dict[str, str]) -> None:
    """Its gradients have the bits that they have where everything trains; no other weight changes in any bit."""
    options = {"compute": "bf16", "kernels": kernels}
    whole, part, narrow = (
        build(SMALL, **options, **more)
        for more in ({}, {"trainable": ("h.1.*",)}, {"trainable": ("h.1.*",), "frozen": {"*w*": "fp32"}})
    )
    for engine in (whole, part, narrow):
        engine.load_params(random_values(SMALL, 0))
    before = {name: part.param(name).clone() for name in part.names()}
    for step in range(3):
        tokens, targets = batch(SMALL, 2, T, step)
        for engine in (whole, part, narrow) if not step else (part, narrow):
            engine.train_step(tokens, targets, lr=1e-2, step=step)
        if not step:
            assert all(torch.equal(part.grad(name), whole.grad(name)) for name in part.table.offsets)
    for name, weight in before.items():
        assert torch.equal(part.param(name), weight) != name.startswith("h.1."), name
        assert torch.equal(part.param(name), narrow.param(name).bfloat16()), name
    small, large = (sum(size for name, size in x.arena.sizes().items() if name != "scratch") for x in (part, whole))
    assert small < 0.6 * large  # cuBLASLt's workspace is larger than all the rest


def test_graphs_compute_what_plain_calls_do() -> None:
    captured, plain = build(SMALL, compute="bf16"), build(SMALL, compute="bf16")
    plain.graphs.clear()
    for step in range(3):
        tokens, targets = batch(SMALL, 1, T, step)
        captured.train_step(tokens, targets, lr=1e-3, step=step)
        plain.begin_step(lr=1e-3, step=step, valid=targets.numel())
        plain.micro_step(tokens[0], targets[0], first=True)
        plain.update()
    assert captured.graphs._graphs
    assert same_bits(captured, plain)


def test_preparing_leaves_no_trace() -> None:
    engine = build(SMALL, compute="bf16")
    assert not engine.state["m"].any()
    assert not engine.state["counts"].any()
    cpu = build(SMALL, compute="bf16", device="cpu")
    assert all(torch.equal(engine.param(name).cpu(), cpu.param(name)) for name in cpu.names())


def test_a_step_that_is_not_finite_touches_nothing() -> None:
    engine = build(SMALL, compute="bf16")
    train(engine, SMALL, 2)
    before = bits(engine)
    engine.begin_step(lr=1e-3, step=2, valid=1)
    tokens, targets = batch(SMALL, 1)
    engine.micro_step(tokens[0], targets[0], first=True)
    engine.grad("h.1.fcw")[3, 3] = float("inf")
    engine.update()
    assert engine.stats()["skip"] == 1
    for i in range(4):  # weights, masters, m, v
        assert torch.equal(bits(engine)[i].view(torch.uint8), before[i].view(torch.uint8))


def test_memory_is_constant_after_the_first_step() -> None:
    engine = build(SMALL, compute="bf16")
    tokens, targets = batch(SMALL, 2)
    engine.train_step(tokens, targets, lr=1e-3, step=0)
    engine.eval_losses(tokens[0], targets[0])
    engine.prefill(0, [tokens[0, 0].tolist()])
    torch.cuda.synchronize()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_stats()["allocation.all.allocated"]
    for step in range(1, 6):
        engine.train_step(tokens, targets, lr=1e-3, step=step)
        engine.stats()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    engine.eval_losses(tokens[0], targets[0])
    engine.prefill(0, [tokens[0, 0].tolist()])
    assert torch.cuda.memory_reserved() == reserved


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_text_written_token_by_token_has_the_logits_of_the_whole(compute: str, rows: int) -> None:
    """By graphs whose launches overlap: as near to fp64 as one forward pass is; and the same bits once more."""
    shape = Shape(L=4, C=768, NH=12, max_T=512, V=50257)
    cfg = GPT2Config(**shape._asdict())
    engine, oracle = (
        Engine(EngineSpec(cfg, B=1, T=512, compute=kind, train=False, rows=rows), device=device)
        for kind, device in ((compute, "cuda"), ("fp64", "cpu"))
    )
    for each in (engine, oracle):
        each.load_params(random_values(shape, 3))
    start, stop = 270, 300  # more than attention looks at together
    ids = torch.randint(0, 50257, (rows, stop), generator=torch.Generator().manual_seed(1))

    def write() -> Tensor:
        found = [torch.cat([engine.prefill(i, [ids[i, :start].tolist()]).clone() for i in range(rows)])]
        found += [engine.decode(ids[:, t].tolist(), [t] * rows).clone() for t in range(start, stop)]
        return torch.stack(found, 1).double().cpu()

    got = write()
    want, whole = (
        torch.cat([each.logits(row[None])[:, start - 1 :].double().cpu() for row in ids]) for each in (oracle, engine)
    )
    error, usual = ((x - want).norm() / want.norm() for x in (got, whole))
    assert usual <= (1e-5 if compute == "fp32" else 0.1)
    assert error <= 1.2 * usual
    assert torch.equal(write(), got)


def decoder_values(s: Decoder) -> dict[str, Tensor]:
    """The oracle's, but matrices are a quarter as large: these shapes are wider, and would magnify what is rounded."""
    return {name: x / 4 if x.dim() == 2 else x for name, x in llama_oracle.random_values(s).items()}


def decoder(s: Decoder, **options: Any) -> Engine:
    """An engine of the decoder family with the oracle's weights."""
    device, t = options.pop("device", "cuda"), options.pop("t", 192)
    engine = Engine(EngineSpec(LlamaConfig(**s._asdict()), B=options.pop("B", B), T=t, **options), device=device)
    engine.load_params(decoder_values(s))
    return engine


def decoder_oracle(s: Decoder) -> llama_oracle.Model:
    """With the engine's angles, whose exponents are rounded to fp32 as transformers has it."""
    oracle = llama_oracle.Model(s, decoder_values(s))
    oracle.freq, oracle.window_freq = (of(LlamaConfig(**s._asdict()))[0] for of in (rotary, window_rotary))
    return oracle


@pytest.mark.parametrize("attention", ["auto", "cudnn", "triton", "torch"])
@pytest.mark.parametrize("t", [192, 77])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_s_gradients_are_the_oracles(name: str, t: int, attention: str) -> None:
    """fp32 to rounding. In bf16 a kind of parameter errs at most 1.5 times as much as with plain-torch kernels."""
    s = DECODERS[name]
    tokens, targets = (x % s.V for x in batch(Shape(L=1, C=1, NH=1, max_T=t, V=1000), 2, t))
    _, want = decoder_oracle(s).gradients(tokens, targets)
    found: dict[str, dict[str, float]] = {}
    for kind, compute, kernels in (
        ("fp32", "fp32", {"attention": attention}),
        ("bf16", "bf16", {"attention": attention}),
        ("plain", "bf16", dict.fromkeys(CUDA_ORDER, "torch")),
    ):
        engine = decoder(s, t=t, compute=compute, recompute=2, kernels=kernels)
        engine.forward_backward(tokens, targets)
        errs: dict[str, list[float]] = {}
        for parameter, exact in want.items():
            error = (engine.grad(parameter).double().cpu() - exact).norm() / exact.norm()
            errs.setdefault(parameter.rsplit(".", 1)[-1], []).append(error.item())
        found[kind] = {key: max(values) for key, values in errs.items()}
    assert max(found["fp32"].values()) < 2e-5
    assert {k: (x, found["plain"][k]) for k, x in found["bf16"].items() if x > 1.5 * found["plain"][k]} == {}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_trains_with_the_same_bits_twice(name: str) -> None:
    s = DECODERS[name]
    engines = [decoder(s, compute="bf16") for _ in range(2)]
    for step in range(3):
        tokens, targets = (x % s.V for x in batch(SMALL, 2, 192, step))
        for engine in engines:
            engine.train_step(tokens, targets, lr=1e-3, step=step)
    assert engines[0].stats()["loss"] < 10
    assert same_bits(*engines)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_writes_what_it_reads(name: str, rows: int, compute: str) -> None:
    """Token by token, beyond its window and the rope's first length: as near to fp64 as one forward pass is."""
    s, start, stop = DECODERS[name], 90, 110
    options = {"B": 1, "train": False, "rows": rows}
    engine, oracle = decoder(s, compute=compute, **options), decoder_oracle(s)
    ids = torch.randint(s.V, (rows, stop), generator=torch.Generator().manual_seed(1))
    found = [torch.cat([engine.prefill(i, [ids[i, :start].tolist()]).clone() for i in range(rows)])]
    found += [engine.decode(ids[:, t].tolist(), [t] * rows).clone() for t in range(start, stop)]
    got = torch.stack(found, 1).double().cpu()[..., : s.V]
    want = oracle.logits(ids)[:, start - 1 :].detach()
    whole = torch.cat([engine.logits(row[None])[:, start - 1 :].double().cpu()[..., : s.V] for row in ids])
    error, usual = ((x - want).norm() / want.norm() for x in (got, whole))
    assert usual <= (1e-5 if compute == "fp32" else 0.1)
    assert error <= 1.2 * usual


@pytest.mark.parametrize("V", [1000, 50257])
def test_tokens_are_chosen_as_on_a_cpu(V: int) -> None:
    """With the graphs of every combination of cuts, first captured and then replayed with other settings."""
    rng, b = np.random.default_rng(5), 6
    for top_k, top_p, min_p in itertools.product((0, 7), (1.0, 0.8), (0.0, 0.01)):
        for turn in range(2):
            logits = rng.normal(scale=3, size=(b, V)).astype(np.float32)
            hows = [Sampling(temperature=i / 2, top_k=top_k * (i + turn), top_p=top_p, min_p=min_p) for i in range(b)]
            draws = rng.random(b).tolist()
            found = choose(torch.from_numpy(logits).cuda(), hows, draws)
            assert found.tolist() == choose(logits, hows, draws).tolist()


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Real processes, one of them killed inside its second save: losses, weights and optimizer state are equal."""
    shards = make_shards(tmp_path / "shards")
    values = {"run__device": "cuda", "run__steps": 30, "model__C": 64, "precision__compute": "bf16"}
    code, err = run_train([recipe(config(shards, tmp_path, "straight", **values), tmp_path)])
    assert code == 0, err
    killed = recipe(config(shards, tmp_path, "killed", **values), tmp_path)
    code, _ = run_train([killed], {"do": "kill", "at": "after:daybreak.state.checkpoint:_write_manifest", "n": 2})
    assert code == -9
    assert assert_intact(tmp_path / "killed") == 5
    code, err = run_train([tmp_path / "killed"])
    assert code == 0, err
    assert_same(daybreak.Run(tmp_path / "straight"), daybreak.Run(tmp_path / "killed"))


def test_exchanges_through_nccl_are_captured_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank that sends to itself: its calls are in the graphs, the bits are those without, and it can leave."""
    alone = build(SMALL, compute="bf16")
    losses = train(alone, SMALL, 4)
    dist = torch.distributed
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=alone.device)
    group, plain = Group(), Collectives.__init__
    group.dist = dist

    def sends(self: Collectives, *args: Any) -> None:
        plain(self, *args)
        self.active = True
        exchanges.append(noted(self))

    exchanges: list[Any] = []
    monkeypatch.setattr(Collectives, "__init__", sends)
    monkeypatch.setattr(Collectives, "sum_scalars", lambda self, state: None)  # of several ranks only is there room
    engine = build(SMALL, compute="bf16", group=group)
    assert train(engine, SMALL, 4) == losses
    assert same_bits(engine, alone)
    assert {what for each in exchanges for what, _, _ in each} == {"all_reduce"}
    group.before_close.append(engine.graphs.clear)
    leaving = threading.Thread(target=group._leave, daemon=True)
    leaving.start()
    leaving.join(30)
    assert not leaving.is_alive()
